"""Float graph -> half graph with float32 inputs and outputs, and the check that half can hold it.

TensorRT 11 and TensorRT-RTX read the precision from the graph ("strongly typed"), so half means
half initializers and half tensors between a Cast after each input and a Cast before each output.
Two things stay float32: what is computed from shapes alone (pixel counts beyond 2048 are no half
numbers), and the operands that ONNX wants in float32 whatever the rest is, such as Resize's scales.

IEEE binary16 ends at 65504. A value beyond it becomes Inf, and the engine's answer NaN; that can be
known beforehand from the ranges of real images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableSequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import GateFailedError
from exporter.graph import attributes, with_outputs
from exporter.onnx_runner import Batch, OnnxRunner

HALF_MAX = 65504.0
_FLOAT_SLOTS = {"Resize": (1, 2)}
"""Operands of an operator that are float32 by the ONNX specification, by index."""

_SUMMING_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sum", "Mul", "ReduceSum")
"""Operators whose result can be much larger than what they read."""

_STEP = 4
"""Images a step where almost every tensor of the network is held at once."""


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a strongly typed half copy of a float graph.

    Raises:
        GateFailedError: naming the tensor, if a weight is beyond half's range or NaN; if an
            operator of the graph cannot be typed so.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    _constants_to_initializers(graph)
    sizes = _computed_from_shapes(half)
    _store_half(graph, sizes)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] not in sizes:
            nodes += _size_casts(node, sizes, nodes)
            _retype(node)
        nodes.append(node)
    ends = [[v.name for v in values if _is_float(v)] for values in (graph.input, graph.output)]
    inputs, outputs = ends[0], [name for name in ends[1] if name not in sizes]
    for node in nodes:
        for name in (*inputs, *outputs):
            _rename(node.input, name, f"{name}.half")
            _rename(node.output, name, f"{name}.half")
    first = [_cast(name, f"{name}.half", TensorProto.FLOAT16, f"{name}.cast") for name in inputs]
    last = [_cast(f"{name}.half", name, TensorProto.FLOAT, f"{name}.cast") for name in outputs]
    del graph.node[:], graph.value_info[:]
    graph.node.extend([*first, *nodes, *last])
    try:
        onnx.checker.check_model(half, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise GateFailedError(
            f"the graph has no half form: {first_line}; use PRECISION=fp32 or int8"
        ) from error
    return half


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


def _store_half(graph: onnx.GraphProto, sizes: Mapping[str, bool]) -> None:
    """Round the float32 initializers to half, but for operands that stay float32."""
    kept = {
        name
        for node in graph.node
        for index, name in enumerate(node.input)
        if node.output[0] in sizes or index in _FLOAT_SLOTS.get(node.op_type, ())
    }
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.FLOAT]:
        values = numpy_helper.to_array(tensor)
        if tensor.name not in kept:
            tensor.CopyFrom(rounded_to_half(values, tensor.name))
            continue
        readers = [node for node in graph.node if tensor.name in _half_operands(node, sizes)]
        if readers:
            graph.initializer.append(rounded_to_half(values, f"{tensor.name}.half"))
        for node in readers:
            _rename_operands(node, tensor.name, f"{tensor.name}.half")


def rounded_to_half(values: np.ndarray, name: str) -> onnx.TensorProto:
    """``values`` in half as the initializer ``name``; GateFailedError beyond half's range."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if not largest <= HALF_MAX:
        raise _overflow(name, largest)
    return numpy_helper.from_array(values.astype(np.float16), name)


def _half_operands(node: onnx.NodeProto, sizes: Mapping[str, bool]) -> list[str]:
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
    node: onnx.NodeProto, sizes: Mapping[str, bool], before: list[onnx.NodeProto]
) -> list[onnx.NodeProto]:
    """Where a float number computed from shapes enters the data, it becomes half."""
    made = {name for other in before for name in other.output}
    casts = []
    for name in dict.fromkeys(_half_operands(node, sizes)):
        if sizes.get(name, False):
            if f"{name}.half" not in made:
                casts.append(_cast(name, f"{name}.half", TensorProto.FLOAT16, f"{name}.half.cast"))
            _rename_operands(node, name, f"{name}.half")
    return casts


def _retype(node: onnx.NodeProto) -> None:
    """Data types that are written in attributes."""
    for attribute in node.attribute:
        names_type = attribute.name == "dtype" or (node.op_type, attribute.name) == ("Cast", "to")
        if names_type and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        elif attribute.t.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(rounded_to_half(values, node.name or node.output[0]))


def largest_magnitudes(model: onnx.ModelProto, batches: Iterable[Batch]) -> Mapping[str, float]:
    """The largest ``|x|`` over ``batches`` of every tensor that sums or multiplies."""
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


def require_half_range(magnitudes: Mapping[str, float]) -> None:
    """Raise GateFailedError naming the first tensor that half cannot hold."""
    for name, largest in magnitudes.items():
        if not largest <= HALF_MAX:
            raise _overflow(name, largest)


def _overflow(name: str, largest: float) -> GateFailedError:
    return GateFailedError(
        f"half overflow in {name}: its values reach {largest:.7g}, half ends at {HALF_MAX:g}; "
        "use PRECISION=fp32 or int8"
    )


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.elem_type == TensorProto.FLOAT)


def _cast(source: str, target: str, to: int, name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=name, to=to)


def _rename(names: MutableSequence[str], old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new
