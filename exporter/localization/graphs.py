"""Which layer parts from the last good stage: every operation judged by its own error.

Comparing layer by layer from the input on shows errors that add up: in INT8 the tenth layer is
always worse than the ninth. So each operation of the bad graph gets the *good* graph's tensors
(:func:`exporter.localization.probe.forced`), and what remains is its own error. It deviates where
that is more than rounding explains:

* float32. One rounding is 2^-24, 144 dB. A sum of n terms in another order costs about sqrt(n), 41
  dB for the 11520 of the widest layer if nothing averages out: 100 dB is the limit. Measured: above
  120 dB.
* half, of 11 significant bits. Uniform rounding of a result costs 10 log10(3 2^22) = 71 dB; input,
  weight and result are rounded, 66 dB. bfloat16 has 8 bits: 48 dB. 15 dB are left for operands that
  cancel.
* INT8. With the steps s_x of the input and s_o of the weights of output channel o, and x, y the
  good graph's tensors,

      noise_o = s_x^2 / 12 |W_o|^2 + s_o^2 / 12 sum over the taps of E[x_i^2]
      explained = 10 log10( sum_o E[y_o^2] / sum_o noise_o )

  The limit is 6 dB below: clipping is not in the formula and costs, where it was chosen well, no
  more than rounding; where it costs more, the layer deviates too. Measured on A0: 4 to 13 dB above.
  The steps are those of the bad graph: a wrong step makes the explained noise grow by its own size
  at most, its error by far more.
* float8 (e4m3), of 4 significant bits: 10 log10(3 2^8) = 29 dB a rounding, 24 with input, weight
  and result; 6 dB below. A missing bias that is small beside the result drowns in that.

ONNX Runtime has no half convolutions on a CPU and computes them in float32, from rounded weights;
bfloat16 graphs are emulated.
An operation whose exact result is all zero says nothing and is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from exporter.errors import ExporterError
from exporter.graph import QUANTIZED_OPS, attributes
from exporter.localization.probe import (
    Noise,
    Place,
    Probe,
    as_they_are,
    float_tensors,
    places,
    steps,
)
from exporter.parity.comparison import MAX_SQNR_DB, FloatArray
from exporter.parity.deviation import Localization, OperationError
from exporter.running.onnx_runner import Batch

Doubles = npt.NDArray[np.float64]
_INTEGERS = (TensorProto.INT8, TensorProto.UINT8)
_ROUNDING: dict[int, tuple[float, float]] = {
    # explained dB, limit dB
    TensorProto.FLOAT: (144.0, 100.0),
    TensorProto.FLOAT16: (66.0, 51.0),
    TensorProto.BFLOAT16: (48.0, 33.0),
}
_FLOAT8 = (24.0, 18.0)
_CORRECTED = (60.0, 35.0)
_INT8_MARGIN_DB = 6.0
RULE = (
    "An operation deviates where its error is more than rounding explains: below 100 dB in "
    "float32, 51 dB in half, in INT8 6 dB below what the steps of input and weights explain."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPair:
    """The last good stage's graph, and one that should compute the same.

    ``reference`` names the stage of ``good``. Both have the same units: no channel was rescaled
    between them.
    """

    reference: str
    good: onnx.ModelProto
    bad: onnx.ModelProto

    def localize(self, stage: str, batch: Batch) -> Localization | None:
        """:func:`localize`, as whoever judges a stage calls it."""
        return localize(stage, self, batch)


class Suspect(Protocol):
    """A stage's result beside the last good one, which can be searched if the stage fails."""

    def localize(self, stage: str, batch: Batch) -> Localization | None:
        """Every operation held against the good one; None where that cannot be done."""
        ...


def localize(stage: str, pair: GraphPair, batch: Batch) -> Localization | None:
    """Every operation of ``pair.bad`` held against the good graph, on ``batch``.

    None where the graphs share no tensor, or ONNX Runtime cannot run one of them up to a tensor
    inside: localization explains a failure and never replaces it.
    """
    exact_types = float_tensors(pair.good)
    tensors = [name for name, kind in exact_types.items() if kind == TensorProto.FLOAT]
    at = places(tensors, pair.bad)
    if not at:
        return None
    try:
        noises, powers = _compare(pair, at, batch)
    except ExporterError:
        return None
    rounding = _Rounding.of(pair)
    operations = {name: node for node in pair.good.graph.node for name in node.output}
    rows = []
    for place in at:
        noise, node = noises[place.tensor], operations[place.tensor]
        if noise.signal == 0 and math.isfinite(noise.noise):
            continue
        explained, limit = rounding.explained(place, node, powers)
        rows.append(
            OperationError(
                name=node.name or place.tensor,
                operator=node.op_type,
                sqnr_db=noise.sqnr_db,
                explained_db=explained,
                limit_db=limit,
            )
        )
    return Localization(
        stage=stage,
        reference=pair.reference,
        images=len(batch[0]),
        rule=RULE,
        rows=tuple(row for row in rows if row.operator in QUANTIZED_OPS or row.deviates),
    )


