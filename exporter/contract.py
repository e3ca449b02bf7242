"""The graph contract: what must be in the ONNX graph, and what may be there beside it.

A plain RepVGG is, node by node:

1. ``n`` pairs Conv, Relu in one chain, ``n`` and all weight shapes as the variant's table says;
2. every Conv is 3x3, pad 1 on all sides, stride 1 or 2 as the table says, dilation 1, with bias;
3. then GlobalAveragePool, Flatten (axis 1), Gemm (``x W + b``), and nothing else;
4. one input and one output, the two ends of the chain.

In any other network, every fused block is exactly one Conv with bias, known by the name of its
weight, with the block's kernel, stride, padding, dilation and groups, and no BatchNormalization
behind it. All other nodes are allowed, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from exporter.errors import GateFailedError
from exporter.graph import attributes, label
from models.variants import ConvLayer, Variant

HEAD = ("GlobalAveragePool", "Flatten", "Gemm")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractVerdict:
    """How many convolutions the graph has and every way in which it breaks the contract.

    ``blocks`` of the convolutions are fused blocks; ``extras`` counts the other nodes by operator,
    where the contract allows any.
    """

    convolutions: int
    violations: tuple[str, ...]
    blocks: int = 0
    extras: Mapping[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it."""
        return {
            "verdict": "pass" if self.passed else "fail",
            "convolutions": self.convolutions,
            "blocks": self.blocks,
            "allowed_extras": dict(self.extras),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockConvolution:
    """The convolution that one fused block must be; ``weight`` is its initializer's name."""

    weight: str
    weight_shape: tuple[int, ...]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]
    groups: int


def judge(model: onnx.ModelProto, variant: Variant, num_classes: int) -> ContractVerdict:
    """Compare the float graph ``model`` with what ``variant`` must look like."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    violations = [
        f"the graph has {len(values)} {kind}s, expected 1"
        for kind, values in (("input", model.graph.input), ("output", model.graph.output))
        if len(values) != 1
    ]
    expected = [op for _ in variant.layers for op in ("Conv", "Relu")] + list(HEAD)
    found = [node.op_type for node in nodes]
    if found != expected:
        violations.append(_first_difference(nodes, expected))
    violations += _chain_breaks(model)
    convolutions = [node for node in nodes if node.op_type == "Conv"]
    for node, layer in zip(convolutions, variant.layers, strict=False):
        violations += _conv_violations(node, layer, shapes)
    for node in nodes:
        if node.op_type == "Flatten" and attributes(node).get("axis", 1) != 1:
            violations.append(f"node {label(node)}: axis is {attributes(node)['axis']}, expected 1")
        if node.op_type == "Gemm":
            violations += _classifier_violations(node, variant, num_classes, shapes)
    return ContractVerdict(
        convolutions=len(convolutions),
        violations=tuple(violations),
        blocks=min(len(convolutions), len(variant.layers)),
    )


def require(model: onnx.ModelProto, variant: Variant, num_classes: int) -> ContractVerdict:
    """:func:`judge`, and raise GateFailedError naming the first offending node unless it passed."""
    return _required(judge(model, variant, num_classes), f"is not a plain RepVGG-{variant.name}")


def judge_blocks(model: onnx.ModelProto, blocks: Mapping[str, BlockConvolution]) -> ContractVerdict:
    """Find every fused block, by name, in the float graph ``model``."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    violations: list[str] = []
    own: set[str] = set()
    for name, block in blocks.items():
        nodes = [node for node in convolutions if block.weight in node.input[1:2]]
        if len(nodes) != 1:
            where = f" ({', '.join(map(label, nodes))})" if nodes else ""
            violations.append(f"block {name} is {len(nodes)} convolutions{where}, expected 1")
        for node in nodes:
            violations += _block_violations(name, node, block, shapes)
            own.add(node.output[0])
    for node in model.graph.node:
        if node.op_type == "BatchNormalization" and node.input[0] in own:
            violations.append(f"node {label(node)} is a BatchNormalization behind a fused block")
    extras = Counter(
        node.op_type
        for node in model.graph.node
        if node.output[0] not in own and not (node.op_type == "Relu" and node.input[0] in own)
    )
    return ContractVerdict(
        convolutions=len(convolutions),
        violations=tuple(violations),
        blocks=len(blocks),
        extras=dict(sorted(extras.items())),
    )


def require_blocks(
    model: onnx.ModelProto, blocks: Mapping[str, BlockConvolution], title: str
) -> ContractVerdict:
    """:func:`judge_blocks`, and raise GateFailedError naming the first block that is not there."""
    return _required(judge_blocks(model, blocks), f"is not the reparameterized {title}")


