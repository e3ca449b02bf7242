"""A Q/DQ graph without its Q/DQ: what every pair stood for, and where it stood.

``QuantizeLinear`` and ``DequantizeLinear`` (ONNX, opset 10 and later) with zero point 0 are::

    Q(x) = clip(round_half_even(x / s), -128, 127)        DQ(q) = s q

Removing them takes these steps, node by node in the order of the graph:

1. a constant computed from constants is computed here: scales behind Constant, Identity or Cast,
   weights behind Transpose, as exporters write them;
2. DQ of constant int8, or of Q of constant floats, is a weight on a grid: integers and scales are
   kept, and the float weight becomes ``s q``, the value that the network really multiplies with;
3. DQ of constant int32 is a bias: its float value is kept;
4. DQ of Q of an activation is a *quantizer*: its readers read the activation, and each such edge
   remembers which quantizers it went through.

Refused are scales that are computed at run time, not positive or not finite, zero points other than
0, and every type but int8: TensorRT's INT8 is signed and symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from exporter.errors import InputError
from exporter.graph import attributes, label

Array = npt.NDArray[Any]
Edge = tuple[int, int]
"""A node by its place in :attr:`Removal.nodes`, and the number of one of its inputs."""

_FOLDABLE = {
    "Cast", "Concat", "Constant", "Div", "Identity", "Mul", "Reshape", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip
_INTEGER_OPS = {
    "ConvInteger", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulInteger",
    "MatMulIntegerToFloat", "MatMulNBits", "QGemm",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """A weight that is integers: int8, float32 scales ``[C]`` along ``axis``, or one with None."""

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    axis: int | None

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The float32 numbers it stands for."""
        shape = _along(self.axis, self.integers, self.scales)
        values: npt.NDArray[np.float32] = self.integers.astype(np.float32)
        return values * self.scales.reshape(shape)

    def transposed(self, order: list[int] | None) -> Grid:
        """With its axes permuted as ONNX's Transpose does; None reverses them."""
        order = order or list(range(self.integers.ndim))[::-1]
        axis = None if self.axis is None else order.index(self.axis)
        return replace(self, integers=self.integers.transpose(order), axis=axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """``DQ(Q(tensor))`` with one scale; ``behind`` names the quantizers that came before it."""

    tensor: str
    scale: float
    behind: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class Removal:
    """What is left of a graph, and what was taken out.

    ``nodes`` read activations where they read quantized ones. ``constants`` are initializers and
    what was computed from them, ``grids`` those of them that are integers. ``quantizers`` are named
    by what they computed; ``edges`` lists those that each input of a node went through, in order.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    edges: dict[Edge, tuple[str, ...]] = field(default_factory=dict)


def remove_quantizers(model: onnx.ModelProto) -> Removal:
    """Take the Q/DQ pairs out of ``model``, which is not changed.

    Raises:
        InputError: naming the node and what about it INT8 in TensorRT cannot express.
    """
    graph = Removal(constants={t.name: _array(t) for t in model.graph.initializer})
    quantized: dict[str, onnx.NodeProto] = {}
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        _refuse_integer_operators(node)
        if node.op_type == "QuantizeLinear":
            quantized[node.output[0]] = node
        elif node.op_type == "DequantizeLinear":
            _dequantize(node, quantized, graph)
        elif not _fold(node, graph, model.opset_import):
            _keep(node, graph)
    return graph


def _array(tensor: onnx.TensorProto) -> Array:
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:
        # External data that was not loaded, damaged raw data: onnx raises what it likes.
        raise InputError(f"the tensor {tensor.name} cannot be read: {error}") from error


def _refuse_integer_operators(node: onnx.NodeProto) -> None:
    kind = node.op_type
    if kind in _INTEGER_OPS or kind.startswith(("QLinear", "TRT_")):
        raise InputError(
            f"node {label(node)} is {kind}; only QuantizeLinear and DequantizeLinear pairs with "
            "constant scales can be imported: export the network in Q/DQ format"
        )


def _dequantize(
    node: onnx.NodeProto, quantized: Mapping[str, onnx.NodeProto], graph: Removal
) -> None:
    source, output = node.input[0], node.output[0]
    quantize = quantized.get(source)
    if quantize is not None and quantize.input[0] in graph.constants:
        graph.constants[source] = _rounded(quantize, graph)
    if source in graph.constants:
        _dequantize_constant(node, graph)
    elif quantize is None:
        raise InputError(f"node {label(node)} dequantizes {source}, which no QuantizeLinear made")
    else:
        graph.quantizers[output] = _quantizer(quantize, node, graph)


def _dequantize_constant(node: onnx.NodeProto, graph: Removal) -> None:
    source, output = node.input[0], node.output[0]
    integers = graph.constants[source]
    if integers.dtype == np.int32:
        scales, axis = _scales(node, graph, np.dtype(np.int32))
        # A bias; in float64, because an int32 has more digits than a float32.
        exact = integers * scales.astype(np.float64).reshape(_along(axis, integers, scales))
        graph.constants[output] = exact.astype(np.float32)
        return
    _require_int8(node, integers.dtype.name)
    scales, axis = _scales(node, graph)
    grid = Grid(integers=integers, scales=scales, axis=axis)
    graph.grids[output] = grid
    graph.constants[output] = grid.values


def _rounded(node: onnx.NodeProto, graph: Removal) -> npt.NDArray[np.int8]:
    """What QuantizeLinear makes of constant floats."""
    values = graph.constants[node.input[0]].astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError(f"the weight {node.input[0]} holds NaN or Inf")
    scales, axis = _scales(node, graph)
    steps = np.rint(values / scales.reshape(_along(axis, values, scales)))
    integers: npt.NDArray[np.int8] = np.clip(steps, -128, 127).astype(np.int8)
    return integers


def _along(axis: int | None, values: Array, scales: Array) -> list[int]:
    """The shape in which ``scales`` broadcast along that axis of ``values``."""
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = len(scales)
    return shape


def _quantizer(quantize: onnx.NodeProto, node: onnx.NodeProto, graph: Removal) -> Quantizer:
    tensor = quantize.input[0]
    (first, _), (second, _) = _scales(quantize, graph), _scales(node, graph)
    if len(first) != 1:
        raise InputError(
            f"node {label(quantize)}: the activation {tensor} has {len(first)} scales; INT8 needs "
            "one scale for the whole tensor"
        )
    if not np.array_equal(first, second):
        raise InputError(
            f"node {label(node)}: {tensor} is quantized with scale {first[0]:g} and dequantized "
            f"with {second[0]:g}; the two must be equal"
        )
    behind: tuple[str, ...] = ()
    if tensor in graph.quantizers:
        before = graph.quantizers[tensor]
        tensor, behind = before.tensor, (*before.behind, tensor)
    return Quantizer(tensor=tensor, scale=float(first[0]), behind=behind)


def _scales(
    node: onnx.NodeProto, graph: Removal, kind: np.dtype[Any] | None = None
) -> tuple[npt.NDArray[np.float32], int | None]:
    """The scales of Q or DQ, ``[1]`` or ``[C]``, and their axis; ``kind`` is int8 unless given."""
    what = node.input[0]
    found = attributes(node)
    names = [*node.input[1:], "", ""][:2]
    if names[0] not in graph.constants or (names[1] and names[1] not in graph.constants):
        raise InputError(
            f"node {label(node)}: the scale of {what} is computed at run time (dynamic "
            "quantization); only constant scales can be imported"
        )
    if found.get("block_size"):
        raise InputError(f"node {label(node)}: {what} has block-wise scales; INT8 has none")
    _require_symmetric(node, graph.constants.get(names[1]), kind or np.dtype(np.int8), found)
    scales = np.atleast_1d(graph.constants[names[0]].astype(np.float32))
    bad = scales[~(np.isfinite(scales) & (scales > 0))]
    if scales.ndim != 1 or bad.size:
        value = f"{bad[0]:g}" if bad.size else f"of shape {list(scales.shape)}"
        raise InputError(
            f"node {label(node)}: a scale of {what} is {value}, expected positive finite numbers"
        )
    if len(scales) == 1:
        return scales, None
    if what not in graph.constants:
        return scales, None  # an activation, whose only scale is a scalar: the caller refuses
    shape, axis = graph.constants[what].shape, int(found.get("axis", 1))
    axis += len(shape) if axis < 0 else 0
    if not 0 <= axis < len(shape) or shape[axis] != len(scales):
        raise InputError(
            f"node {label(node)}: {what} {list(shape)} has {len(scales)} scales along axis {axis}"
        )
    return scales, axis


def _require_symmetric(
    node: onnx.NodeProto,
    zero_point: Array | None,
    kind: np.dtype[Any],
    found: Mapping[str, Any],
) -> None:
    if zero_point is not None:
        if zero_point.dtype != kind:
            _require_int8(node, zero_point.dtype.name)
        off = zero_point[zero_point != 0]
        if off.size:
            raise InputError(
                f"node {label(node)}: {node.input[0]} is quantized asymmetrically, with zero point "
                f"{int(off.flat[0])}; TensorRT's INT8 is symmetric: train it with zero point 0"
            )
    elif node.op_type == "QuantizeLinear":
        # Without a zero point the type is output_dtype's, and uint8 by default.
        number = found.get("output_dtype") or onnx.TensorProto.UINT8
        _require_int8(node, onnx.TensorProto.DataType.Name(number))


def _require_int8(node: onnx.NodeProto, kind: str) -> None:
    if kind.upper() != "INT8":
        raise InputError(
            f"node {label(node)}: {node.input[0]} is quantized to {kind.upper()}; TensorRT's INT8 "
            "is signed and symmetric: train and export it with int8 and zero point 0"
        )


def _fold(node: onnx.NodeProto, graph: Removal, opsets: Any) -> bool:
    """Compute ``node`` here if all that it reads is constant; whether it was."""
    names = [name for name in node.input if name]
    output = node.output[0]
    if node.op_type not in _FOLDABLE or not all(name in graph.constants for name in names):
        return False
    if names and names[0] in graph.grids and node.op_type in ("Identity", "Transpose"):
        grid = graph.grids[names[0]]
        if node.op_type == "Transpose":
            grid = grid.transposed(attributes(node).get("perm"))
        graph.grids[output], graph.constants[output] = grid, grid.values
        return True
    try:
        evaluator = ReferenceEvaluator(node, opsets={o.domain: o.version for o in opsets})
        (value,) = evaluator.run(None, {name: graph.constants[name] for name in names})
    except Exception as error:
        # Each of the reference operators raises what its numpy raises.
        raise InputError(f"node {label(node)} cannot be computed: {error!r}") from error
    graph.constants[output] = np.asarray(value)
    return True


def _keep(node: onnx.NodeProto, graph: Removal) -> None:
    place = len(graph.nodes)
    for index, name in enumerate(node.input):
        if name in graph.quantizers:
            quantizer = graph.quantizers[name]
            graph.edges[place, index] = (*quantizer.behind, name)
            node.input[index] = quantizer.tensor
    graph.nodes.append(node)
