"""Float graph + calibration table -> explicit Q/DQ graph, in INT8 or FP8.

ONNX operators QuantizeLinear and DequantizeLinear. In front of every quantized Conv, Gemm or MatMul
the activation goes through ``DQ(Q(x))`` with one scale for the tensor, and the weight is stored in
8 bits and dequantized per output channel::

    x^ = s_x clip(round(x / s_x), -128, 127)        W^_o = s_w,o W_int8,o         opset 13
    x^ = s_x E4M3(x / s_x)                          W^_o = s_w,o W_fp8,o          opset 19

E4M3 is the float of 4 bits exponent and 3 bits mantissa, without infinities, that ends at 448 (P.
Micikevicius et al., "FP8 Formats for Deep Learning", 2022). Values beyond saturate.

There is nothing between Conv and Relu, so that an engine can fuse them. The activation's scale and
zero point are 0-d scalars: with shape ``[1]`` TensorRT-RTX builds the same graph and runs no
convolution in INT8. Biases stay float32, and so does every other operator (ConvTranspose, Add,
Concat, Resize, ...). A tensor that several nodes read is quantized once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration.table import CalibrationTable
from calibration.threshold import LEVELS, quantize_weights, tensor_scale, weight_scales
from exporter.errors import GateFailedError, InputError
from exporter.graph import attributes, in_opset, quantizable, require_nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBits:
    """A type of 8 bits: its largest number, and the ONNX opset whose Q/DQ know it."""

    name: str
    code: int
    largest: float
    opset: int


INT8 = EightBits(name="int8", code=TensorProto.INT8, largest=LEVELS, opset=13)
FP8 = EightBits(name="fp8", code=TensorProto.FLOAT8E4M3FN, largest=448.0, opset=19)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedWeight:
    """A weight that is 8 bits already, output channel first, and its float32 scales ``[O]``."""

    integers: npt.NDArray[Any]
    scales: npt.NDArray[np.float32]


def quantize(
    model: onnx.ModelProto,
    table: CalibrationTable,
    *,
    kind: EightBits = INT8,
    keep_float: Collection[str] = (),
    rounded: Mapping[str, RoundedWeight] | None = None,
    per_tensor_weights: bool = False,
) -> onnx.ModelProto:
    """Return the Q/DQ copy of a float graph.

    ``keep_float`` names nodes that stay float. ``rounded`` holds integers by weight name; other
    weights are rounded to nearest, by a scale for each output channel or for the whole tensor.

    Raises:
        InputError: if ``keep_float`` names no Conv or Gemm of the graph, or the table has no scale
            for a tensor that needs one.
        GateFailedError: if an operator of the graph is not in the opset of ``kind``.
    """
    candidates = {node.output[0]: node.name for node in quantizable(model)}
    require_nodes(keep_float, candidates.values(), "Conv or Gemm")
    try:
        quantized = in_opset(model, kind.opset)
    except ValueError as error:
        raise GateFailedError(f"the graph has no {kind.name} form: {error}") from error
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    initializers = {tensor.name: tensor for tensor in quantized.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    dequantized: set[str] = set()
    for node in quantized.graph.node:
        if node.output[0] in candidates and node.name not in keep_float:
            source, weight = node.input[0], node.input[1]
            if source not in dequantized:
                nodes += _activation_nodes(kind, source, table, initializers)
            if weight not in dequantized:
                axis = _channel_axis(node)
                stored = (rounded or {}).get(weight) or _nearest(
                    kind, weights[weight], axis, per_tensor_weights=per_tensor_weights
                )
                nodes.append(
                    _weight_node(
                        kind, weight, axis, stored, initializers, shared=per_tensor_weights
                    )
                )
            dequantized |= {source, weight}
            node.input[0], node.input[1] = f"{source}.dequantized", f"{weight}.dequantized"
        nodes.append(node)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in initializers.items() if name in used]
    del quantized.graph.node[:], quantized.graph.initializer[:], quantized.graph.value_info[:]
    quantized.graph.node.extend(nodes)
    quantized.graph.initializer.extend(kept)
    onnx.checker.check_model(quantized)
    return quantized


def _activation_nodes(
    kind: EightBits,
    source: str,
    table: CalibrationTable,
    initializers: dict[str, onnx.TensorProto],
) -> list[onnx.NodeProto]:
    if source not in table.activation_scales:
        raise InputError(f"the calibration table has no scale for {source}")
    scale, zero = f"{source}.scale", f"{source}.zero_point"
    # np.array(x) without a shape: 0-d, see the module's docstring.
    scalar = np.array(table.activation_scales[source], dtype=np.float32)
    initializers[scale] = numpy_helper.from_array(scalar, scale)
    initializers[zero] = numpy_helper.from_array(np.array(0, dtype=_dtype(kind)), zero)
    integer, real = f"{source}.quantized", f"{source}.dequantized"
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [integer], name=f"{source}.q"),
        helper.make_node("DequantizeLinear", [integer, scale, zero], [real], name=f"{source}.dq"),
    ]


def _dtype(kind: EightBits) -> np.dtype[Any]:
    return helper.tensor_dtype_to_np_dtype(kind.code)


def _nearest(
    kind: EightBits, weight: npt.NDArray[np.float32], axis: int, *, per_tensor_weights: bool
) -> RoundedWeight:
    by_channel = np.moveaxis(weight, axis, 0)
    scales = (tensor_scale if per_tensor_weights else weight_scales)(by_channel)
    if kind is INT8:
        return RoundedWeight(integers=quantize_weights(by_channel, scales), scales=scales)
    scales = (scales * (LEVELS / kind.largest)).astype(np.float32)
    steps = by_channel / scales.reshape(-1, *(1,) * (by_channel.ndim - 1))
    return RoundedWeight(integers=steps.astype(_dtype(kind)), scales=scales)


def _weight_node(
    kind: EightBits,
    name: str,
    axis: int,
    weight: RoundedWeight,
    initializers: dict[str, onnx.TensorProto],
    *,
    shared: bool,
) -> onnx.NodeProto:
    """``shared``: the scales are all the same, and one of them is stored, as a scalar."""
    integers, scales = np.moveaxis(weight.integers, 0, axis), weight.scales
    if shared:
        scales = np.array(scales[0], dtype=np.float32)
    stored, scale, zero = f"{name}.{kind.name}", f"{name}.scale", f"{name}.zero_point"
    initializers[stored] = numpy_helper.from_array(np.ascontiguousarray(integers), stored)
    initializers[scale] = numpy_helper.from_array(scales, scale)
    initializers[zero] = numpy_helper.from_array(np.zeros(scales.shape, dtype=_dtype(kind)), zero)
    return helper.make_node(
        "DequantizeLinear",
        [stored, scale, zero],
        [f"{name}.dequantized"],
        name=f"{name}.dq",
        axis=None if shared else axis,
    )


def _channel_axis(node: onnx.NodeProto) -> int:
    """The output-channel axis of a Conv's or Gemm's weight."""
    transposed = attributes(node).get("transB", 0)
    return 0 if node.op_type == "Conv" or transposed else 1
