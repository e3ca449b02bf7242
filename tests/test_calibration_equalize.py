"""Chains and their rescaling: convolution, exactness, optimality, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.chain import Chain, ChainError, Classifier, ConvStage, Gate, rescale
from calibration.convolution import channel_first, convolve, run_chain
from calibration.effects import measured_effects
from calibration.equalize import (
    EqualizeOptions,
    Scaling,
    binary_scale,
    equalization_error,
    equalize,
    require_equal,
)
from calibration.moments import ChannelStatistics
from calibration.noise import passing
from calibration.survey import survey

SIZE = (12, 10)
KINDS = ("dense", "grouped", "depthwise", "pointwise", "strided", "dilated", "linear", "gated")


def stage(kind: str, index: int, rng: np.random.Generator, channels: int = 8) -> ConvStage:
    groups = {"grouped": 2, "depthwise": channels}.get(kind, 1)
    kernel = 1 if kind == "pointwise" else 3
    margin = {"pointwise": 0, "dilated": 2}.get(kind, 1)
    weight = rng.normal(0, 1, (channels, channels // groups, kernel, kernel))
    gate = None
    if kind == "gated":
        gate = Gate(
            down=rng.normal(0, 1, (2, channels)),
            down_bias=rng.normal(0, 1, 2),
            up=rng.normal(0, 1, (channels, 2)),
            up_bias=rng.normal(0, 1, channels),
        )
    return ConvStage(
        name=f"{index}.{kind}",
        weight=weight / np.sqrt(weight[0].size),
        bias=rng.normal(0, 0.2, channels),
        groups=groups,
        stride=(2, 1) if kind == "strided" else (1, 1),
        padding=(margin,) * 4,
        dilation=(2, 2) if kind == "dilated" else (1, 1),
        gate=gate,
        relu=kind != "linear",
    )


def chain_of(kinds: list[str], seed: int, spread: float = 0.0) -> Chain:
    """A random chain of 8 channels; ``spread`` rescales every boundary by 2^U(-spread, spread)."""
    rng = np.random.default_rng(seed)
    stages = tuple(stage(kind, index, rng) for index, kind in enumerate(kinds))
    classifier = Classifier(weight=rng.normal(0, 1, (5, 8)), bias=rng.normal(0, 1, 5))
    chain = Chain(stages=stages, classifier=classifier)
    return rescale(chain, [2.0 ** rng.uniform(-spread, spread, 8) for _ in kinds])


def images_of(seed: int, count: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 8, *SIZE)).astype(np.float32)


def statistics_of(chain: Chain, images: np.ndarray) -> list[ChannelStatistics]:
    return list(survey(chain, images).statistics)


CHAINS = st.builds(
    chain_of,
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    st.integers(0, 99),
    st.sampled_from([0.0, 3.0]),
)
OPTIONS = st.builds(
    EqualizeOptions,
    scaling=st.sampled_from(Scaling),
    power_of_two=st.booleans(),
    per_tensor_weights=st.booleans(),
    bound=st.sampled_from([1.0, 10.0, 1000.0]),
)


@pytest.mark.parametrize("kind", KINDS)
def test_convolution_is_its_definition(kind: str) -> None:
    """``convolve`` agrees with the sum over groups, channels and taps, one position at a time."""
    found = stage(kind, 0, np.random.default_rng(1))
    x = channel_first(images_of(2, 2))
    y = convolve(found, x)
    margin = (found.padding[0],) * 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), margin, margin))
    reach = (found.weight.shape[2] - 1) * found.dilation[0] + 1
    width = found.weight.shape[1]
    for o, u, v in [(0, 0, 0), (3, 1, 2), (7, y.shape[2] - 1, y.shape[3] - 1)]:
        first = o // (8 // found.groups) * width
        top, left = u * found.stride[0], v * found.stride[1]
        window = padded[
            first : first + width,
            :,
            top : top + reach : found.dilation[0],
            left : left + reach : found.dilation[1],
        ]
        expected = np.einsum("cij,cnij->n", found.weight[o], window)
        np.testing.assert_allclose(y[o, :, u, v], expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(CHAINS, OPTIONS)
def test_equalization_does_not_change_the_float_network(
    chain: Chain, options: EqualizeOptions
) -> None:
    """Logits move by at most 1e-5 of their range: grouped, depthwise, 1x1, strided, dilated, SE."""
    images = images_of(0)
    found = equalize(chain, statistics_of(chain, images), measured_effects(chain, images), options)
    logits = run_chain(chain, images), run_chain(found.chain, images)
    assert equalization_error(*logits) <= 1e-5
    require_equal(*logits)


@settings(max_examples=20, deadline=None)
@given(CHAINS)
def test_returned_statistics_are_those_of_the_rescaled_chain(chain: Chain) -> None:
    """The statistics that equalization returns are what the rescaled chain really has."""
    images = images_of(0)
    statistics = statistics_of(chain, images)
    found = equalize(chain, statistics, measured_effects(chain, images))
    for expected, actual in zip(statistics_of(found.chain, images), found.statistics, strict=True):
        np.testing.assert_allclose(actual.abs_max, expected.abs_max, rtol=1e-3, atol=1e-6)
        assert np.abs(actual.positive - expected.positive).max() < 0.01


def test_powers_of_two_change_no_bit() -> None:
    """With power-of-two scales the float logits are bit for bit those of the original."""
    chain, images = chain_of(["dense", "depthwise", "pointwise"], 3, 3.0), images_of(0)
    statistics = statistics_of(chain, images)
    options = EqualizeOptions(power_of_two=True)
    found = equalize(chain, statistics, measured_effects(chain, images), options)
    mantissas = [np.frexp(scale)[0].tolist() for scale in found.scales if scale is not None]
    assert [[0.5] * 8] * 3 == mantissas
    assert run_chain(chain, images).tolist() == run_chain(found.chain, images).tolist()


def activation_noise(
    stage: ConvStage, before: ConvStage | None, read: ChannelStatistics, effect: np.ndarray
) -> float:
    """By calibration.noise: what rounding the input of ``stage`` adds to the logits' error."""
    energy = (stage.by_group() ** 2).sum(axis=3)
    reached = passing(before, read).reshape(stage.groups, -1)
    power = np.einsum("go,goi,gi->", effect.reshape(stage.groups, -1), energy, reached)
    return float((read.abs_max.max() / 127) ** 2 / 12 * power)


