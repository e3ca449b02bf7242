"""Normalization inside the graph: uint8 pixels in, what the network was trained on behind it.

`calibration.images.Preprocess` turns a pixel p, 0 to 255, of a channel c into

    x = (p / 255 - mean_c) / std_c  =  (p - m_c) k_c,      m_c = 255 mean_c,   k_c = 1 / (255 std_c)

which is put in front of a finished graph, float, half or Q/DQ, as

    Cast (uint8 -> float32), Sub m, Mul k, and for pixels [N, H, W, 3] Transpose to [N, 3, H, W].

1. Both sides round a few times, each by at most u = 2^-24 of a value of the size 255 k or |m| k:
   they differ by less than 8 u (255 + |m_c|) k_c; for ImageNet's constants below 1e-6.
2. m and k are float32, also where the network is half: m has no exact half, and an error of 0.03
   grey values would be 60 times what half costs elsewhere.
3. Cast comes first, because TensorRT lets uint8 inputs into a Cast only, and Transpose last,
   because TensorRT-RTX 1.7 then makes one kernel of all of it, together with the Cast to half or
   the QuantizeLinear behind it: the same number of kernels as without. Before Sub, it costs INT8
   one kernel more.
4. It is not folded into the first convolution, where it would cost nothing: x = 0 pads a normalized
   image, p = 0 would pad the pixels, which is x = -mean / std. Only the inner outputs would agree.

The graph's input keeps its name; behind the prologue the tensor is called ``NAME.normalized``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from calibration.images import PixelArray, Preprocess
from exporter.errors import GateFailedError, InputError
from exporter.graph import attributes
from exporter.pixel_input import DTYPE, Layout
from exporter.running.onnx_runner import Batch, FloatArray

CHANNELS = 3
_FROM_A_PIXEL = 0.02
"""Grey values by which arrays of others may miss a whole pixel; float32 rounding costs 1e-4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prologue:
    """What stands in front of the network; ``preprocess`` has the constants."""

    layout: Layout
    preprocess: Preprocess

    @property
    def operators(self) -> tuple[str, ...]:
        """The nodes, in order."""
        return _operators(self.layout)

    @property
    def subtracted(self) -> FloatArray:
        """m ``[3]``."""
        return (255 * np.array(self.preprocess.mean)).astype(np.float32)

    @property
    def factor(self) -> FloatArray:
        """k ``[3]``."""
        return (1 / (255 * np.array(self.preprocess.std))).astype(np.float32)

    def pixels(self, batch: Batch) -> tuple[PixelArray]:
        """The whole pixels, in this layout, that the preprocessing normalizes to ``batch``.

        Raises:
            InputError: if there are none: the images were prepared in another way.
        """
        (images,) = batch
        values = self.preprocess.denormalize(images)
        whole = np.rint(values).clip(0, 255)
        off = float(np.max(np.abs(values - whole), initial=0.0))
        if not off <= _FROM_A_PIXEL:
            raise InputError(
                "--with-preprocess compares on pixels, but these arrays are not normalized ones: "
                f"under the preprocessing they are up to {off:.2g} grey values away from whole "
                "pixels; pass preprocess= as they were made, or evaluation= with an image folder"
            )
        return (self.layout.arranged(whole.astype(np.uint8)),)

    def whole(self, batch: Batch) -> Batch:
        """The nearest batch that whole pixels normalize to."""
        (images,) = batch
        pixels = np.rint(self.preprocess.denormalize(images)).clip(0, 255).astype(np.uint8)
        return (self.preprocess.normalize(pixels),)

    def port(self, name: str, shape: Sequence[int | str]) -> dict[str, Any]:
        """The manifest's entry for the input whose float shape is ``[N, 3, H, W]``."""
        return {
            "name": name,
            "shape": list(self.layout.shape(shape)),
            "dtype": DTYPE,
            "layout": str(self.layout),
            "mean": list(self.preprocess.mean),
            "std": list(self.preprocess.std),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPrologue:
    """The prologue that a graph has; m and k are float32 ``[3]``."""

    layout: Layout
    subtracted: FloatArray
    factor: FloatArray

    def to_json(self) -> dict[str, Any]:
        """As ``inspect`` prints it; mean and std on the [0, 1] scale, to 6 digits."""
        mean, std = self.subtracted.astype(np.float64) / 255, 1 / (255 * self.factor.astype(float))
        return {
            "operators": list(_operators(self.layout)),
            "dtype": DTYPE,
            "layout": str(self.layout),
            "mean": [float(f"{value:.6g}") for value in mean],
            "std": [float(f"{value:.6g}") for value in std],
        }


def normalized(name: str) -> str:
    """The tensor that the network behind the prologue of input ``name`` reads."""
    return f"{name}.normalized"


def _operators(layout: Layout) -> tuple[str, ...]:
    return ("Cast", "Sub", "Mul") + (("Transpose",) if layout is Layout.NHWC else ())


def with_prologue(model: onnx.ModelProto, prologue: Prologue) -> onnx.ModelProto:
    """A copy of ``model``, whose only input is float32 ``[N, 3, H, W]``, that takes pixels."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    (port,) = graph.input
    _rename_readers(graph, port.name, normalized(port.name))
    nodes = _nodes(port.name, prologue.layout)
    channels_first = (CHANNELS, 1, 1)
    shape = (CHANNELS,) if prologue.layout is Layout.NHWC else channels_first
    for node, values in zip(nodes[1:3], (prologue.subtracted, prologue.factor), strict=True):
        graph.initializer.append(numpy_helper.from_array(values.reshape(shape), node.input[1]))
    network = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *network])
    _retype(port, TensorProto.UINT8, prologue.layout.from_nchw)
    onnx.checker.check_model(copy)
    return copy


def _nodes(name: str, layout: Layout) -> list[onnx.NodeProto]:
    """The prologue of input ``name``; its constants are the second operands of Sub and Mul."""
    operators = _operators(layout)
    nodes, current = [], name
    for operator in operators:
        own = f"{name}.prologue.{operator.lower()}"
        last = operator == operators[-1]
        node = helper.make_node(operator, [current], [normalized(name) if last else own], name=own)
        if operator == "Cast":
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
        elif operator == "Transpose":
            node.attribute.append(helper.make_attribute("perm", layout.to_nchw))
        else:
            node.input.append(f"{own}.constant")
        nodes.append(node)
        current = node.output[0]
    return nodes


def read_prologue(model: onnx.ModelProto) -> FoundPrologue | None:
    """The prologue at the head of ``model``, if there is exactly what :func:`with_prologue` makes.

    The nodes and who reads them are compared one by one; what the constants are is for the caller.
    """
    graph = model.graph
    if len(graph.input) != 1:
        return None
    (port,) = graph.input
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for layout in Layout:
        nodes = _nodes(port.name, layout)
        count = len(nodes)
        if list(graph.node[:count]) != nodes or not _takes_pixels(port, layout):
            continue
        inner = {name for node in nodes for name in (*node.input, *node.output)}
        inner.remove(normalized(port.name))
        strangers = [node for node in graph.node[count:] if inner.intersection(node.input)]
        found = [constants.get(node.input[1]) for node in nodes[1:3]]
        if strangers or any(tensor is None for tensor in found):
            return None
        values = [numpy_helper.to_array(tensor) for tensor in found if tensor is not None]
        if any(v.dtype != np.float32 or v.size != CHANNELS for v in values):
            return None
        return FoundPrologue(
            layout=layout, subtracted=values[0].reshape(-1), factor=values[1].reshape(-1)
        )
    return None


def require_prologue(model: onnx.ModelProto, prologue: Prologue) -> None:
    """Return only if ``model`` has this very prologue.

    Raises:
        GateFailedError: saying what is there in its place.
    """
    found = read_prologue(model)
    if found is None or found.layout is not prologue.layout:
        began = ", ".join(node.op_type for node in model.graph.node[: len(prologue.operators)])
        raise GateFailedError(
            f"the graph does not begin with the prologue {', '.join(prologue.operators)} for "
            f"{prologue.layout} pixels, but with {began}"
        )
    for what, is_there, wanted in (
        ("subtracts", found.subtracted, prologue.subtracted),
        ("multiplies by", found.factor, prologue.factor),
    ):
        if not np.array_equal(is_there, wanted):
            raise GateFailedError(
                f"the graph's prologue {what} {is_there.tolist()}, the preprocessing asks for "
                f"{wanted.tolist()}"
            )


def without_prologue(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that :func:`with_prologue` was given, byte for byte; others are returned as is."""
    found = read_prologue(model)
    if found is None:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    (port,) = graph.input
    nodes = _nodes(port.name, found.layout)
    del graph.node[: len(nodes)]
    constants = {node.input[1] for node in nodes[1:3]}
    kept = [tensor for tensor in graph.initializer if tensor.name not in constants]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    _rename_readers(graph, normalized(port.name), port.name)
    _retype(port, TensorProto.FLOAT, found.layout.to_nchw)
    return copy


def _takes_pixels(port: onnx.ValueInfoProto, layout: Layout) -> bool:
    tensor = port.type.tensor_type
    extents = [extent.dim_value for extent in tensor.shape.dim]
    if tensor.elem_type != TensorProto.UINT8 or len(extents) != len(layout.from_nchw):
        return False
    return bool(extents[layout.to_nchw[1]] == CHANNELS)


def _rename_readers(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new
        # The branches of an If and the body of a Loop see the tensors around them.
        for value in attributes(node).values():
            if isinstance(value, onnx.GraphProto):
                _rename_readers(value, old, new)


def _retype(port: onnx.ValueInfoProto, data_type: int, axes: Sequence[int]) -> None:
    tensor = port.type.tensor_type
    tensor.elem_type = data_type
    extents = [onnx.TensorShapeProto.Dimension.FromString(d.SerializeToString())
               for d in tensor.shape.dim]  # fmt: skip
    del tensor.shape.dim[:]
    tensor.shape.dim.extend(extents[axis] for axis in axes)
