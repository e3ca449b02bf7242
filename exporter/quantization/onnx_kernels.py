"""Convolutions of calibration/ by ONNX Runtime: one node a graph, several times faster than numpy.

A constant weight lets ONNX Runtime choose its blocked layout, so every stage gets a graph. It runs
on one thread: calibration/ works on several images at a time.
The transposed convolution of a stage is

    stride 1       a convolution with the kernel turned by 180 degrees, inputs and outputs swapped,
                   and padding ``(k - 1) dilation - padding``;
    other strides  ConvTranspose, whose output padding adds the input's rows that no patch reached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration.chain import Array, ConvStage, Float64Array
from calibration.convolution import (
    Convolution,
    FloatArray,
    Folding,
    Int8Array,
    channel_first,
    fold,
)
from exporter.running.onnx_runner import OnnxRunner

_OPSET = 17
_IR_VERSION = 8
# |q| <= 128: 32-bit sums of fewer than 2^17 products are exact.
_EXACT = 1 << 16
_KINDS: tuple[type[np.uint8 | np.int8], ...] = (np.uint8, np.int8)


class OnnxKernels:
    """:class:`calibration.convolution.Kernels` by ONNX Runtime."""

    def __init__(self) -> None:
        self._products = {kind: _multiplication(kind) for kind in _KINDS}

    def products(self, left: Int8Array, right: Int8Array) -> Float64Array:
        # What a ReLU leaves is positive, and there is no fast kernel for two signed factors.
        kind = np.uint8 if left.min(initial=0) >= 0 else np.int8
        found = np.zeros((left.shape[0], left.shape[1], right.shape[2]))
        for start in range(0, left.shape[2], _EXACT):
            part = slice(start, start + _EXACT)
            factors = left[:, :, part].view(kind), right[:, part]
            found += self._products[kind](*factors)
        return found

    def convolution(self, stage: ConvStage) -> Convolution:
        return _compiled("Conv", stage, stage.weight, pads=stage.padding)

    def folding(self, stage: ConvStage) -> Folding:
        reach = _reach(stage)
        before = [r - p for r, p in zip(reach, stage.padding[:2], strict=True)]
        behind = [r - p for r, p in zip(reach, stage.padding[2:], strict=True)]
        if stage.stride == (1, 1) and min(before + behind) >= 0:
            run = _compiled("Conv", stage, _turned(stage), pads=(*before, *behind))
            return lambda gradient, _shape: run(gradient)
        return partial(_fold, stage)


def _reach(stage: ConvStage) -> list[int]:
    """How far a kernel's last tap is from its first, in rows and in columns."""
    taps = zip(stage.weight.shape[2:], stage.dilation, strict=True)
    return [(kernel - 1) * gap for kernel, gap in taps]


def _turned(stage: ConvStage) -> Array:
    """``[I, O / g, kh, kw]``: outputs and inputs swapped, the kernel turned by 180 degrees."""
    outputs = stage.out_channels // stage.groups
    grouped = stage.weight.reshape(stage.groups, outputs, *stage.weight.shape[1:])
    turned = grouped.swapaxes(1, 2)[..., ::-1, ::-1]
    return turned.reshape(stage.in_channels, outputs, *stage.weight.shape[2:])


def _fold(stage: ConvStage, gradient: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """By ConvTranspose, for one size of input; by numpy where more than a stride is missing."""
    reach = _reach(stage)
    missing = [
        shape[2 + axis]
        + stage.padding[axis]
        + stage.padding[2 + axis]
        - ((gradient.shape[2 + axis] - 1) * stage.stride[axis] + reach[axis] + 1)
        for axis in (0, 1)
    ]
    if any(m >= step for m, step in zip(missing, stage.stride, strict=True)):
        return fold(stage, gradient, shape)
    run = _compiled(
        "ConvTranspose", stage, stage.weight, pads=stage.padding, output_padding=missing
    )
    return run(gradient)


def _compiled(op: str, stage: ConvStage, weight: Array, **attributes: Any) -> Convolution:
    """``op`` on channel-first tensors, with the weight as a constant."""
    node = helper.make_node(
        op,
        ["x", "weight"],
        ["y"],
        strides=stage.stride,
        dilations=stage.dilation,
        group=stage.groups,
        **attributes,
    )
    constant = numpy_helper.from_array(np.ascontiguousarray(weight, dtype=np.float32), "weight")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", None, None, None])
    runner = _runner(node, [x], TensorProto.FLOAT, [constant])
    return lambda x: channel_first(runner(np.ascontiguousarray(channel_first(x))))


def _multiplication(kind: type[np.uint8 | np.int8]) -> Callable[[Array, Array], Array]:
    """Products of integers, the left ones of ``kind``, the right ones signed."""
    types = {"left": np.dtype(kind), "right": np.dtype(np.int8)}
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(dtype), ["n", None, None]
        )
        for name, dtype in types.items()
    ]
    node = helper.make_node("MatMulInteger", list(types), ["y"])
    runner = _runner(node, inputs, TensorProto.INT32, [])
    # The runner hands any type on.
    return lambda *factors: runner(*(np.ascontiguousarray(f) for f in factors))


def _runner(
    node: onnx.NodeProto,
    inputs: list[onnx.ValueInfoProto],
    output: int,
    constants: list[onnx.TensorProto],
) -> OnnxRunner:
    result = helper.make_tensor_value_info("y", output, None)
    graph = helper.make_graph([node], node.op_type, inputs, [result], constants)
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
    return OnnxRunner(model, threads=1)
