"""Questions about an ONNX graph that several stages ask."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import onnx
from onnx import version_converter

from exporter.errors import InputError

QUANTIZED_OPS = ("Conv", "Gemm", "MatMul")
"""The operators that have INT8 kernels."""


def quantizable(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that INT8 can compute: an activation times a constant weight.

    A MatMul's weight is a matrix; a product of two activations, or with a stack of matrices, is not
    among them.
    """
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return [
        node
        for node in model.graph.node
        if node.op_type in QUANTIZED_OPS
        and node.input[0] not in ranks
        and node.input[1] in ranks
        and (node.op_type != "MatMul" or ranks[node.input[1]] == 2)
    ]


def label(node: onnx.NodeProto) -> str:
    """A node's name, or what it computes where it has none."""
    return node.name or str(node.output[0])


def boundary_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """What an INT8 kernel reads: the first input of these nodes, in order, each once."""
    return tuple(dict.fromkeys(node.input[0] for node in quantizable(model)))


def pointwise_convolutions(model: onnx.ModelProto) -> int:
    """How many Conv nodes have a constant 1x1 kernel."""
    kernels = {tensor.name: list(tensor.dims)[2:] for tensor in model.graph.initializer}
    return sum(n.op_type == "Conv" and kernels.get(n.input[1]) == [1, 1] for n in model.graph.node)


def graph_sha256(model: onnx.ModelProto) -> str:
    """Hash of the graph as a file of it would have."""
    return hashlib.sha256(model.SerializeToString()).hexdigest()


def require_nodes(names: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Raises InputError with the ``known`` nodes of this ``kind``, unless ``names`` are of them."""
    listed = sorted(set(known))
    if unknown := sorted(set(names).difference(listed)):
        raise InputError(f"no {kind} is called {', '.join(unknown)}; known: {', '.join(listed)}")


def in_opset(model: onnx.ModelProto, oldest: int) -> onnx.ModelProto:
    """A copy of ``model`` in opset ``oldest``, or in its own if that is newer.

    Raises:
        ValueError: with the reason, if an operator has no such form.
    """
    own = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if max(own, default=0) >= oldest:
        return copy
    try:
        copy = version_converter.convert_version(copy, oldest)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise ValueError(str(error).strip().splitlines()[0]) from error
    needed = onnx.helper.find_min_ir_version_for(copy.opset_import)
    copy.ir_version = max(copy.ir_version, needed)
    return copy


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes that ``node`` carries, by name; defaults are not filled in."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of ``model`` whose only outputs are the tensors ``names``."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return exposed
