"""FP8: scales by the largest magnitude, and a chain rescaled by powers of two.

A float of 3 bits mantissa rounds small and large numbers alike, so clipping brings nothing: half
the range costs 10 to 15 dB on the trained networks of the benchmarks, and the scale of a tensor is

    s = max |x| / 448

What does matter is the lower end. E4M3 has 15 binades of normal numbers and three of subnormal
ones; where channels of one tensor are far apart, the small ones fall into these. In a chain every
channel's scale can be moved into the next convolution (see :mod:`calibration.equalize`). Powers of
two change no mantissa, neither of the float network nor of FP8 numbers, so there is nothing to
lose: no difference on networks as trained, 1 to 2 dB where channels were rescaled by 2^U(-3, 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from calibration.chain import rescale
from calibration.equalize import binary_scale
from calibration.images import Preprocess
from calibration.observer import ObservationError
from calibration.table import CalibrationTable, TensorRange
from calibration.threshold import MIN_SCALE
from exporter.calibrator import observe_images
from exporter.errors import InputError
from exporter.graph import graph_sha256, quantizable, require_nodes
from exporter.quantization.chain_observer import observe_ranges
from exporter.quantization.plain_chain import PlainChain, with_chain
from exporter.quantize import FP8, quantize
from exporter.running.image_set import ImageSet

METHOD = "minmax"
Range = tuple[float, float]
Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Options:
    """``keep_float`` names nodes that stay float."""

    keep_float: tuple[str, ...] = ()
    per_tensor_weights: bool = False
    preprocess: Preprocess | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Graphs:
    """The float graph to publish, the Q/DQ graph made from it, and its scales."""

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable
    kept_float: tuple[str, ...] = ()


def quantize_fp8(
    model: onnx.ModelProto,
    chain: PlainChain | None,
    images: ImageSet,
    options: Fp8Options,
    progress: Progress,
) -> Fp8Graphs:
    """Observe the calibration images with ``model`` and quantize; ``chain`` is what it is, if one.

    A chain's gates and classifier stay float, as at INT8.

    Raises:
        InputError: if an image cannot be read, or ``keep_float`` names no node.
        GateFailedError: if an operator of the graph is not in FP8's opset.
    """
    known = (node.name for node in quantizable(model))
    require_nodes(options.keep_float, known, "convolution")
    kept, scaled = options.keep_float, model
    divisors: dict[str, tuple[float, ...]] = {}
    if chain is None:
        found = observe_images(model, images, progress)
        ranges = {name: (seen.minimum, seen.maximum) for name, seen in found.items()}
    else:
        kept += chain.float_nodes
        scaled, ranges, divisors = _rescaled(model, chain, images, progress)
    read = {node.input[0] for node in quantizable(scaled) if node.name not in kept}
    data = images.to_json()
    table = CalibrationTable(
        method=METHOD,
        activation_scales={name: _scale(ranges[name]) for name in read},
        ranges={name: _table_range(ranges[name]) for name in read},
        onnx_sha256=graph_sha256(scaled),
        source_sha256=graph_sha256(model),
        data_sha256=data["sha256"],
        image_count=data["images"],
        preprocess=options.preprocess.to_json() if options.preprocess else {},
        options={
            "data_type": "float8e4m3fn",
            "keep_float": sorted(options.keep_float),
            "per_tensor_weights": options.per_tensor_weights,
        },
        channel_scales=divisors,
    )
    graph = quantize(
        scaled,
        table,
        kind=FP8,
        keep_float=kept,
        per_tensor_weights=options.per_tensor_weights,
    )
    return Fp8Graphs(model=scaled, graph=graph, table=table, kept_float=kept)


def _rescaled(
    model: onnx.ModelProto, plain: PlainChain, images: ImageSet, progress: Progress
) -> tuple[onnx.ModelProto, dict[str, Range], dict[str, tuple[float, ...]]]:
    """The rescaled graph, the range of each boundary in it, and the divisors by stage."""
    try:
        observers = observe_ranges(model, plain, images, progress)
    except ObservationError as error:
        raise InputError(f"calibration failed: {error}") from error
    peaks = [np.maximum(np.abs(seen.minimum), np.abs(seen.maximum)) for seen in observers]
    stages = plain.chain.stages
    scales = [
        binary_scale(peak) if stage.scalable else None
        for stage, peak in zip(stages, peaks[1:], strict=True)
    ]
    ranges: dict[str, Range] = {}
    for name, seen, scale in zip(plain.boundaries, observers, [None, *scales], strict=True):
        divisor = 1.0 if scale is None else scale
        ranges[name] = (
            float((seen.minimum / divisor).min()),
            float((seen.maximum / divisor).max()),
        )
    divisors = {
        stage.name: tuple(map(float, scale))
        for stage, scale in zip(stages, scales, strict=True)
        if scale is not None
    }
    return with_chain(model, rescale(plain.chain, scales)), ranges, divisors


def _largest(found: Range) -> float:
    """An all-zero tensor has no range: 1, at which zero stays exact."""
    return max(abs(found[0]), abs(found[1])) or 1.0


def _scale(found: Range) -> float:
    return max(float(np.float32(_largest(found) / FP8.largest)), MIN_SCALE)


def _table_range(found: Range) -> TensorRange:
    minimum, maximum = found
    return TensorRange(minimum=minimum, maximum=maximum, threshold=_largest(found))
