"""How much quantization noise reaches the logits: the model whose minimum equalization finds.

A uniform step D adds noise of variance D^2 / 12. With s_x = A / 127 the step of a stage's input and
s_w,o = max_i,t |W_oit| / 127 that of a row of its weight, the error of output channel o at one
position is, for independent roundings,

    activation  s_x^2 / 12  sum_i |W_oi|^2 p_i        p_i = P(x_i > 0): zero is exact
    weight      gamma s_w,o^2 / 12  k sum_i var(x_i)  k taps; gamma < 1 for second-order rounding

(the mean of x makes the weight's error a constant, which bias correction takes away). It reaches
the logits with the weight G_o, the squared effect of a unit error in channel o summed over the
positions of an image, which :func:`calibration.effects.measured_effects` measures. Statistics alone
do not give it: errors added up as variances from stage to stage miss that trained kernels pass a
signal on coherently, and are too low by 1e5 at RepVGG-A0's first stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calibration.chain import Chain, ChainError, ConvStage, Float64Array
from calibration.moments import ChannelStatistics

SECOND_ORDER = 0.4
"""gamma for second-order rounding, measured on RepVGG; 1 for rounding to nearest."""


def passing(stage: ConvStage | None, statistics: ChannelStatistics) -> Float64Array:
    """The share of positions where a channel of ``stage``'s output is not a ReLU's zero."""
    if stage is None or not stage.relu:
        return np.ones_like(statistics.positive)
    return statistics.positive


def require_statistics(chain: Chain, statistics: Sequence[ChannelStatistics]) -> None:
    """Raises ChainError unless there is one entry per boundary, ``len(stages) + 1``, that fits."""
    if len(statistics) != len(chain.stages) + 1:
        raise ChainError(
            f"{len(statistics)} statistics for {len(chain.stages)} stages; expected one for the "
            "input of each and one for the classifier's"
        )
    channels = [stage.in_channels for stage in chain.stages] + [chain.stages[-1].out_channels]
    for index, (found, expected) in enumerate(zip(statistics, channels, strict=True)):
        if found.mean.shape != (expected,):
            raise ChainError(
                f"statistics of boundary {index} have {len(found.mean)} channels, not {expected}"
            )


def require_effects(chain: Chain, effects: Sequence[Float64Array]) -> None:
    """Raises ChainError unless there is one ``[O]`` per stage."""
    if [len(stage.weight) for stage in chain.stages] != [len(effect) for effect in effects]:
        raise ChainError("effects do not fit the chain; expected one number per output channel")
