"""Words in the graphs for whoever opens them in a viewer, and for programs that get only the ONNX.

Documentation strings and ``metadata_props`` change no result. The float graph gets them before it
is calibrated, since calibration tables are bound to its bytes; what is made of it inherits them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import onnx
from onnx import numpy_helper

from calibration.table import CalibrationTable
from exporter.graph import attributes

PRODUCER = "repvgg-exporter"
_HEAD = {
    "GlobalAveragePool": "average of each channel over height and width",
    "Flatten": "from [batch, channels, 1, 1] to [batch, channels]",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a graph says of itself.

    ``metadata`` are short texts by key. ``blocks`` maps the name of a fused convolution's weight to
    the block that it replaces.
    """

    title: str
    metadata: Mapping[str, str]
    blocks: Mapping[str, str] = field(default_factory=dict)


def annotate(model: onnx.ModelProto, description: Description) -> onnx.ModelProto:
    """A copy of the float graph ``model`` that says what it is, node by node."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    graph.name = description.title
    convolutions = sum(node.op_type == "Conv" for node in graph.node)
    count = len(description.blocks)
    fused = f", {count} of them fused RepVGG blocks" if count else ""
    graph.doc_string = f"{description.title}, deploy form: {convolutions} convolutions{fused}"
    # No version: a table made by an earlier release stays bound to the same bytes.
    copy.producer_name, copy.producer_version = PRODUCER, ""
    onnx.helper.set_model_props(copy, dict(description.metadata))
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        node.doc_string = _sentence(node, weights, description.blocks)
    return copy


def annotate_precision(
    graph: onnx.ModelProto,
    precision: str,
    *,
    table: CalibrationTable | None = None,
    kept: Collection[str] = (),
) -> onnx.ModelProto:
    """A copy of the graph that the builder parses, which says what its data types are.

    ``table`` holds the scales of a quantized graph; the nodes ``kept`` are not quantized.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    copy.graph.doc_string = f"{graph.graph.doc_string}; {precision}".lstrip("; ")
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    metadata["precision"] = precision
    if table is not None:
        metadata["recipe"] = table.method
        metadata["calibration_sha256"] = table.data_sha256
        metadata["calibration_images"] = str(table.image_count)
    onnx.helper.set_model_props(copy, metadata)
    for node in copy.graph.node:
        if node.op_type == "QuantizeLinear" and table is not None:
            node.doc_string = _activation_sentence(node, table)
        elif node.name in kept:
            node.doc_string = f"{node.doc_string}; not quantized".lstrip("; ")
    _describe_weights(copy.graph)
    return copy


def _sentence(
    node: onnx.NodeProto, weights: Mapping[str, list[int]], blocks: Mapping[str, str]
) -> str:
    if node.op_type == "Conv" and node.input[1] in weights:
        words = _convolution(node, weights[node.input[1]])
        block = blocks.get(node.input[1])
        return f"{words}; all branches of block {block} in one kernel" if block else words
    if node.op_type == "Gemm" and node.input[1] in weights:
        outputs, inputs = weights[node.input[1]]
        if not attributes(node).get("transB", 0):
            inputs, outputs = outputs, inputs
        return f"fully connected, {inputs} -> {outputs}"
    return _HEAD.get(node.op_type, "")


def _convolution(node: onnx.NodeProto, shape: list[int]) -> str:
    """``3x3 convolution, 48 -> 96 channels, stride 2``."""
    given = attributes(node)
    groups = int(given.get("group", 1))
    size = "x".join(map(str, shape[2:]))
    words = f"{size} convolution, {shape[1] * groups} -> {shape[0]} channels"
    for name, word in (("strides", "stride"), ("dilations", "dilation")):
        steps = list(given.get(name, (1,)))
        if set(steps) != {1}:
            same = len(set(steps)) == 1
            words += f", {word} {steps[0] if same else 'x'.join(map(str, steps))}"
    return words + (f", {groups} groups" if groups > 1 else "")


def _activation_sentence(node: onnx.NodeProto, table: CalibrationTable) -> str:
    source = node.input[0]
    found = table.ranges.get(source)
    if found is None:
        return ""
    return (
        f"scale {table.activation_scales[source]:.6g}; observed {found.minimum:.4g} to "
        f"{found.maximum:.4g}, clipped at {found.threshold:.4g}"
    )


def _describe_weights(graph: onnx.GraphProto) -> None:
    """How many scales a stored integer weight has."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            scales = numpy_helper.to_array(stored[node.input[1]])
            each = "one scale" if scales.ndim == 0 else f"{scales.size} scales, one a channel"
            node.doc_string = f"weight of 8 bits, {each}: {scales.min():.3g} to {scales.max():.3g}"
