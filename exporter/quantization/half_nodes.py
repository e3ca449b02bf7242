"""Some nodes of a float or Q/DQ graph computed in half: the layers that INT8 would hurt most.

A strongly typed builder reads the data type from the tensors, so a convolution in half is

    x -> Cast(half) -> Conv(half weights) -> Relu(half) -> Cast(float) -> next reader

A ReLU behind the convolution stays in half with it, and a run of such layers passes half tensors
on: casts stand only where half meets another type.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.precision import HALF, rounded

_FOLLOWERS = ("Relu",)


def in_half(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy of ``model`` whose nodes ``names``, Conv, Gemm or MatMul, are computed in half.

    Their weights and biases must be initializers.

    Raises:
        GateFailedError: naming the tensor, if a weight is beyond half's range.
    """
    if not names:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    state = _Casts()
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        follows = node.op_type in _FOLLOWERS and node.input[0] in state.half_only
        if node.name in names or follows:
            nodes += state.to_half(node, weights)
        else:
            nodes += state.to_float(node.input)
        nodes.append(node)
    nodes += state.to_float([value.name for value in graph.output])
    used = {name for node in nodes for name in node.input}
    stored = [tensor for tensor in weights.values() if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(stored)
    onnx.checker.check_model(copy)
    return copy


class _Casts:
    """Which tensors exist in half (``T.half``), and which of them in half only."""

    def __init__(self) -> None:
        self._in_half: set[str] = set()
        self.half_only: set[str] = set()

    def to_half(
        self, node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]
    ) -> Iterator[onnx.NodeProto]:
        """Make ``node`` read and write half tensors; yields the casts it needs in front."""
        for index, name in enumerate(node.input):
            if name in weights:
                values: np.ndarray = numpy_helper.to_array(weights[name])
                weights.setdefault(f"{name}.half", rounded(HALF, values, f"{name}.half"))
            elif name not in self._in_half:
                self._in_half.add(name)
                yield _cast(name, f"{name}.half", TensorProto.FLOAT16)
            node.input[index] = f"{name}.half"
        (output,) = node.output
        node.output[0] = f"{output}.half"
        self._in_half.add(output)
        self.half_only.add(output)

    def to_float(self, names: Collection[str]) -> Iterator[onnx.NodeProto]:
        """Yields the casts for those of ``names`` that exist in half only."""
        for name in names:
            if name in self.half_only:
                self.half_only.remove(name)
                yield _cast(f"{name}.half", name, TensorProto.FLOAT)


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=to)