def weight_noise(
    stage: ConvStage, read: ChannelStatistics, effect: np.ndarray, gamma: float
) -> float:
    """What rounding its weight adds, with one scale per output channel."""
    kernel = np.abs(stage.by_group())
    steps = kernel.max(axis=(2, 3)) / 127
    power = kernel.shape[3] * read.variance.reshape(stage.groups, -1).sum(axis=1)
    by_channel = np.einsum("go,go,g->", effect.reshape(stage.groups, -1), steps**2, power)
    return float(gamma / 12 * by_channel)


@pytest.mark.parametrize("gamma", [0.4, 5.0, 50.0])
@pytest.mark.parametrize("kind", ["dense", "grouped", "pointwise"])
@pytest.mark.parametrize("seed", [0, 1])
def test_noise_model_scaling_is_the_optimum(seed: int, kind: str, gamma: float) -> None:
    """No change of one channel's scale, nor of all, has less predicted noise (to 0.1 %)."""
    chain, images = chain_of(["dense", kind, "dense"], seed, 3.0), images_of(seed)
    statistics = statistics_of(chain, images)
    effects = measured_effects(chain, images)
    canonical = equalize(
        chain, statistics, effects, EqualizeOptions(scaling=Scaling.CANONICAL)
    ).scales

    def noise(scales: list[np.ndarray]) -> float:
        moved = [s.divided_by(r) for s, r in zip(statistics[1:], scales, strict=True)]
        scaled = [e * r**2 for e, r in zip(effects, scales, strict=True)]
        stages = rescale(chain, scales).stages
        return sum(
            activation_noise(stage_, before, read, effect)
            + weight_noise(stage_, read, effect, gamma)
            for before, stage_, read, effect in zip(
                stages[:-1], stages[1:], moved[:-1], scaled[1:], strict=True
            )
        )

    best = list(equalize(chain, statistics, effects, EqualizeOptions(gamma=gamma)).scales)
    least = noise(best)
    assert least <= noise(list(canonical)) * (1 + 1e-9)
    for boundary in (0, 1):
        for channel in range(8):
            for factor in (0.8, 0.95, 1.05, 1.25):
                tried = [scale.copy() for scale in best]
                tried[boundary][channel] *= factor
                if tried[boundary][channel] >= canonical[boundary][channel]:
                    assert least <= noise(tried) * 1.001
    rng = np.random.default_rng(seed)
    for width in (0.05, 0.3, 1.0):
        assert least <= noise([s * np.exp(rng.uniform(0, width, 8)) for s in best]) * 1.001


def test_per_tensor_scaling_has_less_noise_under_one_weight_scale() -> None:
    """With one scale per weight, its own equalization beats the per-channel one and its neighbours.

    The subgradient of the tensor's largest weight jumps, so the optimum is met to 2 %.
    """
    chain, images = chain_of(["dense", "dense", "dense"], 3, 3.0), images_of(3)
    statistics = statistics_of(chain, images)
    effects = measured_effects(chain, images)

    def noise(scales: list[np.ndarray]) -> float:
        moved = [s.divided_by(r) for s, r in zip(statistics[1:], scales, strict=True)]
        scaled = [e * r**2 for e, r in zip(effects, scales, strict=True)]
        inputs = [statistics[0], *moved[:-1]]
        stages = rescale(chain, scales).stages
        total = 0.0
        for before, stage_, read, effect in zip(
            (None, *stages[:-1]), stages, inputs, scaled, strict=True
        ):
            step = np.abs(stage_.weight).max() / 127
            total += activation_noise(stage_, before, read, effect)
            total += 0.4 * step**2 / 12 * effect.sum() * 9 * read.variance.sum()
        return float(total)

    options = EqualizeOptions(per_tensor_weights=True)
    best = list(equalize(chain, statistics, effects, options).scales)
    other = equalize(chain, statistics, effects)
    assert noise(best) < 0.9 * noise(list(other.scales))
    rng = np.random.default_rng(0)
    for width in (0.02, 0.1, 0.5):
        for _ in range(20):
            assert noise(best) <= 1.02 * noise([s * np.exp(rng.uniform(0, width, 8)) for s in best])


