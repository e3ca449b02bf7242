"""The numbers of a graph that is a chain, as calibration/ equalizes and rounds them, and back.

What a chain is, :mod:`exporter.quantization.chain_walk` says. A convolution without a bias has the
bias 0: it is given an operand as soon as it needs another one. Likewise the classifier; a MatMul
that has no Add becomes the Gemm of the same product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from calibration.chain import Chain, ChainError, Classifier, ConvStage, Gate
from exporter.errors import InputError
from exporter.graph import attributes
from exporter.quantization.chain_walk import ChainNodes, GateNodes, StageNodes, walk

_Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainChain:
    """``chain`` and the tensors it reads: each convolution's input, then the pooling's.

    ``float_nodes`` stay float whatever the recipe: the gates' convolutions, which see one position
    an image and cost nothing, and the classifier.
    """

    chain: Chain
    boundaries: tuple[str, ...]
    float_nodes: tuple[str, ...] = ()


def read_chain(model: onnx.ModelProto) -> PlainChain | None:
    """The chain that ``model`` is, or None where it is anything else.

    Raises:
        InputError: if it is one, but with weights that are not finite.
    """
    nodes = walk(model)
    if nodes is None:
        return None
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    try:
        chain = Chain(
            stages=tuple(_stage(stage, weights) for stage in nodes.stages),
            classifier=_classifier(nodes, weights),
        )
    except ChainError as error:
        raise InputError(f"the network cannot be quantized: {error}") from error
    gates = [stage.gate for stage in nodes.stages if stage.gate is not None]
    return PlainChain(
        chain=chain,
        boundaries=(
            *(stage.conv.input[0] for stage in nodes.stages),
            nodes.stages[-1].output,
        ),
        float_nodes=(
            *(conv.name for gate in gates for conv in (gate.down, gate.up)),
            nodes.classifier.name,
        ),
    )


def _stage(nodes: StageNodes, weights: _Weights) -> ConvStage:
    found = attributes(nodes.conv)
    top, left, bottom, right = found.get("pads", (0, 0, 0, 0))
    weight, bias = _parameters(nodes.conv, weights)
    return ConvStage(
        name=nodes.conv.name,
        weight=weight,
        bias=bias,
        groups=found.get("group", 1),
        stride=tuple(found.get("strides", (1, 1))),
        padding=(top, left, bottom, right),
        dilation=tuple(found.get("dilations", (1, 1))),
        gate=_gate(nodes.gate, weights) if nodes.gate is not None else None,
        relu=nodes.relu,
    )


def _gate(nodes: GateNodes, weights: _Weights) -> Gate:
    (down, down_bias), (up, up_bias) = (
        _parameters(node, weights) for node in (nodes.down, nodes.up)
    )
    return Gate(
        down=down[:, :, 0, 0],
        down_bias=down_bias,
        up=up[:, :, 0, 0],
        up_bias=up_bias,
        after_relu=nodes.after_relu,
    )


def _parameters(conv: onnx.NodeProto, weights: _Weights) -> tuple[np.ndarray, np.ndarray]:
    weight = weights[conv.input[1]].astype(np.float64)
    bias = weights[conv.input[2]] if len(conv.input) > 2 else np.zeros(len(weight))
    return weight, bias.astype(np.float64)


def _classifier(nodes: ChainNodes, weights: _Weights) -> Classifier:
    weight = weights[nodes.classifier.input[1]].astype(np.float64)
    if not _is_transposed(nodes.classifier):
        weight = np.ascontiguousarray(weight.T)
    if nodes.add is not None:
        bias = weights[nodes.add.input[_bias_place(nodes)]]
    elif len(nodes.classifier.input) > 2:
        bias = weights[nodes.classifier.input[2]]
    else:
        bias = np.zeros(len(weight))
    return Classifier(weight=weight, bias=bias.astype(np.float64))


def _is_transposed(classifier: onnx.NodeProto) -> bool:
    """Whether the weight is ``[classes, C]``."""
    return bool(attributes(classifier).get("transB", 0))


def _bias_place(nodes: ChainNodes) -> int:
    assert nodes.add is not None
    return 1 if nodes.add.input[0] == nodes.classifier.output[0] else 0


def with_chain(
    model: onnx.ModelProto,
    chain: Chain,
    biases: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """A copy of ``model`` with the weights of ``chain``, and with ``biases`` where given.

    Raises:
        ValueError: if ``model`` is no chain, or one of other stages.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = walk(copy)
    names = [stage.name for stage in chain.stages]
    if nodes is None or [stage.conv.name for stage in nodes.stages] != names:
        raise ValueError("the graph does not have the stages of the chain")
    writer = _Writer(copy)
    for site, stage in zip(nodes.stages, chain.stages, strict=True):
        writer.convolution(site.conv, stage.weight, (biases or {}).get(stage.name, stage.bias))
        if site.gate is not None and stage.gate is not None:
            gate = stage.gate
            writer.convolution(site.gate.down, gate.down[:, :, None, None], gate.down_bias)
            writer.convolution(site.gate.up, gate.up[:, :, None, None], gate.up_bias)
    _write_classifier(writer, nodes, chain.classifier)
    writer.finish()
    return copy


def _write_classifier(writer: _Writer, nodes: ChainNodes, found: Classifier) -> None:
    node = nodes.classifier
    weight = found.weight if _is_transposed(node) else found.weight.T
    writer.operand(node, 1, weight)
    if nodes.add is not None:
        writer.operand(nodes.add, _bias_place(nodes), found.bias)
        return
    if node.op_type == "MatMul" and np.any(found.bias):
        # Of matrices, which is all that a chain's MatMul reads.
        node.op_type = "Gemm"
    writer.operand(node, 2, found.bias)


class _Writer:
    """Replaces the constants of a graph's nodes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._values: dict[str, np.ndarray] = {}

    def convolution(self, node: onnx.NodeProto, weight: np.ndarray, bias: np.ndarray) -> None:
        self.operand(node, 1, weight)
        self.operand(node, 2, bias)

    def operand(self, node: onnx.NodeProto, place: int, value: np.ndarray) -> None:
        """Replace an operand; a bias that is absent stays so while it would be 0."""
        if place < len(node.input):
            self._values[node.input[place]] = value
        elif np.any(value):
            added = self._model.graph.initializer.add()
            added.name = f"{node.name}.bias"
            node.input.append(added.name)
            self._values[added.name] = value

    def finish(self) -> None:
        for tensor in self._model.graph.initializer:
            if tensor.name in self._values:
                array = np.ascontiguousarray(self._values[tensor.name], dtype=np.float32)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
