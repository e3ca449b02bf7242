"""Which stages INT8 hurts most, and what keeping some of them in half costs.

Both are predicted in one backward sweep over a few images. With e_l the error that stage l's
integers and input rounding make in its result on float inputs, less its mean (which the bias
takes), and h_l the gradient of a random projection of the logits (:mod:`calibration.effects`), the
stage adds the power ``mean (h_l . e_l)^2`` to the logits. Errors of different stages are
independent, so powers add:

    SQNR(kept) = 10 log10( mean |logits|^2 / sum over quantized l of power_l ).

Keeping a stage in half removes its power and takes its MACs off the INT8 share. Stages are kept in
the order of power per MAC, the greedy order of the knapsack problem: every point of the list is the
best for its share of MACs among all choices on the list's upper hull.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.chain import Chain
from calibration.convolution import NUMPY, FloatArray, Kernels, run_chain
from calibration.effects import gradients, logit_power
from calibration.sequential import QuantizedChain


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEffect:
    """A stage's error power in one image's logits if it is quantized, and its MACs per image."""

    name: str
    power: float
    macs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """``kept`` stages stay in half: the predicted logits SQNR and the INT8 share of the MACs."""

    kept: tuple[str, ...]
    sqnr_db: float
    int8_share: float


def stage_macs(chain: Chain, image_size: tuple[int, int]) -> tuple[int, ...]:
    """Multiply-accumulates per image of each stage."""
    macs = []
    for stage in chain.stages:
        image_size = stage.output_size(*image_size)
        macs.append(int(stage.weight.size) * image_size[0] * image_size[1])
    return tuple(macs)


def predicted_effects(
    chain: Chain, quantized: QuantizedChain, images: FloatArray, kernels: Kernels = NUMPY
) -> tuple[StageEffect, ...]:
    """The effect of each stage of ``quantized``, which was made from the float ``chain``.

    Stages that were kept float have power 0. ``images`` is ``[N, C, H, W]``; 16 to 64 suffice.
    """
    powers = dict.fromkeys((stage.name for stage in chain.stages), 0.0)
    for step in gradients(chain, images, kernels):
        stage = chain.stages[step.index]
        found = quantized.stages.get(stage.name)
        if found is None:
            continue
        rounded = found.rounded_input(step.x)
        error = kernels.convolution(found.dequantized(stage))(rounded)
        error -= kernels.convolution(stage)(step.x)
        error -= error.mean(axis=(1, 2, 3), keepdims=True)
        powers[stage.name] += logit_power(step.gradient, error) / len(images)
    macs = stage_macs(chain, (images.shape[2], images.shape[3]))
    return tuple(
        StageEffect(name=name, power=power, macs=count)
        for (name, power), count in zip(powers.items(), macs, strict=True)
    )


def signal_power(chain: Chain, images: FloatArray, kernels: Kernels = NUMPY) -> float:
    """Mean of ``|logits|^2`` over ``images``."""
    logits = np.asarray(run_chain(chain, images, kernels), dtype=np.float64)
    return float((logits**2).sum(axis=1).mean())


def pareto(effects: Sequence[StageEffect], signal: float) -> tuple[ParetoPoint, ...]:
    """From all stages in INT8 to none, keeping one more each time; both figures change strictly.

    ``signal`` is the mean power of the float logits.

    Raises:
        ValueError: if there are no effects, or ``signal`` is not positive.
    """
    if not effects or not signal > 0:
        raise ValueError(f"expected stages and a positive signal, not {len(effects)} and {signal}")
    order = sorted(effects, key=lambda effect: -effect.power / effect.macs)
    total = sum(effect.macs for effect in order)
    points = []
    for count in range(len(order) + 1):
        rest = order[count:]
        noise = math.fsum(effect.power for effect in rest)
        points.append(
            ParetoPoint(
                kept=tuple(effect.name for effect in order[:count]),
                sqnr_db=10 * math.log10(signal / noise) if noise > 0 else math.inf,
                int8_share=sum(effect.macs for effect in rest) / total,
            )
        )
    return tuple(points)


def first_passing(
    points: Sequence[ParetoPoint], passes: Callable[[ParetoPoint], bool]
) -> ParetoPoint | None:
    """The point with the fewest stages in half that ``passes`` a measurement, or None.

    Bisects: ``passes`` is taken to hold for all points behind one that passes. It is called about
    log2 of the list's length times, since each call runs the network.
    """
    low, high = 0, len(points)
    while low < high:
        middle = (low + high) // 2
        if passes(points[middle]):
            high = middle
        else:
            low = middle + 1
    return points[low] if low < len(points) else None
