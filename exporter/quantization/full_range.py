"""All 256 integers for what comes out of a ReLU, in a graph whose integers are symmetric.

A ReLU's output x >= 0 uses 0 to 127 of a symmetric INT8: half of the integers are never met. An
engine takes no zero point, but it need not see one. With the step D and c = 128 D,

    q = clip(round((x - c) / D), -128, 127) = clip(round(x / D), 0, 255) - 128,

so subtracting c in front of the quantizer is the zero point, and the convolution gives it back by
its bias, from the very integers it computes with:

    W^ * (x^ - c) + c sum_i,t W^_oit = W^ * x^.

That is right where every tap of the kernel meets a value of the tensor. Zero padding would stand
for x = c, so the padding moves in front of the subtraction, where zero means zero::

    x -> Pad(0) -> Sub(c) -> QuantizeLinear(D) -> DequantizeLinear -> Conv (no padding, new bias)
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporter.graph import attributes

_HALF = 128


def use_full_range(model: onnx.ModelProto, tensors: Collection[str]) -> onnx.ModelProto:
    """A copy of a Q/DQ graph in which the quantizers of ``tensors`` reach from 0 to 255.

    Each of these is never negative, has scale D for 0 to 255 in ``model``, and one convolution with
    INT8 weights as its only quantized reader.
    """
    if not tensors:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    stored: dict[str, np.ndarray] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in tensors:
            reader = _reader(model, node)
            shift = np.float32(_HALF) * values[node.input[1]]
            nodes += _shifted(node, _padding(reader), shift, stored)
        nodes.append(node)
        source = node.input[0].removesuffix(".dequantized")
        if node.op_type == "Conv" and source != node.input[0] and source in tensors:
            _give_back(node, values, stored[f"{source}.shift"], stored)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in used and t.name not in stored]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in stored.items())
    onnx.checker.check_model(copy)
    return copy


def _reader(model: onnx.ModelProto, quantizer: onnx.NodeProto) -> onnx.NodeProto:
    real = f"{quantizer.input[0]}.dequantized"
    readers: list[onnx.NodeProto] = [node for node in model.graph.node if real in node.input]
    if len(readers) != 1:
        raise ValueError(f"{real} has {len(readers)} readers; its shift belongs to one convolution")
    (reader,) = readers
    return reader


def _padding(conv: onnx.NodeProto) -> list[int]:
    """As ONNX's Pad wants it: begins of all four axes, then ends."""
    top, left, bottom, right = attributes(conv).get("pads", (0, 0, 0, 0))
    return [0, 0, top, left, 0, 0, bottom, right]


def _shifted(
    quantizer: onnx.NodeProto, padding: list[int], shift: np.ndarray, stored: dict[str, np.ndarray]
) -> list[onnx.NodeProto]:
    """What stands in front of the quantizer, which now reads the shifted tensor."""
    source = quantizer.input[0]
    made, last = [], source
    if any(padding):
        last = f"{source}.padded"
        stored[f"{source}.pads"] = np.array(padding, dtype=np.int64)
        made.append(helper.make_node("Pad", [source, f"{source}.pads"], [last], name=last))
    stored[f"{source}.shift"] = np.asarray(shift, dtype=np.float32)
    quantizer.input[0] = f"{source}.shifted"
    made.append(
        helper.make_node(
            "Sub", [last, f"{source}.shift"], [quantizer.input[0]], name=quantizer.input[0]
        )
    )
    return made


def _give_back(
    conv: onnx.NodeProto,
    values: dict[str, np.ndarray],
    shift: np.ndarray,
    stored: dict[str, np.ndarray],
) -> None:
    """Take the padding off a convolution and add what the shift took to its bias."""
    for index, attribute in enumerate(conv.attribute):
        if attribute.name == "pads":
            del conv.attribute[index]
            break
    weight = conv.input[1].removesuffix(".dequantized")
    integers, scales = values[f"{weight}.int8"], values[f"{weight}.scale"]
    sums = integers.sum(axis=(1, 2, 3), dtype=np.int64) * scales.astype(np.float64)
    if len(conv.input) < 3:
        conv.input.append(f"{conv.name}.bias")
    bias = values.get(conv.input[2], np.zeros(len(integers), dtype=np.float32))
    stored[conv.input[2]] = (bias + np.float64(shift) * sums).astype(np.float32)
