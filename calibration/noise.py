"""How much quantization noise reaches the logits: a model on statistics, without running anything.

A uniform step D adds noise of variance D^2 / 12. With s_x = A / 127 the step of a stage's input and
s_w,o = max_i,t |W_oit| / 127 that of a row of its weight, the error of output channel o at one
position is, for independent roundings,

    activation  s_x^2 / 12  sum_i |W_oi|^2 p_i        p_i = P(x_i > 0): zero is exact
    weight      gamma s_w,o^2 / 12  k sum_i var(x_i)  k taps; gamma < 1 for second-order rounding

(the mean of x makes the weight's error a constant, which bias correction takes away). It reaches
the logits with the weight G_o, the squared effect of a unit error in channel o summed over the
positions of an image; :func:`calibration.effects.measured_effects` measures it. On statistics alone
it is *propagated*. Behind the last convolution it is the classifier's column behind an average over
n positions, and in front of each stage errors add up as variances through the ReLU and the kernel:

    g_L-1,o = p_o |V_o|^2 / n^2,   g_l,o = p_o sum_o' g_l+1,o' |W_l+1,o'o|^2 / (stride_y stride_x),

and G = n_l g_l for n_l positions. Adding variances is right within a stage but too low from stage
to stage, where trained kernels pass a signal on coherently: for RepVGG-A0 by 1e5 at the first. So
propagated effects may weigh the channels of one stage; only measured ones may compare stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibration.chain import Chain, ChainError, ConvStage, Float64Array
from calibration.moments import ChannelStatistics
from calibration.threshold import LEVELS

SECOND_ORDER = 0.4
"""gamma for second-order rounding, measured on RepVGG; 1 for rounding to nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNoise:
    """Error power in one image's logits, summed over classes, from one stage's two quantizers."""

    name: str
    activation: float
    weight: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.activation + self.weight


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


def propagated_effects(
    chain: Chain, statistics: Sequence[ChannelStatistics], image_size: tuple[int, int]
) -> list[Float64Array]:
    """G ``[O]`` of each stage from statistics alone: what unit noise in a channel adds.

    Statistics do not say how far a gate is open: it counts as 1.

    Raises:
        ChainError: if the statistics or the image size do not fit the chain.
    """
    require_statistics(chain, statistics)
    positions = []
    size = image_size
    for stage in chain.stages:
        size = stage.output_size(*size)
        positions.append(size[0] * size[1])
    found: list[Float64Array] = []
    effect = (chain.classifier.weight.astype(np.float64) ** 2).sum(axis=0) / positions[-1] ** 2
    for index in reversed(range(len(chain.stages))):
        stage = chain.stages[index]
        effect = effect * passing(stage, statistics[index + 1])
        found.append(effect * positions[index])
        energy = (stage.by_group().astype(np.float64) ** 2).sum(axis=3)
        spread = np.einsum("go,goi->gi", effect.reshape(stage.groups, -1), energy)
        effect = spread.ravel() / (stage.stride[0] * stage.stride[1])
    return found[::-1]


def predict_noise(
    chain: Chain,
    statistics: Sequence[ChannelStatistics],
    effects: Sequence[Float64Array],
    *,
    gamma: float = SECOND_ORDER,
) -> tuple[StageNoise, ...]:
    """The error power that quantizing each stage, and nothing else, adds to one image's logits.

    Activations are taken as clipped at their maximum, weights as scaled per output channel.

    Raises:
        ChainError: if the statistics or the effects do not fit the chain.
    """
    require_statistics(chain, statistics)
    require_effects(chain, effects)
    noises = []
    for index, stage in enumerate(chain.stages):
        found = statistics[index]
        before = chain.stages[index - 1] if index else None
        kernel = np.abs(stage.by_group().astype(np.float64))
        effect = effects[index].reshape(stage.groups, -1)
        step = float(found.abs_max.max()) / LEVELS
        energy = (kernel**2).sum(axis=3)
        reached = passing(before, found).reshape(stage.groups, -1)
        activation = np.einsum("go,goi,gi->", effect, energy, reached)
        largest = kernel.max(axis=(2, 3)) / LEVELS
        power = kernel.shape[3] * found.variance.reshape(stage.groups, -1).sum(axis=1)
        weight = gamma * np.einsum("go,go,g->", effect, largest**2, power)
        noises.append(
            StageNoise(
                name=stage.name,
                activation=step**2 / 12 * float(activation),
                weight=float(weight) / 12,
            )
        )
    return tuple(noises)
