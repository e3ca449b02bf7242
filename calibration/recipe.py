"""The rungs of the INT8 ladder, from plain scales to the full stack.

    minmax, percentile, mse, entropy   one clip method for every tensor, weights rounded to nearest
    equalize                           noise-model equalization, min-max clips, bias correction
    full                               equalization, clips chosen by their effect on the logits and
                                       with room for unseen images, second-order rounding, bias
                                       correction
    wide                               full, with all 256 integers for what comes out of a ReLU

Every rung is the same road, with stages left out:

    statistics -> effects -> equalize (checked) -> clip values -> sequential quantization

``images`` is the sample of :mod:`calibration.sample`; ranges come from all calibration images.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from calibration.chain import Array, Chain, ChainError, Float64Array, rescale
from calibration.clipping import best_clip, candidate_clips
from calibration.convolution import NUMPY, FloatArray, Kernels, run_chain
from calibration.effects import StageGradient, clip_effects, effects_of, gradients
from calibration.equalize import (
    Equalization,
    EqualizeOptions,
    Scaling,
    equalize,
    require_equal,
)
from calibration.extremes import likely_peak
from calibration.moments import ChannelStatistics
from calibration.observer import TensorObserver
from calibration.sample import sample_size
from calibration.sequential import (
    QuantizedChain,
    SequentialOptions,
    is_unsigned,
    quantize_chain,
)
from calibration.survey import FloatPass, observe_inputs, survey

_CHECKED = 4
_EFFECT_IMAGES = 32
EXTREME = "extreme"
"""The method of a clip that leaves room for unseen images."""


class Recipe(str, Enum):
    """The rungs, in the order in which ``auto`` climbs them."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
    EQUALIZE = "equalize"
    FULL = "full"
    WIDE = "wide"

    @property
    def equalizes(self) -> bool:
        """Whether the rung rescales the chain and corrects biases."""
        return self is Recipe.EQUALIZE or self.weighs

    @property
    def weighs(self) -> bool:
        """Whether clip values and integers are chosen by what they do to the results."""
        return self in (Recipe.FULL, Recipe.WIDE)

    @property
    def reads_histograms(self) -> bool:
        """Whether clip values come from the distribution of the inputs, not from their maximum."""
        return self not in (Recipe.MINMAX, Recipe.EQUALIZE)


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


def first_images(images: FloatArray) -> FloatArray:
    """The part of a sample that effects are measured on: one image per four of it.

    8 images of 224 x 224, up to 32 smaller ones; 128 give the same choices.
    """
    wanted = sample_size((images.shape[2], images.shape[3])) // 4
    return images[: min(wanted, _EFFECT_IMAGES)]


def quantize_by_recipe(
    recipe: Recipe,
    chain: Chain,
    statistics: Sequence[ChannelStatistics],
    images: FloatArray,
    options: RecipeOptions | None = None,
    *,
    floats: FloatPass | None = None,
    kernels: Kernels = NUMPY,
) -> Outcome:
    """Quantize ``chain`` on ``images`` ``[N, C, H, W]``; deterministic bit for bit on one machine.

    ``statistics`` are those of the chain's boundaries: ranges over all calibration images, moments
    over ``images``. ``floats`` is the float chain's run of ``images``, where it is known already.

    Raises:
        ChainError: no images; statistics that do not fit; an unknown stage in ``keep_float``; or
            equalization would change the float network.
    """
    options = options or RecipeOptions()
    if len(images) == 0:
        raise ChainError("there are no images to quantize on; give at least one")
    floats = floats or survey(chain, images, kernels)
    few = first_images(images)
    # One backward pass for both: equalization only scales what it finds.
    steps = list(gradients(chain, few, kernels))
    equalized = equalize(
        chain,
        statistics,
        effects_of(chain, steps, len(few)),
        EqualizeOptions(
            scaling=Scaling.NOISE if recipe.equalizes else Scaling.NONE,
            power_of_two=options.power_of_two,
            per_tensor_weights=options.per_tensor_weights,
        ),
    )
    floats = floats.divided_by(equalized.scales)
    if recipe.weighs:
        clips = _weighed_clips(recipe, equalized, steps, len(few), floats)
        logits = run_chain(equalized.chain, images[:_CHECKED], kernels)
    else:
        clips, logits = _named_clips(recipe, equalized, images, kernels)
    del steps
    require_equal(floats.logits[: len(logits)], logits)
    values = [choice.clip for choice in clips]
    quantized = _quantized(
        recipe,
        equalized.chain,
        values,
        images=images,
        floats=floats,
        options=options,
        kernels=kernels,
    )
    names = [stage.name for stage in chain.stages]
    return Outcome(
        equalization=equalized, clips=dict(zip(names, clips, strict=True)), quantized=quantized
    )


