"""Float graph -> half or bfloat16 graph with float32 inputs and outputs, and whether it can be.

TensorRT 11 and TensorRT-RTX read the precision from the graph ("strongly typed"), so half means
half initializers and half tensors between a Cast after each input and a Cast before each output.
Two things stay float32: what is computed from shapes alone (pixel counts beyond 2048 are no half
numbers), and the operands that ONNX wants in float32 whatever the rest is, such as Resize's scales.

=============  ========  =========  =====================  ====================
type           exponent  mantissa   ends at                in ONNX's Conv since
=============  ========  =========  =====================  ====================
half           5 bits    10 bits    65504                  opset 1
bfloat16       8 bits    7 bits     (2 - 2^-7) 2^127       opset 22
=============  ========  =========  =====================  ====================

A value beyond the end becomes Inf, and the engine's answer NaN; that can be known beforehand from
the ranges of real images. bfloat16 ends where float32 does, so only its weights are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableSequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import GateFailedError
from exporter.graph import attributes, in_opset, label, with_outputs
from exporter.running.onnx_runner import Batch, OnnxRunner

HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowType:
    """A floating-point type of 16 bits.

    ``suffix`` ends the names of tensors that exist in float32 too. ``opset`` is the oldest in which
    all operators take the type, 0 if the graph's own always does.
    """

    name: str
    suffix: str
    code: int
    largest: float
    opset: int = 0


HALF = NarrowType(name="half", suffix="half", code=TensorProto.FLOAT16, largest=HALF_MAX)
BFLOAT16 = NarrowType(
    name="bfloat16",
    suffix="bf16",
    code=TensorProto.BFLOAT16,
    largest=(2 - 2**-7) * 2.0**127,
    opset=22,
)

_FLOAT_SLOTS = {"Resize": (1, 2)}
"""Operands of an operator that are float32 by the ONNX specification, by index."""

_SUMMING_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sum", "Mul", "ReduceSum")
"""Operators whose result can be much larger than what they read."""

_STEP = 4
"""Images a step where almost every tensor of the network is held at once."""


def to_type(kind: NarrowType, model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a strongly typed copy of a float graph that computes in ``kind``.

    Raises:
        GateFailedError: naming the tensor, if a weight is beyond the type's range or NaN; if an
            operator of the graph cannot be typed so.
    """
    try:
        narrow = in_opset(model, kind.opset)
    except ValueError as error:
        raise _no_form(kind, error) from error
    graph = narrow.graph
    _constants_to_initializers(graph)
    sizes = _computed_from_shapes(narrow)
    _store(kind, graph, sizes)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] not in sizes:
            nodes += _size_casts(kind, node, sizes, nodes)
            _retype(kind, node)
        nodes.append(node)
    ends = [[v.name for v in values if _is_float(v)] for values in (graph.input, graph.output)]
    inputs, outputs = ends[0], [name for name in ends[1] if name not in sizes]
    inner = {name: f"{name}.{kind.suffix}" for name in (*inputs, *outputs)}
    for node in nodes:
        for name, other in inner.items():
            _rename(node.input, name, other)
            _rename(node.output, name, other)
    first = [_cast(name, inner[name], kind.code, f"{name}.cast") for name in inputs]
    last = [_cast(inner[name], name, TensorProto.FLOAT, f"{name}.cast") for name in outputs]
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*first, *nodes, *last])
    try:
        onnx.checker.check_model(narrow, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _no_form(kind, error) from error
    return narrow


def _no_form(kind: NarrowType, error: Exception) -> GateFailedError:
    first_line = str(error).strip().splitlines()[0]
    return GateFailedError(
        f"the graph has no {kind.name} form: {first_line}; use --precision fp32 or int8"
    )


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """Constant nodes hold tensors, or bare numbers, which are int64 or float32."""
    for node in list(graph.node):
        if node.op_type != "Constant":
            continue
        ((kind, value),) = attributes(node).items()
        if kind == "value":
            tensor = value
        elif kind in ("value_float", "value_floats"):
            tensor = numpy_helper.from_array(np.array(value, dtype=np.float32))
        elif kind in ("value_int", "value_ints"):
            tensor = numpy_helper.from_array(np.array(value, dtype=np.int64))
        else:
            continue
        stored = graph.initializer.add()
        stored.CopyFrom(tensor)
        stored.name = node.output[0]
        graph.node.remove(node)


def _computed_from_shapes(model: onnx.ModelProto) -> dict[str, bool]:
    """The tensors that depend on shapes and constants only, and whether each is float32."""
    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: _is_float(value) for value in (*inferred.value_info, *inferred.output)}
    constants = {tensor.name for tensor in graph.initializer}
    sizes: dict[str, bool] = {}
    for node in graph.node:
        read = [name for name in node.input if name and name not in constants]
        if node.op_type in ("Shape", "Size") or (read and all(name in sizes for name in read)):
            sizes |= {name: types.get(name, False) for name in node.output}
    return sizes


