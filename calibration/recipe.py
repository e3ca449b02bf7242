"""The rungs of the INT8 ladder, from plain scales to the full stack.

    minmax, percentile, mse, entropy   one clip method for every tensor, weights rounded to nearest
    equalize                           noise-model equalization, min-max clips, bias correction
    full                               equalization, clips chosen by their effect on the logits,
                                       second-order rounding, bias correction

Every rung is the same road, with stages left out:

    statistics -> effects -> equalize (checked) -> clip values -> sequential quantization

``images`` is the sample of :mod:`calibration.sample`; statistics come from all calibration images.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from calibration.chain import Chain, ChainError
from calibration.clipping import best_clip, candidate_clips
from calibration.convolution import FloatArray, channel_first, run_stage
from calibration.effects import clip_effects, measured_effects
from calibration.equalize import (
    Equalization,
    EqualizeOptions,
    Scaling,
    equalize,
    require_equal,
)
from calibration.moments import ChannelStatistics
from calibration.observer import TensorObserver
from calibration.sample import sample_size
from calibration.sequential import QuantizedChain, SequentialOptions, quantize_chain

_CHECKED = 8
# Backward passes: 16 images of 224 x 224, up to 32 smaller ones. 128 give the same choices.
_EFFECT_IMAGES = 32
_BATCH = 8


class Recipe(str, Enum):
    """The rungs, in the order in which ``auto`` climbs them."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
    EQUALIZE = "equalize"
    FULL = "full"

    @property
    def equalizes(self) -> bool:
        """Whether the rung rescales the chain and corrects biases."""
        return self in (Recipe.EQUALIZE, Recipe.FULL)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeOptions:
    """What holds for every rung."""

    power_of_two: bool = False
    per_tensor_weights: bool = False
    keep_float: Collection[str] = field(default=frozenset())


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipChoice:
    """The clip value of one stage's input, the method it comes from, and what else was tried.

    ``effects`` is the error power in the logits by method; empty where nothing was tried.
    """

    clip: float
    method: str
    effects: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """The float chain as quantized (rescaled), its clips by stage, and the integers."""

    equalization: Equalization
    clips: dict[str, ClipChoice]
    quantized: QuantizedChain


def quantize_by_recipe(
    recipe: Recipe,
    chain: Chain,
    statistics: Sequence[ChannelStatistics],
    images: FloatArray,
    options: RecipeOptions | None = None,
) -> Outcome:
    """Quantize ``chain`` on ``images`` ``[N, C, H, W]``; deterministic bit for bit on one machine.

    ``statistics`` are those of the chain's boundaries over all calibration images.

    Raises:
        ChainError: no images; statistics that do not fit; an unknown stage in ``keep_float``; or
            equalization would change the float network.
    """
    options = options or RecipeOptions()
    if len(images) == 0:
        raise ChainError("there are no images to quantize on; give at least one")
    few = images[: min(_EFFECT_IMAGES, sample_size((images.shape[2], images.shape[3])) // 4)]
    equalized = equalize(
        chain,
        statistics,
        measured_effects(chain, few),
        EqualizeOptions(
            scaling=Scaling.NOISE if recipe.equalizes else Scaling.NONE,
            power_of_two=options.power_of_two,
            per_tensor_weights=options.per_tensor_weights,
        ),
    )
    require_equal(chain, equalized.chain, images[:_CHECKED])
    choices = _choose_clips(recipe, equalized, images, few)
    quantized = quantize_chain(
        equalized.chain,
        [choice.clip for choice in choices],
        images,
        SequentialOptions(
            second_order=recipe is Recipe.FULL,
            bias_correction=recipe.equalizes,
            per_tensor_weights=options.per_tensor_weights,
            keep_float=options.keep_float,
        ),
    )
    names = [stage.name for stage in chain.stages]
    return Outcome(
        equalization=equalized, clips=dict(zip(names, choices, strict=True)), quantized=quantized
    )


def _choose_clips(
    recipe: Recipe, equalized: Equalization, images: FloatArray, few: FloatArray
) -> list[ClipChoice]:
    peaks = [float(found.abs_max.max()) for found in equalized.statistics[:-1]]
    if recipe in (Recipe.MINMAX, Recipe.EQUALIZE):
        return [ClipChoice(clip=peak or 1.0, method="minmax", effects={}) for peak in peaks]
    observers = observe_inputs(equalized.chain, images)
    candidates = [
        candidate_clips(observer, peak) for observer, peak in zip(observers, peaks, strict=True)
    ]
    if recipe is not Recipe.FULL:
        method = recipe.value
        return [ClipChoice(clip=found[method], method=method, effects={}) for found in candidates]
    effects = clip_effects(equalized.chain, candidates, few)
    methods = [best_clip(found) for found in effects]
    return [
        ClipChoice(clip=found[method], method=method, effects=powers)
        for found, method, powers in zip(candidates, methods, effects, strict=True)
    ]


def observe_inputs(chain: Chain, images: FloatArray) -> list[TensorObserver]:
    """Histograms of every stage's input over ``images``, in memory of a few images."""
    observers = [TensorObserver() for _ in chain.stages]
    for start in range(0, len(images), _BATCH):
        x = channel_first(images[start : start + _BATCH])
        for stage, observer in zip(chain.stages, observers, strict=True):
            observer.update(x)
            x = run_stage(stage, x)
    return observers
