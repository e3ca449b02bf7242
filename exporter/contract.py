"""The graph contract: only 3x3 Conv + ReLU, then pooling, flatten and the classifier.

What a plain RepVGG must be in ONNX, node by node:

1. ``n`` pairs Conv, Relu in one chain, ``n`` and all weight shapes as the variant's table says;
2. every Conv is 3x3, pad 1 on all sides, stride 1 or 2 as the table says, dilation 1, with bias;
3. then GlobalAveragePool, Flatten (axis 1), Gemm (``x W + b``), and nothing else;
4. one input and one output, the two ends of the chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx

from exporter.errors import GateFailedError
from exporter.graph import attributes
from models.variants import ConvLayer, Variant

HEAD = ("GlobalAveragePool", "Flatten", "Gemm")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractVerdict:
    """How many convolutions the graph has and every way in which it breaks the contract."""

    convolutions: int
    violations: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.violations


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
            violations.append(
                f"node {_label(node)}: axis is {attributes(node)['axis']}, expected 1"
            )
        if node.op_type == "Gemm":
            violations += _classifier_violations(node, variant, num_classes, shapes)
    return ContractVerdict(convolutions=len(convolutions), violations=tuple(violations))


def require(model: onnx.ModelProto, variant: Variant, num_classes: int) -> ContractVerdict:
    """:func:`judge`, and raise GateFailedError naming the first offending node unless it passed."""
    verdict = judge(model, variant, num_classes)
    if not verdict.passed:
        more = f" (and {len(verdict.violations) - 1} more)" if len(verdict.violations) > 1 else ""
        raise GateFailedError(
            f"the graph is not a plain RepVGG-{variant.name}: {verdict.violations[0]}{more}"
        )
    return verdict


def _first_difference(nodes: list[onnx.NodeProto], expected: list[str]) -> str:
    for node, wanted in zip(nodes, expected, strict=False):
        if node.op_type != wanted:
            return f"node {_label(node)} is {node.op_type}, expected {wanted}"
    if len(nodes) > len(expected):
        extra = nodes[len(expected)]
        return f"node {_label(extra)} ({extra.op_type}) is one too many"
    return f"the graph ends before {expected[len(nodes)]} ({len(nodes)} of {len(expected)} nodes)"


def _chain_breaks(model: onnx.ModelProto) -> list[str]:
    """A plain network is one chain: each node reads what the one before it wrote."""
    breaks = []
    current = model.graph.input[0].name if model.graph.input else ""
    for node in model.graph.node:
        if not node.input or node.input[0] != current:
            breaks.append(f"node {_label(node)} does not read {current}")
        current = node.output[0]
    outputs = [value.name for value in model.graph.output]
    if outputs and outputs[0] != current:
        breaks.append(f"the output {outputs[0]} is not the last node's")
    return breaks


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
        f"node {_label(node)}: {what} is {found}, expected {wanted}"
        for what, found, wanted in checks
        if found != wanted
    ]


def _label(node: onnx.NodeProto) -> str:
    return node.name or str(node.output[0])
