"""Scales that come with the weights: held against what they quantize, and put into a graph.

They are respected, never replaced. What is checked is whether they can be meant:

* *weights*: with ``q = round(w / s)`` a scale that is too large leaves levels unused, one that is
  too small puts many values on the two outermost levels. Training by ``s = max |w| / 127`` gives
  ``max |q| = 127`` with one value in a channel there.
* *activations*: the range ``127 s`` against the largest magnitude seen on calibration images, where
  there are any. Learned ranges clip on purpose, by a factor of two and not of four.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from calibration.images import Preprocess
from calibration.observer import TensorObserver
from calibration.table import IMPORTED, CalibrationTable, TensorRange
from calibration.threshold import LEVELS
from exporter.errors import InputError
from exporter.graph import boundary_tensors, graph_sha256, quantizable
from exporter.quantize import RoundedWeight, quantize

MIN_LARGEST_LEVEL = 64
MAX_SATURATED_SHARE = 0.01
RANGE_RATIOS = (0.25, 4.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerQuantization:
    """One layer's INT8: the float32 scale of its input, and its integers with theirs."""

    input_scale: float
    weight: RoundedWeight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedScales:
    """INT8 as training left it, by layer: ``stage0``, ``stage1.0``, ..., ``linear``.

    A layer that is not there stays float. ``sha256`` is that of the file they came from.
    """

    layers: Mapping[str, LayerQuantization]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedGraph:
    """The Q/DQ graph and the table of its scales.

    ``float_convolutions`` names those that stay float; ``notes`` say what looks wrong about the
    scales.
    """

    graph: onnx.ModelProto
    table: CalibrationTable
    float_convolutions: tuple[str, ...]
    notes: tuple[str, ...]


def quantize_trained(
    model: onnx.ModelProto,
    scales: TrainedScales,
    *,
    keep_float: Collection[str] = (),
    observers: Mapping[str, TensorObserver] | None = None,
    image_count: int = 0,
    preprocess: Preprocess | None = None,
) -> TrainedGraph:
    """Quantize the float graph of a plain RepVGG, as ``onnx_export`` names it, by ``scales``.

    ``keep_float`` names nodes that stay float beside those that have no scales. ``observers`` are
    statistics of the graph's boundary tensors over ``image_count`` images, for the checks and the
    table's ranges; without them a range is what the scale covers. ``preprocess`` goes into the
    table.

    Raises:
        InputError: if ``keep_float`` names no Conv or Gemm, or none with scales is left.
    """
    left: list[onnx.NodeProto] = []
    chosen: dict[str, float] = {}
    rounded: dict[str, RoundedWeight] = {}
    for node in quantizable(model):
        layer = scales.layers.get(node.input[1].removesuffix(".weight"))
        if layer is None or node.name in keep_float:
            left.append(node)
        else:
            chosen[node.input[0]] = layer.input_scale
            rounded[node.input[1]] = layer.weight
    if not chosen:
        raise InputError("no layer with scales is left to compute in INT8")
    table = CalibrationTable(
        method=IMPORTED,
        activation_scales=chosen,
        ranges={name: _range(scale, (observers or {}).get(name)) for name, scale in chosen.items()},
        onnx_sha256=graph_sha256(model),
        data_sha256=scales.sha256,
        image_count=image_count,
        preprocess=preprocess.to_json() if preprocess else {},
    )
    order = [name for name in boundary_tensors(model) if name in chosen]
    observed = {name: observers[name] for name in order if name in observers} if observers else {}
    return TrainedGraph(
        graph=quantize(
            model, table, keep_float={*keep_float, *(n.name for n in left)}, rounded=rounded
        ),
        table=table,
        float_convolutions=tuple(n.name for n in left if n.op_type == "Conv"),
        notes=(*weight_notes(rounded), *activation_notes(chosen, observed)),
    )


def weight_notes(weights: Mapping[str, RoundedWeight]) -> tuple[str, ...]:
    """Warnings about weights whose integers do not fill, or overflow, the range of int8."""
    notes = []
    for name, weight in weights.items():
        magnitudes = np.abs(weight.integers.astype(np.int16))
        largest = int(magnitudes.max())
        saturated = float(np.mean(magnitudes >= LEVELS))
        # A channel's largest value stands on the outermost level by construction.
        allowed = MAX_SATURATED_SHARE + len(weight.scales) / weight.integers.size
        if largest < MIN_LARGEST_LEVEL:
            notes.append(
                f"{name}: its integers reach {largest} of {LEVELS}: the scale is "
                f"{LEVELS / max(largest, 1):.1f} times too large, INT8 loses precision"
            )
        if saturated > allowed:
            notes.append(
                f"{name}: {100 * saturated:.1f} % of its integers stand on the outermost levels: "
                "the scale is too small, weights are clipped"
            )
    return tuple(notes)


def activation_notes(
    scales: Mapping[str, float], observers: Mapping[str, TensorObserver]
) -> tuple[str, ...]:
    """Warnings about ranges that do not match what the calibration images show."""
    notes = []
    low, high = RANGE_RATIOS
    for name, observer in observers.items():
        covered, seen = LEVELS * scales[name], observer.abs_max
        if seen > 0 and not low <= covered / seen <= high:
            words = "clips most of it" if covered < seen else "leaves most levels unused"
            notes.append(
                f"{name}: its scale covers {covered:.3g}, the calibration images reach {seen:.3g}: "
                f"it {words}; are they preprocessed as in training?"
            )
    return tuple(notes)


def _range(scale: float, observer: TensorObserver | None) -> TensorRange:
    clip = LEVELS * scale
    return TensorRange(
        minimum=-clip if observer is None else observer.minimum,
        maximum=clip if observer is None else observer.maximum,
        threshold=clip,
    )