def _compare(
    pair: GraphPair, at: Sequence[Place], batch: Batch
) -> tuple[dict[str, Noise], dict[str, Doubles]]:
    """The noise at each place, and the mean square of each channel of every exact tensor."""
    exact_probe = Probe(pair.good, as_they_are([place.tensor for place in at]))
    cut = Probe(pair.bad, at, given=True)
    inputs = [value.name for value in pair.good.graph.input]
    noises = {place.tensor: Noise() for place in at}
    sums: dict[str, Doubles] = {}
    parts = steps(batch)
    for part in parts:
        exact = exact_probe.run(part)
        found = cut.run(part, exact)
        for name, noise in noises.items():
            noise.add(exact[name], found[name])
        for name, values in {**dict(zip(inputs, part, strict=True)), **exact}.items():
            power = _channel_power(values)
            sums[name] = sums[name] + power if name in sums else power
    return noises, {name: total / len(parts) for name, total in sums.items()}


def _channel_power(values: FloatArray) -> Doubles:
    """E[x_c^2] ``[C]``; the channels are the second axis, where there is one."""
    squares = values.astype(np.float64) ** 2
    axes = tuple(axis for axis in range(values.ndim) if axis != 1)
    return np.atleast_1d(squares.mean(axis=axes))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rounding:
    """What rounding explains at each operation of the bad graph."""

    producers: Mapping[str, onnx.NodeProto]
    constants: Mapping[str, onnx.TensorProto]
    weights: Mapping[str, onnx.TensorProto]
    quantized: bool

    @classmethod
    def of(cls, pair: GraphPair) -> _Rounding:
        return cls(
            producers={name: node for node in pair.bad.graph.node for name in node.output},
            constants={tensor.name: tensor for tensor in pair.bad.graph.initializer},
            weights={tensor.name: tensor for tensor in pair.good.graph.initializer},
            quantized=any(node.op_type == "DequantizeLinear" for node in pair.bad.graph.node),
        )

    def explained(
        self, place: Place, good: onnx.NodeProto, powers: Mapping[str, Doubles]
    ) -> tuple[float, float]:
        """In dB: what rounding explains, and the limit below which an error is none."""
        node = self.producers[place.found]
        quantizers = [self._quantizer(name) for name in node.input[:2]]
        steps_of = [found for found in quantizers if found is not None]
        if not steps_of:
            if self.quantized and good.op_type in QUANTIZED_OPS:
                return _CORRECTED
            return _ROUNDING.get(place.data_type, _ROUNDING[TensorProto.FLOAT])
        if any(self._stored_in(found) not in _INTEGERS for found in steps_of):
            return _FLOAT8
        explained = self._integer_noise(good, quantizers, powers, place.tensor)
        return explained, explained - _INT8_MARGIN_DB

    def _quantizer(self, name: str) -> onnx.NodeProto | None:
        node = self.producers.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _stored_in(self, quantizer: onnx.NodeProto) -> int:
        """The data type of a quantizer's zero point; INT8 is what it is without one."""
        names = list(quantizer.input)
        zero = self.constants.get(names[2]) if len(names) > 2 else None
        return zero.data_type if zero is not None else TensorProto.INT8

    def _step(self, quantizer: onnx.NodeProto | None) -> Doubles:
        if quantizer is None or quantizer.input[1] not in self.constants:
            return np.zeros(1)
        steps_of = numpy_helper.to_array(self.constants[quantizer.input[1]])
        return np.asarray(steps_of, dtype=np.float64).ravel()

    def _integer_noise(
        self,
        good: onnx.NodeProto,
        quantizers: Sequence[onnx.NodeProto | None],
        powers: Mapping[str, Doubles],
        tensor: str,
    ) -> float:
        if good.input[0] not in powers:
            return _FLOAT8[0]
        input_power = powers[good.input[0]]
        rounding_in = float(self._step(quantizers[0])[0]) ** 2 / 12
        tensor_of = self.weights.get(good.input[1]) if len(good.input) > 1 else None
        if tensor_of is None or good.op_type not in QUANTIZED_OPS:
            # It passes its input on: the same noise, channel by channel.
            return _decibel(float(input_power.sum()), rounding_in * len(input_power))
        weights = _by_output(numpy_helper.to_array(tensor_of).astype(np.float64), good)
        outputs, taps = len(weights), weights.shape[-1]
        if good.op_type == "MatMul":
            # The second axis of its operand need not be the one that it sums over.
            input_power = np.full(weights.shape[1], input_power.mean())
        terms = weights.reshape(outputs, -1)
        groups = len(input_power) // weights.shape[1]
        read = input_power.reshape(groups, -1).sum(axis=1) * taps
        per_output = np.repeat(read, outputs // groups)
        rounding_weights = self._step(quantizers[1]) ** 2 / 12
        noise = rounding_in * (terms**2).sum(axis=1) + rounding_weights * per_output
        return _decibel(float(powers[tensor].mean()) * outputs, float(noise.sum()))


def _by_output(weights: Doubles, node: onnx.NodeProto) -> Doubles:
    """``[O, I, taps]``."""
    if node.op_type == "Conv":
        return weights.reshape(*weights.shape[:2], -1)
    transposed = node.op_type == "Gemm" and attributes(node).get("transB", 0)
    return (weights if transposed else weights.T)[..., None]


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0:
        return MAX_SQNR_DB
    return 10 * math.log10(max(signal, 1e-30) / noise)
