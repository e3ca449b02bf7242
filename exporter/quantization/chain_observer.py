"""One pass of a plain graph over the calibration images, for every rung of the ladder.

Ranges are those of all images; moments and the float network's means are those of a sample. The
pass may be made in parts, whose findings merge exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from calibration.convolution import FloatArray
from calibration.moments import ChannelStatistics, RangeObserver
from calibration.sample import ImageSample, sample_size
from calibration.survey import FloatPass, survey
from exporter.errors import GateFailedError, InputError
from exporter.graph import with_outputs
from exporter.quantization.onnx_kernels import OnnxKernels
from exporter.quantization.plain_chain import PlainChain
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


def _require_same(model: onnx.ModelProto, images: FloatArray, found: npt.NDArray[Any]) -> None:
    """``found`` are the chain's logits on ``images``."""
    expected = OnnxRunner(model)(images)
    error = float(np.max(np.abs(found - expected)))
    span = float(np.ptp(expected)) or 1.0
    if not error <= _MAX_RELATIVE * span:
        raise GateFailedError(
            f"the chain read from the graph differs from it by {error / span:.2g} of the range"
        )
