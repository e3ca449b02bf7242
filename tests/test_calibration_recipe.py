"""The ladder on a chain: each rung, its determinism, stress versions, negative controls."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.chain import Chain, ChainError, Classifier, ConvStage, rescale
from calibration.convolution import channel_first, classify, run_chain, run_stage
from calibration.moments import ChannelStatistics
from calibration.recipe import Outcome, Recipe, RecipeOptions, quantize_by_recipe
from calibration.survey import survey

CHANNELS = 16
DEPTH = 5


def repvgg_like(seed: int = 0) -> Chain:
    """Dense 3x3 kernels with the spike of a merged identity branch on the centre diagonal."""
    rng = np.random.default_rng(seed)
    stages = []
    for index in range(DEPTH):
        inputs = CHANNELS if index else 3
        weight = rng.normal(0, 0.6 / np.sqrt(9 * inputs), (CHANNELS, inputs, 3, 3))
        for channel in range(CHANNELS if index else 0):
            weight[channel, channel, 1, 1] += 1
        bias = rng.normal(0, 0.2, CHANNELS)
        margin = (1, 1, 1, 1)
        stages.append(ConvStage(name=f"s{index}", weight=weight, bias=bias, padding=margin))
    classifier = Classifier(weight=rng.normal(0, 1, (6, CHANNELS)), bias=np.zeros(6))
    return Chain(stages=tuple(stages), classifier=classifier)


def smooth_images(seed: int, count: int) -> np.ndarray:
    """Blurred noise of varying contrast: neighbours correlate, as in real images."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (count, 3, 14, 14))
    for axis in (2, 3):
        for _ in range(2):
            x = x + np.roll(x, 1, axis)
    x = x[:, :, 2:, 2:] * rng.uniform(0.1, 0.5, (count, 1, 1, 1))
    return np.asarray(x, dtype=np.float32)


def statistics_of(chain: Chain, images: np.ndarray) -> list[ChannelStatistics]:
    return list(survey(chain, images).statistics)


IMAGES = smooth_images(1, 48)
UNSEEN = smooth_images(2, 96)


def outcome(
    recipe: Recipe, chain: Chain, images: np.ndarray = IMAGES, **options: object
) -> Outcome:
    statistics = statistics_of(chain, images)
    return quantize_by_recipe(recipe, chain, statistics, images, RecipeOptions(**options))


def run_integers(found: Outcome, images: np.ndarray) -> np.ndarray:
    """Logits as an INT8 engine computes them, up to float32 rounding."""
    x = channel_first(images)
    for stage in found.quantized.chain.stages:
        integers = found.quantized.stages[stage.name]
        x = run_stage(integers.dequantized(stage), integers.rounded_input(x))
    return classify(found.quantized.chain, x)


def sqnr_db(chain: Chain, found: Outcome) -> float:
    reference = run_chain(chain, UNSEEN)
    error = reference - run_integers(found, UNSEEN)
    return float(10 * np.log10((reference**2).sum() / (error**2).sum()))


@pytest.mark.parametrize("recipe", Recipe)
def test_every_rung_quantizes(recipe: Recipe) -> None:
    """Every rung gives integers for every stage, with a positive scale and a named clip."""
    found = outcome(recipe, repvgg_like())
    names = [f"s{index}" for index in range(DEPTH)]
    assert (names, names) == (list(found.quantized.stages), list(found.clips))
    for stage in found.quantized.stages.values():
        assert (np.int8, np.float32) == (stage.weight.dtype, stage.weight_scales.dtype)
        assert stage.input_scale > 0
    tried = {len(choice.effects) for choice in found.clips.values()}
    assert {4 if recipe.weighs else 0} == tried
    unsigned = [stage.unsigned for stage in found.quantized.stages.values()]
    assert [index > 0 and recipe is Recipe.WIDE for index in range(DEPTH)] == unsigned


def test_the_ladder_climbs() -> None:
    """On average over chains equalization beats min-max, the full stack both, and wide all."""
    rungs = (Recipe.MINMAX, Recipe.EQUALIZE, Recipe.FULL, Recipe.WIDE)
    table = [[sqnr_db(c, outcome(r, c)) for r in rungs] for c in map(repvgg_like, range(4))]
    plain, equalized, full, wide = np.mean(table, axis=0)
    assert equalized > plain + 1
    assert full > equalized + 2
    assert wide > full + 1


@pytest.mark.parametrize("kind", ["spread", "outliers"])
def test_stress_costs_plain_scales_everything_and_the_stack_nothing(kind: str) -> None:
    """Function-preserving rescalings ruin min-max and change the full stack by under 0.7 dB."""
    chain = repvgg_like()
    rng = np.random.default_rng(0)
    scales = [2.0 ** rng.uniform(-3, 3, CHANNELS) for _ in range(DEPTH)]
    if kind == "outliers":
        scales = [np.where(np.arange(CHANNELS) == index, 1 / 32, 1.0) for index in range(DEPTH)]
    stressed = rescale(chain, scales)
    plain = [sqnr_db(c, outcome(Recipe.MINMAX, c)) for c in (chain, stressed)]
    full = [sqnr_db(c, outcome(Recipe.FULL, c)) for c in (chain, stressed)]
    assert plain[1] < plain[0] - 6
    assert abs(full[1] - full[0]) < 0.7


def test_noise_images_and_per_tensor_weights_are_worse() -> None:
    """Negative controls: calibrating on noise, or one scale for a weight, costs decibels."""
    chain = repvgg_like()
    full = sqnr_db(chain, outcome(Recipe.FULL, chain))
    noise = np.random.default_rng(0).normal(0, 3, IMAGES.shape).astype(np.float32)
    assert sqnr_db(chain, outcome(Recipe.FULL, chain, noise)) < full - 3
    tensor = outcome(Recipe.FULL, chain, per_tensor_weights=True)
    assert sqnr_db(chain, tensor) < full


def test_outcome_is_the_same_every_time() -> None:
    """Two runs agree bit for bit in integers, scales, biases and clip values."""
    chain = repvgg_like()
    first, second = (outcome(Recipe.FULL, chain) for _ in range(2))
    assert first.clips == second.clips
    for name, stage in first.quantized.stages.items():
        other = second.quantized.stages[name]
        assert stage.weight.tobytes() == other.weight.tobytes()
        assert stage.weight_scales.tobytes() == other.weight_scales.tobytes()
        assert stage.bias.tobytes() == other.bias.tobytes()
        assert stage.input_scale == other.input_scale


def test_options_reach_their_stages() -> None:
    """Kept stages stay float and power-of-two scales are powers of two."""
    found = outcome(Recipe.FULL, repvgg_like(), keep_float={"s2"}, power_of_two=True)
    assert "s2" not in found.quantized.stages
    for scale in found.equalization.scales:
        assert scale is not None
        assert {0.5} == set(np.frexp(scale)[0].tolist())


def test_wrong_requests_are_refused() -> None:
    """No images and an unknown stage are refused."""
    chain = repvgg_like()
    statistics = statistics_of(chain, IMAGES)
    with pytest.raises(ChainError, match="no images"):
        quantize_by_recipe(Recipe.FULL, chain, statistics, IMAGES[:0])
    with pytest.raises(ChainError, match="no stage is called 'lost'"):
        outcome(Recipe.MINMAX, chain, keep_float={"lost"})