def _required(verdict: ContractVerdict, words: str) -> ContractVerdict:
    if not verdict.passed:
        more = f" (and {len(verdict.violations) - 1} more)" if len(verdict.violations) > 1 else ""
        raise GateFailedError(f"the graph {words}: {verdict.violations[0]}{more}")
    return verdict


def _first_difference(nodes: list[onnx.NodeProto], expected: list[str]) -> str:
    for node, wanted in zip(nodes, expected, strict=False):
        if node.op_type != wanted:
            return f"node {label(node)} is {node.op_type}, expected {wanted}"
    if len(nodes) > len(expected):
        extra = nodes[len(expected)]
        return f"node {label(extra)} ({extra.op_type}) is one too many"
    return f"the graph ends before {expected[len(nodes)]} ({len(nodes)} of {len(expected)} nodes)"


def _chain_breaks(model: onnx.ModelProto) -> list[str]:
    """A plain network is one chain: each node reads what the one before it wrote."""
    breaks = []
    current = model.graph.input[0].name if model.graph.input else ""
    for node in model.graph.node:
        if not node.input or node.input[0] != current:
            breaks.append(f"node {label(node)} does not read {current}")
        current = node.output[0]
    outputs = [value.name for value in model.graph.output]
    if outputs and outputs[0] != current:
        breaks.append(f"the output {outputs[0]} is not the last node's")
    return breaks


def _block_violations(
    name: str, node: onnx.NodeProto, block: BlockConvolution, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    found = attributes(node)
    weight, bias = _parameter_shapes(node, shapes)
    kernel = list(block.weight_shape[2:])
    checks: list[tuple[str, Any, Any]] = [
        ("weight shape", weight, block.weight_shape),
        ("bias shape", bias, block.weight_shape[:1]),
        ("kernel_shape", found.get("kernel_shape", kernel), kernel),
        ("pads", found.get("pads", [0, 0, 0, 0]), list(block.pads)),
        ("strides", found.get("strides", [1, 1]), list(block.strides)),
        ("dilations", found.get("dilations", [1, 1]), list(block.dilations)),
        ("group", found.get("group", 1), block.groups),
        ("auto_pad", found.get("auto_pad", b"NOTSET"), b"NOTSET"),
    ]
    return [f"block {name}: {words}" for words in _differences(node, checks)]


def _conv_violations(
    node: onnx.NodeProto, layer: ConvLayer, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    found_attributes = attributes(node)
    weight, bias = _parameter_shapes(node, shapes)
    checks: list[tuple[str, Any, Any]] = [
        ("weight shape", weight, layer.weight_shape),
        ("bias shape", bias, (layer.out_channels,)),
        ("kernel_shape", found_attributes.get("kernel_shape", [3, 3]), [3, 3]),
        ("pads", found_attributes.get("pads", [0, 0, 0, 0]), [1, 1, 1, 1]),
        ("strides", found_attributes.get("strides", [1, 1]), [layer.stride] * 2),
        ("dilations", found_attributes.get("dilations", [1, 1]), [1, 1]),
        ("group", found_attributes.get("group", 1), layer.groups),
        ("auto_pad", found_attributes.get("auto_pad", b"NOTSET"), b"NOTSET"),
    ]
    return _differences(node, checks)


def _classifier_violations(
    node: onnx.NodeProto, variant: Variant, num_classes: int, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    found_attributes = attributes(node)
    weight, bias = _parameter_shapes(node, shapes)
    wanted = (num_classes, variant.feature_channels)
    checks: list[tuple[str, Any, Any]] = [
        ("weight shape", weight, wanted if found_attributes.get("transB", 0) else wanted[::-1]),
        ("bias shape", bias, (num_classes,)),
        ("transA", found_attributes.get("transA", 0), 0),
        ("alpha", found_attributes.get("alpha", 1.0), 1.0),
        ("beta", found_attributes.get("beta", 1.0), 1.0),
    ]
    return _differences(node, checks)


def _parameter_shapes(
    node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]
) -> list[tuple[int, ...] | None]:
    """Weight and bias shape; None for a parameter that is absent or computed."""
    names = [*node.input[1:3], "", ""][:2]
    return [shapes.get(name) for name in names]


def _differences(node: onnx.NodeProto, checks: list[tuple[str, Any, Any]]) -> list[str]:
    return [
        f"node {label(node)}: {what} is {found}, expected {wanted}"
        for what, found, wanted in checks
        if found != wanted
    ]
