"""Calibrates, equalizes, rounds and corrects a plain graph: one pass over the images, any rung.

:func:`observe_chain` collects in one pass what every rung of the ladder needs;
:func:`quantize_observed` makes the graphs of one rung from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from calibration.chain import Chain, ChainError
from calibration.convolution import FloatArray
from calibration.images import Preprocess
from calibration.moments import ChannelStatistics, RangeObserver
from calibration.recipe import Outcome, RecipeOptions, quantize_by_recipe
from calibration.recipe import Recipe as Rung
from calibration.sample import ImageSample, sample_size
from calibration.sequential import QuantizedChain
from calibration.survey import FloatPass, survey
from calibration.table import CalibrationTable, TensorRange
from exporter.errors import GateFailedError, InputError
from exporter.graph import graph_sha256, require_nodes, with_outputs
from exporter.quantization.full_range import use_full_range
from exporter.quantization.onnx_kernels import OnnxKernels
from exporter.quantization.plain_chain import PlainChain, with_chain
from exporter.quantize import RoundedWeight, quantize
from exporter.running.image_set import ImageSet
from exporter.running.onnx_runner import OnnxRunner

_CHECKED_IMAGES = 4
_MAX_RELATIVE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """What one pass over the calibration images found at the chain's boundaries.

    ``statistics`` have the ranges of all images and the moments of ``sample`` ``[n, C, H, W]``,
    which is what second-order rounding works on; ``floats`` is the chain's run of the sample;
    ``data_sha256`` and ``image_count`` belong to all the images.
    """

    statistics: tuple[ChannelStatistics, ...]
    floats: FloatPass
    sample: FloatArray
    data_sha256: str
    image_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGraphs:
    """The equalized float graph, the Q/DQ graph made from it, and the table that binds them.

    ``outcome`` is the chain of both, before it was written into graphs.
    """

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable
    outcome: Outcome


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
    found = _stream(model, plain, images, progress)
    sample = found.sampler.images
    floats = survey(plain.chain, sample, OnnxKernels())
    _require_same(model, sample[:_CHECKED_IMAGES], floats.logits[:_CHECKED_IMAGES])
    return Observed(
        statistics=tuple(
            s.within(observer) for s, observer in zip(floats.statistics, found.ranges, strict=True)
        ),
        floats=floats,
        sample=sample,
        data_sha256=images.to_json()["sha256"],
        image_count=images.count,
    )


def observe_ranges(
    model: onnx.ModelProto,
    plain: PlainChain,
    images: ImageSet,
    progress: Callable[[float], None] = lambda _fraction: None,
) -> tuple[RangeObserver, ...]:
    """The range of every channel of the chain's boundaries, in one pass of ``model``.

    Raises:
        InputError: if an image cannot be read, or there are none.
    """
    return _stream(model, plain, images, progress).ranges


def _stream(
    model: onnx.ModelProto,
    plain: PlainChain,
    images: ImageSet,
    progress: Callable[[float], None],
) -> _Seen:
    """The range of every boundary over all images, and the sample of them; in parts."""
    stages = plain.chain.stages
    widths = (*(stage.in_channels for stage in stages), stages[-1].out_channels)
    channels = dict(zip(plain.boundaries, widths, strict=True))
    look = partial(_look, _with_ranges(model, plain), channels)
    return reduce(_Seen.merge, images.in_parts(look, progress))


def _look(
    model: onnx.ModelProto,
    channels: Mapping[str, int],
    images: ImageSet,
    progress: Callable[[float], None],
) -> _Seen:
    """One look at ``images`` by a graph of :func:`_with_ranges`, of boundaries so wide."""
    runner = OnnxRunner(model)
    observers = [RangeObserver(width) for width in channels.values()]
    sampler = Sampler()
    seen = 0
    for (batch,) in images.batches():
        sampler.update(batch)
        found = {name: pooled[:, :, 0, 0] for name, pooled in runner.run((batch,)).items()}
        for observer, boundary in zip(observers, channels, strict=True):
            maxima = found[f"{boundary}/max"]
            # Behind a ReLU the least value is the sample's: 0, but for channels that never rest.
            negative = found.get(f"{boundary}/min")
            observer.add(maxima if negative is None else -negative, maxima)
        seen += len(batch)
        progress(seen / images.count)
    return _Seen(ranges=tuple(observers), sampler=sampler)


class Sampler:
    """The sample of a stream: images of the first one's size, for rounding works on one size."""

    def __init__(self) -> None:
        self._sample: ImageSample | None = None
        self._size: tuple[int, int] = (0, 0)

    def update(self, batch: FloatArray) -> None:
        """Consider ``[n, C, H, W]``."""
        size = (batch.shape[2], batch.shape[3])
        if self._sample is None:
            self._sample, self._size = ImageSample(sample_size(size)), size
        if size == self._size:
            self._sample.update(batch)

    def merge(self, other: Sampler) -> Sampler:
        """One that has seen the images of both, those of ``other`` after its own."""
        merged = Sampler()
        merged._sample, merged._size = self._sample, self._size
        if self._sample is None:
            merged._sample, merged._size = other._sample, other._size
        elif other._sample is not None and other._size == self._size:
            merged._sample = self._sample.merge(other._sample)
        return merged

    @property
    def images(self) -> FloatArray:
        """``[n, C, H, W]``; InputError where there were none."""
        if self._sample is None:
            raise InputError("there are no calibration images")
        return self._sample.images


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What one look at some images found; what looks at neighbours found merges exactly."""

    ranges: tuple[RangeObserver, ...]
    sampler: Sampler

    def merge(self, other: _Seen) -> _Seen:
        pairs = zip(self.ranges, other.ranges, strict=True)
        return _Seen(
            ranges=tuple(left.merge(right) for left, right in pairs),
            sampler=self.sampler.merge(other.sampler),
        )


def _with_ranges(model: onnx.ModelProto, plain: PlainChain) -> onnx.ModelProto:
    """A copy of ``model`` that returns ``[n, C, 1, 1]`` a boundary: its maxima, and where values
    may be negative the maxima of its negative.

    A global max pooling reads the layout that convolutions write; a general reduction would have
    every tensor copied into another one first.
    """
    wanted = [("max", boundary) for boundary in plain.boundaries]
    wanted += [("min", boundary) for boundary in _signed(plain)]
    reduced = with_outputs(model, [f"{boundary}/{end}" for end, boundary in wanted])
    for end, boundary in wanted:
        source = boundary
        if end == "min":
            source = f"{boundary}/negative"
            reduced.graph.node.append(onnx.helper.make_node("Neg", [boundary], [source]))
        pool = onnx.helper.make_node("GlobalMaxPool", [source], [f"{boundary}/{end}"])
        reduced.graph.node.append(pool)
    return reduced


def _signed(plain: PlainChain) -> list[str]:
    """The boundaries that no ReLU is in front of."""
    before = (None, *plain.chain.stages)
    return [
        boundary
        for boundary, stage in zip(plain.boundaries, before, strict=True)
        if stage is None or not stage.relu
    ]


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

    The classifier, the convolutions inside gates and the options' ``keep_float`` stay float.

    Raises:
        InputError: if ``keep_float`` names no convolution.
        GateFailedError: if equalization would change the float network.
    """
    options = options or RecipeOptions()
    # What stays float anyway may be asked for too.
    chosen = frozenset(options.keep_float).difference(plain.float_nodes)
    options = replace(options, keep_float=chosen)
    outcome = _outcome(plain.chain, observed, Rung(recipe), options)
    equalized = with_chain(model, outcome.equalization.chain)
    table = _table(model, equalized, plain, observed, outcome, method=recipe, preprocess=preprocess)
    return QuantizedGraphs(
        model=equalized,
        graph=integer_graph(model, plain, outcome.quantized, table, options),
        table=table,
        outcome=outcome,
    )


