"""Calibrates, equalizes, rounds and corrects a plain graph: one pass over the images, any rung.

:func:`observe_chain` collects in one pass what every rung of the ladder needs;
:func:`quantize_observed` makes the graphs of one rung from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from calibration.chain import Chain, ChainError
from calibration.convolution import FloatArray, run_chain
from calibration.images import Preprocess
from calibration.moments import ChannelObserver, ChannelStatistics
from calibration.recipe import Outcome, RecipeOptions, quantize_by_recipe
from calibration.recipe import Recipe as Rung
from calibration.sample import ImageSample, sample_size
from calibration.table import CalibrationTable, TensorRange
from exporter.errors import GateFailedError, InputError
from exporter.graph import with_outputs
from exporter.image_set import ImageSet
from exporter.onnx_runner import OnnxRunner
from exporter.plain_chain import PlainChain, with_chain
from exporter.quantize import RoundedWeight, quantize

_CHECKED_IMAGES = 4
_MAX_RELATIVE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """What one pass over the calibration images found at the chain's boundaries.

    ``sample`` ``[n, C, H, W]`` is what second-order rounding works on; ``data_sha256`` and
    ``image_count`` belong to all the images.
    """

    statistics: tuple[ChannelStatistics, ...]
    sample: FloatArray
    data_sha256: str
    image_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGraphs:
    """The equalized float graph, the Q/DQ graph made from it, and the table that binds them."""

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable


def observe_chain(
    model: onnx.ModelProto,
    plain: PlainChain,
    images: ImageSet,
    progress: Callable[[float], None] = lambda _fraction: None,
) -> Observed:
    """One pass of ``model`` over the calibration images.

    Raises:
        InputError: if an image cannot be read, or there are none.
        GateFailedError: if the chain computes something else than ``model``.
    """
    (image_name, *inner) = plain.boundaries
    runner = OnnxRunner(with_outputs(model, inner))
    widths = [s.weight.shape[1] * s.groups for s in plain.chain.stages]
    observers = [ChannelObserver(w) for w in (*widths, len(plain.chain.stages[-1].weight))]
    sample: ImageSample | None = None
    seen = 0
    for (batch,) in images.batches():
        if sample is None:
            sample = ImageSample(sample_size((batch.shape[2], batch.shape[3])))
        sample.update(batch)
        found = {image_name: batch, **runner.run((batch,))}
        for name, observer in zip(plain.boundaries, observers, strict=True):
            observer.update(found[name])
        seen += len(batch)
        progress(seen / images.count)
    if sample is None:
        raise InputError("there are no calibration images")
    _require_same(model, plain.chain, sample.images[:_CHECKED_IMAGES])
    return Observed(
        statistics=tuple(observer.statistics() for observer in observers),
        sample=sample.images,
        data_sha256=images.to_json()["sha256"],
        image_count=images.count,
    )


def quantize_observed(
    model: onnx.ModelProto,
    plain: PlainChain,
    observed: Observed,
    recipe: str,
    *,
    options: RecipeOptions | None = None,
    preprocess: Preprocess | None = None,
) -> QuantizedGraphs:
    """Equalize, round and correct ``model`` by one of calibration.recipe's rungs.

    The classifier and the options' ``keep_float`` stay float.

    Raises:
        InputError: if ``keep_float`` names no convolution.
        GateFailedError: if equalization would change the float network.
    """
    options = options or RecipeOptions()
    outcome = _outcome(plain.chain, observed, Rung(recipe), options)
    done = outcome.quantized
    equalized = with_chain(model, outcome.equalization.chain)
    biases = {name: stage.bias for name, stage in done.stages.items()}
    corrected = with_chain(model, done.chain, biases)
    nodes = {node.name: node for node in model.graph.node}
    rounded = {
        nodes[name].input[1]: RoundedWeight(integers=stage.weight, scales=stage.weight_scales)
        for name, stage in done.stages.items()
    }
    table = _table(equalized, plain, observed, outcome, method=recipe, preprocess=preprocess)
    kept = [*options.keep_float, model.graph.node[-1].name]
    return QuantizedGraphs(
        model=equalized,
        graph=quantize(corrected, table, keep_float=kept, rounded=rounded),
        table=table,
    )


def _table(
    equalized: onnx.ModelProto,
    plain: PlainChain,
    observed: Observed,
    outcome: Outcome,
    *,
    method: str,
    preprocess: Preprocess | None,
) -> CalibrationTable:
    stages = outcome.quantized.stages
    boundary = dict(zip([s.name for s in plain.chain.stages], plain.boundaries, strict=False))
    statistics = dict(zip(boundary, outcome.equalization.statistics, strict=False))
    return CalibrationTable(
        method=method,
        activation_scales={boundary[n]: float(s.input_scale) for n, s in stages.items()},
        ranges={
            boundary[name]: TensorRange(
                minimum=float(statistics[name].minimum.min()),
                maximum=float(statistics[name].maximum.max()),
                threshold=float(outcome.clips[name].clip),
            )
            for name in stages
        },
        onnx_sha256=hashlib.sha256(equalized.SerializeToString()).hexdigest(),
        data_sha256=observed.data_sha256,
        image_count=observed.image_count,
        preprocess=preprocess.to_json() if preprocess else {},
    )


def _outcome(chain: Chain, observed: Observed, rung: Rung, options: RecipeOptions) -> Outcome:
    known = {stage.name for stage in chain.stages}
    unknown = sorted(set(options.keep_float) - known)
    if unknown:
        raise InputError(
            f"no convolution is called {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    try:
        return quantize_by_recipe(rung, chain, observed.statistics, observed.sample, options)
    except ChainError as error:
        raise GateFailedError(f"equalization failed: {error}") from error


def _require_same(model: onnx.ModelProto, chain: Chain, images: np.ndarray) -> None:
    (expected,) = OnnxRunner(model).run((images,)).values()
    error = float(np.max(np.abs(run_chain(chain, images) - expected)))
    span = float(np.ptp(expected)) or 1.0
    if not error <= _MAX_RELATIVE * span:
        raise GateFailedError(
            f"the chain read from the graph differs from it by {error / span:.2g} of the range"
        )
