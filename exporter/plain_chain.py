"""The graph of a plain RepVGG as the chain that calibration/ equalizes and rounds, and back.

Only a graph that is nothing but Conv, Relu pairs, GlobalAveragePool, Flatten and Gemm is a chain:
there every per-channel rescaling is exact, and every stage's input has one reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from calibration.chain import Chain, ChainError, Classifier, ConvStage
from exporter.errors import InputError
from exporter.graph import attributes

_HEAD = ["GlobalAveragePool", "Flatten", "Gemm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainChain:
    """``chain`` and the tensors it reads: each convolution's input, then the pooling's."""

    chain: Chain
    boundaries: tuple[str, ...]


def read_chain(model: onnx.ModelProto) -> PlainChain | None:
    """The chain that ``model`` is, or None where it is anything else."""
    nodes = list(model.graph.node)
    body, head = nodes[:-3], nodes[-3:]
    ops = [node.op_type for node in body]
    if ops != ["Conv", "Relu"] * (len(body) // 2) or [n.op_type for n in head] != _HEAD or not body:
        return None
    gemm = attributes(head[-1])
    if gemm.get("transB", 0) != 1 or gemm.get("alpha", 1.0) != 1.0 or gemm.get("beta", 1.0) != 1.0:
        return None
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    convolutions = [node for node in body if node.op_type == "Conv"]
    try:
        stages = tuple(_stage(node, weights) for node in convolutions)
        weight, bias = (weights[name].astype(np.float64) for name in head[-1].input[1:3])
        chain = Chain(stages=stages, classifier=Classifier(weight=weight, bias=bias))
    except ChainError as error:
        raise InputError(f"the network cannot be quantized: {error}") from error
    boundaries = (*(node.input[0] for node in convolutions), head[0].input[0])
    return PlainChain(chain=chain, boundaries=boundaries)


def _stage(node: onnx.NodeProto, weights: Mapping[str, np.ndarray]) -> ConvStage:
    found = attributes(node)
    top, left, bottom, right = found.get("pads", (0, 0, 0, 0))
    return ConvStage(
        name=node.name,
        weight=weights[node.input[1]].astype(np.float64),
        bias=weights[node.input[2]].astype(np.float64),
        groups=found.get("group", 1),
        stride=tuple(found.get("strides", (1, 1))),
        padding=(top, left, bottom, right),
        dilation=tuple(found.get("dilations", (1, 1))),
    )


def with_chain(
    model: onnx.ModelProto,
    chain: Chain,
    biases: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """A copy of ``model`` with the weights of ``chain``, and with ``biases`` where given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    values: dict[str, np.ndarray] = {}
    nodes = {node.name: node for node in copy.graph.node}
    for stage in chain.stages:
        _, weight, bias = nodes[stage.name].input
        values[weight] = stage.weight
        values[bias] = (biases or {}).get(stage.name, stage.bias)
    _, weight, bias = copy.graph.node[-1].input
    values |= {weight: chain.classifier.weight, bias: chain.classifier.bias}
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            array = np.ascontiguousarray(values[tensor.name], dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy
