"""What the float chain does on some images: statistics, means, histograms.

Each is one pass, stage by stage. A stage's mean result over images and positions is linear in its
input's mean patch, ``E[W * x + b] = W mean_patch(x) + b``, so it costs no look at the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibration.chain import Array, Chain, ConvStage, Float64Array
from calibration.convolution import (
    NUMPY,
    FloatArray,
    Kernels,
    channel_first,
    classify,
    mean_patch,
    run_stage,
)
from calibration.moments import ChannelStatistics
from calibration.observer import TensorObserver


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FloatPass:
    """What the float chain did on some images.

    ``statistics`` of every boundary and each image's largest magnitudes there ``[N, C]``, the mean
    of each stage's result with its bias ``[O]``, and the logits ``[N, K]``.
    """

    statistics: tuple[ChannelStatistics, ...]
    peaks: tuple[FloatArray, ...]
    means: tuple[Float64Array, ...]
    logits: Array

    def divided_by(self, scales: Sequence[Float64Array | None]) -> FloatPass:
        """That of the chain whose stages' outputs are divided by ``scales`` (None: by 1)."""
        factors = [1.0 if scale is None else scale for scale in scales]
        moved = (
            found.divided_by(np.broadcast_to(factor, found.mean.shape))
            for found, factor in zip(self.statistics, [1.0, *factors], strict=True)
        )
        means = (mean / factor for mean, factor in zip(self.means, factors, strict=True))
        peaks = (found / factor for found, factor in zip(self.peaks, [1.0, *factors], strict=True))
        return replace(self, statistics=tuple(moved), means=tuple(means), peaks=tuple(peaks))


def mean_result(stage: ConvStage, x: FloatArray) -> Float64Array:
    """The mean over images and positions of ``W * x``, without the bias: ``[O]``."""
    kernel = stage.weight.reshape(stage.groups, stage.out_channels // stage.groups, -1)
    found = np.einsum("gon,gn->go", kernel, mean_patch(stage, x), dtype=np.float64)
    return np.asarray(found.ravel())


def survey(chain: Chain, images: FloatArray, kernels: Kernels = NUMPY) -> FloatPass:
    """Run ``chain`` on ``images`` ``[N, C, H, W]``. Deterministic."""
    x = channel_first(images)
    boundaries, means = [ChannelStatistics.with_peaks(x)], []
    for stage in chain.stages:
        means.append(mean_result(stage, x) + stage.bias)
        x = run_stage(stage, x, kernels)
        boundaries.append(ChannelStatistics.with_peaks(x))
    statistics, peaks = zip(*boundaries, strict=True)
    logits = classify(chain, x)
    return FloatPass(statistics=statistics, peaks=peaks, means=tuple(means), logits=logits)


def observe_inputs(
    chain: Chain, images: FloatArray, kernels: Kernels = NUMPY
) -> tuple[list[TensorObserver], Array]:
    """Histograms of every stage's input, and the logits ``[N, K]``, on ``images``."""
    observers = [TensorObserver() for _ in chain.stages]
    x = channel_first(images)
    for stage, observer in zip(chain.stages, observers, strict=True):
        observer.update(x)
        x = run_stage(stage, x, kernels)
    return observers, classify(chain, x)