def test_result_does_not_depend_on_how_the_checkpoint_was_scaled() -> None:
    """Chains that differ by a rescaling are equalized to the same weights."""
    images = images_of(0)
    plain = chain_of(["dense", "grouped", "dense"], 5)
    rng = np.random.default_rng(0)
    stressed = rescale(plain, [2.0 ** rng.uniform(-3, 3, 8) for _ in range(3)])
    first, second = (
        equalize(chain, statistics_of(chain, images), measured_effects(chain, images)).chain
        for chain in (plain, stressed)
    )
    for left, right in zip(first.stages, second.stages, strict=True):
        np.testing.assert_allclose(left.weight, right.weight, rtol=1e-3)


def test_boundaries_that_are_not_scalable_stay() -> None:
    """A boundary with another reader keeps its scale, and scaling it by hand is refused."""
    chain, images = chain_of(["dense", "dense", "dense"], 1, 3.0), images_of(0)
    stages = (chain.stages[0], replace(chain.stages[1], scalable=False), chain.stages[2])
    chain = replace(chain, stages=stages)
    found = equalize(chain, statistics_of(chain, images), measured_effects(chain, images))
    assert [False, True, False] == [scale is None for scale in found.scales]
    with pytest.raises(ChainError, match=r"1\.dense: its output has another reader"):
        rescale(chain, [None, np.full(8, 2.0), None])


def test_dead_channels_get_a_bounded_scale() -> None:
    """A channel that is always zero takes a thousandth of the largest scale, not zero."""
    chain, images = chain_of(["dense", "dense"], 1), images_of(0)
    first = chain.stages[0]
    bias = first.bias.copy()
    bias[2] = -1e3
    chain = replace(chain, stages=(replace(first, bias=bias), chain.stages[1]))
    options = EqualizeOptions(scaling=Scaling.CANONICAL)
    found = equalize(chain, statistics_of(chain, images), measured_effects(chain, images), options)
    assert found.scales[0] is not None
    assert found.scales[0].max() * 1e-3 == found.scales[0][2]


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=16))
def test_a_binary_scale_is_the_nearest_power_of_two(largest: list[float]) -> None:
    """Within a factor of sqrt 2 of the channel's magnitude, and of a floor for dead channels."""
    peaks = np.array(largest)
    scale = binary_scale(peaks)
    assert np.array_equal(np.frexp(scale)[0], np.full(len(peaks), 0.5))
    bounded = np.maximum(peaks, 1e-3 * peaks.max())
    assert (np.abs(np.log2(scale) - np.log2(bounded)) <= 0.5 + 1e-9).all()
    assert np.array_equal(np.ones(3), binary_scale(np.zeros(3)))


def test_a_chain_that_is_not_the_network_is_refused() -> None:
    """A rescaled chain whose logits moved is refused with the size of the change."""
    chain, images = chain_of(["dense", "dense"], 1), images_of(0)
    other = replace(chain, classifier=replace(chain.classifier, bias=chain.classifier.bias + 1))
    with pytest.raises(ChainError, match="changed the float logits"):
        require_equal(run_chain(chain, images), run_chain(other, images))


BAD = {
    "no convolution": (lambda c: Chain(stages=(), classifier=c.classifier), "at least one"),
    "same name": (
        lambda c: Chain(stages=(c.stages[0], c.stages[0]), classifier=c.classifier),
        "same name",
    ),
    "classifier": (
        lambda c: replace(c, classifier=Classifier(weight=np.ones((5, 7)), bias=np.ones(5))),
        "does not fit",
    ),
    "bias": (lambda c: replace(c.stages[0], bias=np.ones(3)), "bias"),
    "groups": (lambda c: replace(c.stages[0], groups=3), "groups"),
    "rank": (lambda c: replace(c.stages[0], weight=np.ones((8, 8))), "must be"),
    "nan": (lambda c: replace(c.stages[0], bias=np.full(8, np.nan)), "NaN"),
    "channels": (
        lambda c: replace(c, stages=(c.stages[0], replace(c.stages[1], groups=2))),
        "reads 16",
    ),
    "scales": (lambda c: rescale(c, [None]), "1 scales for 2"),
    "zero scale": (lambda c: rescale(c, [np.zeros(8), None]), "positive"),
    "statistics": (lambda c: equalize(c, [], []), "0 statistics for 2"),
    "kernel": (
        lambda c: run_chain(
            replace(c, stages=(replace(c.stages[0], padding=(0, 0, 0, 0)), c.stages[1])),
            np.ones((1, 8, 2, 2), np.float32),
        ),
        "does not fit into 2 x 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_chain_is_refused(case: str) -> None:
    """Inconsistent stages, scales and statistics are refused in words."""
    make, words = BAD[case]
    with pytest.raises(ChainError, match=words):
        make(chain_of(["dense", "dense"], 0))