def _store(kind: NarrowType, graph: onnx.GraphProto, sizes: Mapping[str, bool]) -> None:
    """Round the float32 initializers, but for operands that stay float32."""
    kept = {
        name
        for node in graph.node
        for index, name in enumerate(node.input)
        if node.output[0] in sizes or index in _FLOAT_SLOTS.get(node.op_type, ())
    }
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.FLOAT]:
        values = numpy_helper.to_array(tensor)
        if tensor.name not in kept:
            tensor.CopyFrom(rounded(kind, values, tensor.name))
            continue
        readers = [node for node in graph.node if tensor.name in _narrow_operands(node, sizes)]
        other = f"{tensor.name}.{kind.suffix}"
        if readers:
            graph.initializer.append(rounded(kind, values, other))
        for node in readers:
            _rename_operands(node, tensor.name, other)


def rounded(kind: NarrowType, values: np.ndarray, name: str) -> onnx.TensorProto:
    """``values`` in ``kind`` as the initializer ``name``; GateFailedError beyond its range."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest <= kind.largest:
        raise _overflow(name, largest, kind)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(kind.code)), name)


def _narrow_operands(node: onnx.NodeProto, sizes: Mapping[str, bool]) -> list[str]:
    if node.output[0] in sizes:
        return []
    fixed = _FLOAT_SLOTS.get(node.op_type, ())
    return [name for index, name in enumerate(node.input) if index not in fixed]


def _rename_operands(node: onnx.NodeProto, old: str, new: str) -> None:
    fixed = _FLOAT_SLOTS.get(node.op_type, ())
    for index, name in enumerate(node.input):
        if name == old and index not in fixed:
            node.input[index] = new


def _size_casts(
    kind: NarrowType,
    node: onnx.NodeProto,
    sizes: Mapping[str, bool],
    before: list[onnx.NodeProto],
) -> list[onnx.NodeProto]:
    """Where a float number computed from shapes enters the data, it becomes narrow."""
    made = {name for other in before for name in other.output}
    casts = []
    for name in dict.fromkeys(_narrow_operands(node, sizes)):
        if sizes.get(name, False):
            other = f"{name}.{kind.suffix}"
            if other not in made:
                casts.append(_cast(name, other, kind.code, f"{other}.cast"))
            _rename_operands(node, name, other)
    return casts


def _retype(kind: NarrowType, node: onnx.NodeProto) -> None:
    """Data types that are written in attributes."""
    for attribute in node.attribute:
        names_type = attribute.name == "dtype" or (node.op_type, attribute.name) == ("Cast", "to")
        if names_type and attribute.i == TensorProto.FLOAT:
            attribute.i = kind.code
        elif attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(rounded(kind, values, label(node)))


def largest_magnitudes(model: onnx.ModelProto, batches: Iterable[Batch]) -> Mapping[str, float]:
    """The largest ``|x|`` over ``batches`` of every tensor that sums or multiplies; NaN wins."""
    graph = model.graph
    sizes = _computed_from_shapes(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.output)
    floats = {value.name for value in values if _is_float(value)} - sizes.keys()
    names = [n.output[0] for n in graph.node if n.op_type in _SUMMING_OPS and n.output[0] in floats]
    runner = OnnxRunner(with_outputs(model, names))
    largest = dict.fromkeys(names, 0.0)
    for batch in batches:
        for start in range(0, len(batch[0]), _STEP):
            part = tuple(array[start : start + _STEP] for array in batch)
            for name, found in runner.run(part).items():
                # Not max(): it would drop a NaN.
                largest[name] = float(np.maximum(largest[name], np.max(np.abs(found))))
    return largest


def larger(left: Mapping[str, float], right: Mapping[str, float]) -> Mapping[str, float]:
    """:func:`largest_magnitudes` of the batches of both."""
    return {name: float(np.maximum(found, right[name])) for name, found in left.items()}


def require_half_range(magnitudes: Mapping[str, float]) -> None:
    """Raise GateFailedError naming the first tensor that half cannot hold."""
    for name, largest in magnitudes.items():
        if not largest <= HALF_MAX:
            raise _overflow(name, largest)


def _overflow(name: str, largest: float, kind: NarrowType = HALF) -> GateFailedError:
    wider = "bf16, fp32" if kind is HALF else "fp32"
    return GateFailedError(
        f"{kind.name} overflow in {name}: its values reach {largest:.7g}, {kind.name} ends at "
        f"{kind.largest:g}; use --precision {wider} or int8"
    )


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _cast(source: str, target: str, to: int, name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=name, to=to)


def _rename(names: MutableSequence[str], old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new