def requantize(
    recipe: Recipe,
    chain: Chain,
    scales: Sequence[Float64Array | None],
    clips: Sequence[float],
    *,
    images: FloatArray,
    options: RecipeOptions,
    kernels: Kernels = NUMPY,
) -> tuple[Chain, QuantizedChain]:
    """The rescaled chain and its integers, by scales and clips that a run before has chosen.

    With that run's ``images`` and ``options``, bit for bit what it made.

    Raises:
        ChainError: if scales or clips do not fit the chain, or change the float network.
    """
    rescaled = rescale(chain, scales)
    floats = survey(chain, images, kernels)
    logits = run_chain(rescaled, images[:_CHECKED], kernels)
    require_equal(floats.logits[: len(logits)], logits)
    floats = floats.divided_by(scales)
    done = _quantized(
        recipe, rescaled, clips, images=images, floats=floats, options=options, kernels=kernels
    )
    return rescaled, done


def _quantized(
    recipe: Recipe,
    chain: Chain,
    clips: Sequence[float],
    *,
    images: FloatArray,
    floats: FloatPass,
    options: RecipeOptions,
    kernels: Kernels,
) -> QuantizedChain:
    return quantize_chain(
        chain,
        clips,
        images,
        SequentialOptions(
            second_order=recipe.weighs,
            full_range=recipe is Recipe.WIDE,
            bias_correction=recipe.equalizes,
            per_tensor_weights=options.per_tensor_weights,
            keep_float=options.keep_float,
        ),
        floats=floats if recipe.equalizes else None,
        kernels=kernels,
    )


def _peaks(equalized: Equalization) -> list[float]:
    return [float(found.abs_max.max()) for found in equalized.statistics[:-1]]


def _named_clips(
    recipe: Recipe, equalized: Equalization, images: FloatArray, kernels: Kernels
) -> tuple[list[ClipChoice], Array]:
    """Every stage's clip by the method that the recipe names, and logits of the first images."""
    peaks = _peaks(equalized)
    if not recipe.reads_histograms:
        choices = [ClipChoice(clip=peak or 1.0, method="minmax", effects={}) for peak in peaks]
        return choices, run_chain(equalized.chain, images[:_CHECKED], kernels)
    observers, logits = observe_inputs(equalized.chain, images, kernels)
    candidates = map(candidate_clips, observers, peaks)
    method = recipe.value
    return [ClipChoice(clip=c[method], method=method, effects={}) for c in candidates], logits


def _weighed_clips(
    recipe: Recipe,
    equalized: Equalization,
    steps: Sequence[StageGradient],
    count: int,
    floats: FloatPass,
) -> list[ClipChoice]:
    """Every stage's clip by what it does to the logits of the ``count`` images of ``steps``."""
    incoming = [None, *equalized.scales]
    scaled = [step.at_scaled_input(incoming[step.index]) for step in steps]
    observers = [TensorObserver() for _ in equalized.chain.stages]
    for step in scaled:
        observers[step.index].update(step.x)
    candidates = list(map(candidate_clips, observers, _peaks(equalized)))
    wide = recipe is Recipe.WIDE
    unsigned = [wide and is_unsigned(equalized.chain, i) for i in range(len(candidates))]
    effects = clip_effects(scaled, candidates, count, unsigned=unsigned)
    methods = [best_clip(found) for found in effects]
    choices = [
        ClipChoice(clip=found[method], method=method, effects=powers)
        for found, method, powers in zip(candidates, methods, effects, strict=True)
    ]
    # An image's own range is known; what the network makes of the next one is not.
    rest = zip(choices[1:], floats.peaks[1:-1], strict=True)
    return [choices[0], *(_with_room(choice, peaks) for choice, peaks in rest)]


def _with_room(choice: ClipChoice, peaks: FloatArray) -> ClipChoice:
    if choice.method != Recipe.MINMAX.value or not peaks.any():
        return choice
    wanted = likely_peak(peaks.max(axis=1))
    return replace(choice, clip=max(choice.clip, wanted), method=EXTREME)
