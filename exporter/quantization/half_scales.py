"""Q/DQ graph in float -> the same graph in half, scales included.

For Turing (sm75) TensorRT-RTX compiles no float matrix products, so whatever is not quantized there
must be half, and the quantizers too: half scales came with opset 19.

A half number has all its bits from 2^-14 on and is zero below 2^-25, so a small scale would be off
by a factor, or gone. Scales s below 2^-14 are replaced by the next half number t >= s. A weight's
integers q are then rounded again::

    q' = round(q s / t),   |q' t - q s| <= t / 2 ,   |q'| <= |q| ,

which is the error of rounding to nearest once more, or of storing the weight in half. An
activation's t clips nothing that s did not clip. Larger scales are rounded to nearest, which is off
by 2^-11 at most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper, version_converter

from exporter.errors import GateFailedError
from exporter.graph import attributes
from exporter.precision import HALF, to_type

_OPSET, _IR_VERSION = 19, 9
"""The first with half scales."""

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_REAL = (TensorProto.FLOAT, TensorProto.FLOAT16)
_SMALLEST_NORMAL = np.float32(2.0**-14)


def to_half_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the half copy of a float graph with Q/DQ nodes; float32 inputs and outputs stay.

    Raises:
        GateFailedError: naming the tensor, if a weight or scale is beyond half's range; if an
            operator of the graph has no form in half or in opset 19.
    """
    try:
        newer = version_converter.convert_version(model, _OPSET)
    except RuntimeError as error:
        # The converter's own class derives from it.
        first_line = str(error).strip().splitlines()[0]
        raise GateFailedError(
            f"the graph cannot be written in opset {_OPSET}, which half scales need: {first_line}"
        ) from error
    newer.ir_version = max(newer.ir_version, _IR_VERSION)
    _drop_casts(newer)
    _raise_small_scales(newer)
    return to_type(HALF, newer)


def _drop_casts(model: onnx.ModelProto) -> None:
    """Where all is half, the casts around single layers in half have nothing left to do."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    real = {v.name for v in values if v.type.tensor_type.elem_type in _REAL}
    ends = {value.name for value in graph.output}
    kept, same = [], dict[str, str]()
    for node in model.graph.node:
        if node.op_type == "Cast" and {node.input[0], node.output[0]} <= real:
            old, new = node.output[0], node.input[0]
            if old in ends:
                old, new = new, old
            same[old] = same.get(new, new)
        else:
            kept.append(node)
    for node in kept:
        for names in (node.input, node.output):
            names[:] = [same.get(name, name) for name in names]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(kept)


def _raise_small_scales(model: onnx.ModelProto) -> None:
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    quantizers = [n for n in model.graph.node if n.op_type in _QUANTIZERS]
    before = {n.input[1]: numpy_helper.to_array(initializers[n.input[1]]) for n in quantizers}
    raised = {name: _next_half(scales) for name, scales in before.items()}
    for name, scales in raised.items():
        initializers[name].CopyFrom(numpy_helper.from_array(scales, name))
    weights = {n.input[0]: n for n in quantizers if n.input[0] in initializers}
    for weight, node in weights.items():
        factor = np.asarray(before[node.input[1]] / raised[node.input[1]], dtype=np.float32)
        if not np.all(factor == 1):
            _round_again(initializers[weight], factor, attributes(node).get("axis", 1))


def _next_half(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scales below 2^-14 raised to half numbers; the others as they are."""
    half = np.minimum(scales, _SMALLEST_NORMAL).astype(np.float16)
    above = np.nextafter(half, np.float16(1))
    raised = np.where(half.astype(np.float32) < scales, above, half).astype(np.float32)
    return np.asarray(np.where(scales < _SMALLEST_NORMAL, raised, scales), dtype=np.float32)


def _round_again(tensor: onnx.TensorProto, factor: npt.NDArray[np.float32], axis: int) -> None:
    integers = numpy_helper.to_array(tensor)
    if factor.ndim:
        factor = factor.reshape([-1 if at == axis else 1 for at in range(integers.ndim)])
    rounded = np.rint(integers * factor).astype(integers.dtype)
    tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
