"""Two graphs of one network, tensor by tensor.

The stages of an export keep the names of tensors, so a tensor of the float graph is found in any
later graph: as ``T``, or as ``T.half`` or ``T.bf16`` where it exists in that type. :func:`exposed`
makes them the outputs of a graph. :func:`forced` also cuts the graph at each of them: its readers
get ``T.given``, an input, in place of what the graph computed::

    float graph       x -> A -> a -> B -> b          gives a, b for x
    exposed           x -> A'-> a'-> B'-> b'         b' has the errors of A' and B' in it
    forced            x -> A'-> a',  a -> B'-> b"    b" has the error of B' only

With the float graph's tensors given, every operation is judged by its own error alone, whatever
came before it, and all of them in one run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporter.parity.comparison import MAX_SQNR_DB
from exporter.running.emulation import emulated
from exporter.running.onnx_runner import Batch, FloatArray, OnnxRunner

IMAGES_A_STEP = 2
"""Almost every tensor of two graphs is held at once."""

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_SUFFIXES = ("half", "bf16")
_CUT = ".given"
_SEEN = ".probed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor of the float graph is in another graph: its name there and its data type."""

    tensor: str
    found: str
    data_type: int


def float_tensors(model: onnx.ModelProto) -> dict[str, int]:
    """Name and data type of every floating-point tensor that a node of ``model`` computes."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.output)
    }
    return {
        name: types[name]
        for node in model.graph.node
        if node.op_type != "Constant"
        for name in node.output
        if types.get(name) in _FLOATS
    }


def places(tensors: Sequence[str], other: onnx.ModelProto) -> tuple[Place, ...]:
    """Those of ``tensors`` that ``other`` computes too, in order.

    Where a tensor exists in two data types, that is the one which is no Cast of the other.
    """
    types = float_tensors(other)
    casts = {n.output[0]: n.input[0] for n in other.graph.node if n.op_type == "Cast"}
    found = []
    for tensor in tensors:
        narrow = [f"{tensor}.{suffix}" for suffix in _SUFFIXES]
        if casts.get(tensor) in narrow:
            name = casts[tensor]
        else:
            name = next((name for name in (tensor, *narrow) if name in types), tensor)
        if name in types:
            found.append(Place(tensor=tensor, found=name, data_type=types[name]))
    return tuple(found)


def as_they_are(tensors: Sequence[str]) -> tuple[Place, ...]:
    """The float32 ``tensors`` of the float graph itself."""
    return tuple(Place(tensor=t, found=t, data_type=TensorProto.FLOAT) for t in tensors)


def exposed(model: onnx.ModelProto, at: Sequence[Place]) -> onnx.ModelProto:
    """A copy of ``model`` whose outputs are the tensors ``at``, in float32."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    _expose(probe, at)
    return probe


def forced(model: onnx.ModelProto, at: Sequence[Place]) -> onnx.ModelProto:
    """As :func:`exposed`; each reader of such a tensor gets the input ``T.given`` instead.

    These inputs are float32 and follow the graph's own.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    given = {place.found: f"{place.tensor}{_CUT}" for place in at}
    first: list[onnx.NodeProto] = []
    for place in at:
        name = given[place.found]
        probe.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        if place.data_type != TensorProto.FLOAT:
            given[place.found] = f"{name}.cast"
            first.append(_cast(name, f"{name}.cast", place.data_type))
    for node in probe.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = given.get(name, name)
    nodes = [*first, *probe.graph.node]
    del probe.graph.node[:]
    probe.graph.node.extend(nodes)
    _expose(probe, at)
    return probe


def _expose(probe: onnx.ModelProto, at: Sequence[Place]) -> None:
    graph = probe.graph
    del graph.output[:], graph.value_info[:]
    for place in at:
        name = place.found
        if place.data_type != TensorProto.FLOAT:
            name = f"{place.found}{_SEEN}"
            graph.node.append(_cast(place.found, name, TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=target, to=to)


class Probe:
    """Runs a graph up to the tensors ``at``.

    ``given`` cuts the graph at them. ONNX Runtime does not rewrite the graph: what is read is what
    the graph says. A bfloat16 graph is emulated, with the same names.

    Raises:
        GateFailedError: if ONNX Runtime cannot run the graph.
    """

    def __init__(self, model: onnx.ModelProto, at: Sequence[Place], *, given: bool = False) -> None:
        self._at, self._given = at, given
        if any(place.data_type == TensorProto.BFLOAT16 for place in at):
            model = emulated(model)
            at = [replace(place, data_type=TensorProto.FLOAT) for place in at]
        graph = (forced if given else exposed)(model, at)
        self._runner = OnnxRunner(graph, optimize=False)

    def run(
        self, batch: Batch, given: Mapping[str, FloatArray] | None = None
    ) -> dict[str, FloatArray]:
        """Each tensor by its name in the float graph; ``given`` has the float graph's own."""
        cut = [(given or {})[place.tensor] for place in self._at] if self._given else []
        inputs = (*batch, *cut)
        values = self._runner.run(inputs).values()
        return {place.tensor: value for place, value in zip(self._at, values, strict=True)}


@dataclass(slots=True)
class Noise:
    """Signal and noise power, summed over batches."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: FloatArray, found: FloatArray) -> None:
        """Another batch; what is not finite or of another shape is all noise."""
        r = reference.astype(np.float64)
        self.signal += float(np.sum(r**2))
        if found.shape != reference.shape or not np.all(np.isfinite(found)):
            self.noise = math.inf
        else:
            self.noise += float(np.sum((r - found) ** 2))

    @property
    def sqnr_db(self) -> float:
        """In dB, between -200 and 200."""
        if self.noise == 0:
            return MAX_SQNR_DB
        if self.signal == 0 or not math.isfinite(self.noise):
            return -MAX_SQNR_DB
        return min(MAX_SQNR_DB, max(-MAX_SQNR_DB, 10 * math.log10(self.signal / self.noise)))


def steps(batch: Batch) -> list[Batch]:
    """``batch`` in parts small enough to hold every tensor of them."""
    count = len(batch[0])
    return [
        tuple(array[start : start + IMAGES_A_STEP] for array in batch)
        for start in range(0, count, IMAGES_A_STEP)
    ]