def integer_graph(
    model: onnx.ModelProto,
    plain: PlainChain,
    done: QuantizedChain,
    table: CalibrationTable,
    options: RecipeOptions,
) -> onnx.ModelProto:
    """The Q/DQ graph of ``model`` with the integers and biases of ``done``."""
    biases = {name: stage.bias for name, stage in done.stages.items()}
    nodes = {node.name: node for node in model.graph.node}
    rounded = {
        nodes[name].input[1]: RoundedWeight(integers=stage.weight, scales=stage.weight_scales)
        for name, stage in done.stages.items()
    }
    graph = quantize(
        with_chain(model, done.chain, biases),
        table,
        keep_float=[*options.keep_float, *plain.float_nodes],
        rounded=rounded,
        per_tensor_weights=options.per_tensor_weights,
    )
    return use_full_range(graph, table.unsigned)


def _table(
    model: onnx.ModelProto,
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
        onnx_sha256=graph_sha256(equalized),
        data_sha256=observed.data_sha256,
        image_count=observed.image_count,
        preprocess=preprocess.to_json() if preprocess else {},
        source_sha256=graph_sha256(model),
        channel_scales={
            stage.name: tuple(map(float, found))
            for stage, found in zip(plain.chain.stages, outcome.equalization.scales, strict=True)
            if found is not None
        },
        unsigned=frozenset(boundary[name] for name, stage in stages.items() if stage.unsigned),
    )


def _outcome(chain: Chain, observed: Observed, rung: Rung, options: RecipeOptions) -> Outcome:
    require_nodes(options.keep_float, (stage.name for stage in chain.stages), "convolution")
    try:
        return quantize_by_recipe(
            rung,
            chain,
            observed.statistics,
            observed.sample,
            options,
            floats=observed.floats,
            kernels=OnnxKernels(),
        )
    except ChainError as error:
        raise GateFailedError(f"equalization failed: {error}") from error


def _require_same(model: onnx.ModelProto, images: FloatArray, found: npt.NDArray[Any]) -> None:
    """``found`` are the chain's logits on ``images``."""
    expected = OnnxRunner(model)(images)
    error = float(np.max(np.abs(found - expected)))
    span = float(np.ptp(expected)) or 1.0
    if not error <= _MAX_RELATIVE * span:
        raise GateFailedError(
            f"the chain read from the graph differs from it by {error / span:.2g} of the range"
        )
