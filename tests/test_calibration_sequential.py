"""Quantizing a chain, the effects on its logits, clip choice and the sensitivity list."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration import convolution
from calibration.chain import Chain, ChainError, Classifier, ConvStage, Gate, rescale
from calibration.clipping import best_clip, candidate_clips, input_scale, quantize_input
from calibration.convolution import (
    channel_first,
    classify,
    convolve,
    finish,
    patches_at,
    run_chain,
    run_stage,
    unfold,
)
from calibration.effects import clip_effects, gradients, logit_power, measured_effects
from calibration.observer import TensorObserver
from calibration.sensitivity import (
    StageEffect,
    first_passing,
    pareto,
    predicted_effects,
    signal_power,
    stage_macs,
)
from calibration.sequential import (
    QuantizedChain,
    SequentialOptions,
    input_moments,
    quantize_chain,
)
from calibration.survey import mean_result

NAMES = ("stem", "grouped", "depthwise", "point", "last")


def chain_of(seed: int = 0, *, gated: bool = False) -> Chain:
    """Dense strided, grouped, depthwise, 1x1, dense: 3 input and 12 inner channels, 5 classes."""
    rng = np.random.default_rng(seed)

    def stage(name: str, inputs: int, groups: int, kernel: int, stride: int) -> ConvStage:
        weight = rng.normal(0, 1, (12, inputs // groups, kernel, kernel))
        weight *= np.sqrt(2 / weight[0].size)
        return ConvStage(
            name=name,
            weight=weight,
            bias=rng.normal(0, 0.1, 12),
            groups=groups,
            stride=(stride, stride),
            padding=(kernel // 2,) * 4,
        )

    stages = [
        stage("stem", 3, 1, 3, 2),
        stage("grouped", 12, 3, 3, 1),
        stage("depthwise", 12, 12, 3, 1),
        stage("point", 12, 1, 1, 1),
        stage("last", 12, 1, 3, 2),
    ]
    if gated:
        gate = Gate(
            down=rng.normal(0, 1, (2, 12)),
            down_bias=np.zeros(2),
            up=rng.normal(0, 1, (12, 2)),
            up_bias=np.zeros(12),
        )
        stages[1] = replace(stages[1], gate=gate)
    classifier = Classifier(weight=rng.normal(0, 1, (5, 12)), bias=rng.normal(0, 1, 5))
    return Chain(stages=tuple(stages), classifier=classifier)


def images_of(seed: int = 1, count: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 16, 16)).astype(np.float32)


def boundary_inputs(chain: Chain, images: np.ndarray) -> list[np.ndarray]:
    x = channel_first(images)
    found = []
    for stage in chain.stages:
        found.append(x)
        x = run_stage(stage, x)
    return found


def minmax(chain: Chain, images: np.ndarray) -> list[float]:
    return [float(np.abs(x).max()) for x in boundary_inputs(chain, images)]


def quantized(chain: Chain, images: np.ndarray, **options: object) -> QuantizedChain:
    return quantize_chain(chain, minmax(chain, images), images, SequentialOptions(**options))


def sqnr_db(reference: np.ndarray, found: np.ndarray) -> float:
    # Equal to the last bit is infinitely close.
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((reference**2).sum() / ((reference - found) ** 2).sum()))


def run_quantized(found: QuantizedChain, images: np.ndarray) -> np.ndarray:
    """Logits as an INT8 engine computes them, up to float32 rounding."""
    x = channel_first(images)
    for stage in found.chain.stages:
        integers = found.stages.get(stage.name)
        if integers is None:
            x = run_stage(stage, x)
        else:
            x = run_stage(integers.dequantized(stage), integers.rounded_input(x))
    return classify(found.chain, x)


def results(found: QuantizedChain, chain: Chain, images: np.ndarray) -> list[np.ndarray]:
    """Each stage's result, bias included, in the quantized (or float) network."""
    x = channel_first(images)
    collected = []
    for stage in chain.stages:
        integers = found.stages.get(stage.name)
        if integers is not None:
            x = quantize_input(x, integers.input_scale) * np.float32(integers.input_scale)
            stage = integers.dequantized(stage)  # noqa: PLW2901
        y = convolve(stage, x) + stage.bias.astype(np.float32)[:, None, None, None]
        collected.append(y.copy())
        x = finish(stage, y)
    return collected


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.booleans())
def test_bias_correction_leaves_no_mean_error(seed: int, gated: bool) -> None:
    """Every channel of every stage, and every logit, has the float network's mean."""
    chain, images = chain_of(seed, gated=gated), images_of(seed)
    found = quantized(chain, images)
    exact = results(QuantizedChain(chain=chain, stages={}), chain, images)
    for wanted, got in zip(exact, results(found, chain, images), strict=True):
        error = wanted.mean(axis=(1, 2, 3), dtype=np.float64) - got.mean(
            axis=(1, 2, 3), dtype=np.float64
        )
        assert np.abs(error).max() < 1e-5 * np.abs(wanted).max()
    difference = run_chain(chain, images) - run_quantized(found, images)
    np.testing.assert_allclose(difference.mean(axis=0), 0, atol=1e-5)


def test_each_step_pays_on_unseen_images() -> None:
    """Second-order rounding and bias correction each gain over rounding to nearest."""
    gains = []
    for seed in range(6):
        chain, images, unseen = chain_of(seed), images_of(1, 64), images_of(2, 64)
        reference = run_chain(chain, unseen)
        plain, corrected, both = (
            sqnr_db(reference, run_quantized(quantized(chain, images, **options), unseen))
            for options in (
                {"second_order": False, "bias_correction": False},
                {"second_order": False},
                {},
            )
        )
        gains.append((corrected - plain, both - corrected))
    assert (np.mean(gains, axis=0) > 0.3).all()


def test_result_is_the_same_every_time() -> None:
    """Two runs give the same integers, scales and biases bit for bit."""
    chain, images = chain_of(), images_of()
    first, second = (quantized(chain, images) for _ in range(2))
    for name in NAMES:
        left, right = first.stages[name], second.stages[name]
        assert left.weight.tobytes() == right.weight.tobytes()
        assert left.bias.tobytes() == right.bias.tobytes()
        assert left.weight_scales.tobytes() == right.weight_scales.tobytes()


def test_working_memory_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfolding one image at a time gives the same logits to float32 rounding."""
    chain, images = chain_of(), images_of()
    whole = quantized(chain, images)
    monkeypatch.setattr(convolution, "_PIECE", 1)
    found = run_quantized(quantized(chain, images), images)
    assert sqnr_db(run_quantized(whole, images), found) > 45


def test_many_positions_are_thinned() -> None:
    """Of more positions than asked for a part is taken, the same one every time."""
    stage = chain_of().stages[0]
    q = np.rint(np.random.default_rng(0).uniform(0, 127, (3, 2, 256, 256))).astype(np.float32)
    options = SequentialOptions(positions_per_column=1)
    moments = input_moments(stage, q, options)
    assert abs(moments.count / (1 << 14) - 1) < 0.01
    assert moments == input_moments(stage, q, options)


def test_chosen_patches_are_columns_of_all_patches() -> None:
    """Taking some patches equals unfolding everything and taking these columns."""
    for stage in chain_of().stages:
        x = np.random.default_rng(0).normal(size=(stage.in_channels, 3, 9, 8)).astype(np.float32)
        everything = unfold(stage, x)
        places = np.arange(1, everything.shape[2], 3)
        assert everything[:, :, places].tolist() == patches_at(stage, x, places).tolist()


def test_mean_of_a_result_is_that_of_its_patches() -> None:
    """The mean of a convolution's result follows from its input's mean patch."""
    for stage in chain_of().stages:
        x = np.random.default_rng(0).normal(size=(stage.in_channels, 3, 9, 8)).astype(np.float32)
        expected = convolve(stage, x).mean(axis=(1, 2, 3), dtype=np.float64)
        np.testing.assert_allclose(mean_result(stage, x), expected, atol=1e-5)


def test_kept_stages_stay_float() -> None:
    """A kept stage has no integers and its own weight; all kept is the float network."""
    chain, images = chain_of(), images_of()
    found = quantized(chain, images, keep_float={"point"})
    assert set(NAMES) - {"point"} == set(found.stages)
    assert chain.stages[3].weight is found.chain.stages[3].weight
    everything = quantized(chain, images, keep_float=set(NAMES))
    assert run_chain(chain, images).tolist() == run_quantized(everything, images).tolist()


def test_per_tensor_weights_have_one_scale() -> None:
    """With per-tensor weights all output channels of a stage share their scale."""
    chain, images = chain_of(), images_of()
    found = quantized(chain, images, per_tensor_weights=True)
    assert [1] * 5 == [len(set(found.stages[name].weight_scales.tolist())) for name in NAMES]


def test_wrong_requests_are_refused() -> None:
    """No images, clip values that do not fit and unknown names are refused."""
    chain, images = chain_of(), images_of()
    clips = minmax(chain, images)
    with pytest.raises(ChainError, match="no images"):
        quantize_chain(chain, clips, images[:0])
    for bad in (clips[1:], [0.0, *clips[1:]], [float("nan"), *clips[1:]]):
        with pytest.raises(ChainError, match="5 positive clip values"):
            quantize_chain(chain, bad, images)
    with pytest.raises(ChainError, match="no stage is called 'lost'"):
        quantized(chain, images, keep_float={"lost"})


@pytest.mark.parametrize("gated", [False, True])
def test_gradient_predicts_a_small_change(gated: bool) -> None:
    """Moving one stage's bias a little moves the logits by what the gradients say."""
    chain, images = chain_of(3), images_of(3, 4)
    if gated:
        # Constant gates: the backward pass takes every gate as constant.
        gate = Gate(
            down=np.zeros((2, 12)),
            down_bias=np.zeros(2),
            up=np.zeros((12, 2)),
            up_bias=np.linspace(-2, 2, 12),
        )
        stages = [replace(stage, gate=gate) for stage in chain.stages]
        chain = replace(chain, stages=tuple(stages))
    exact = run_chain(chain, images)
    signs = np.random.default_rng(20260).choice(np.array([-1.0, 1.0]), size=(4, 5))
    seen = []
    for step in gradients(chain, images):
        stages = list(chain.stages)
        nudge = np.zeros(12)
        nudge[4] = 1e-4
        stages[step.index] = replace(stages[step.index], bias=stages[step.index].bias + nudge)
        moved = ((run_chain(replace(chain, stages=tuple(stages)), images) - exact) * signs).sum(1)
        expected = step.gradient[4].sum(axis=(1, 2)) * 1e-4
        np.testing.assert_allclose(moved, expected, rtol=0.02, atol=2e-6)
        seen.append(step.index)
    assert [4, 3, 2, 1, 0] == seen


def test_effects_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time gives the same effects to float32 rounding."""
    chain, images = chain_of(), images_of()
    whole = measured_effects(chain, images)
    monkeypatch.setattr("calibration.effects._IMAGES", 1)
    monkeypatch.setattr("calibration.effects._PIXELS", 0)
    for expected, actual in zip(whole, measured_effects(chain, images), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_logit_power_counts_errors_that_agree() -> None:
    """Errors that agree between positions weigh by the square of their sum."""
    gradient = np.ones((1, 2, 1, 4), np.float32)
    same = np.full((1, 2, 1, 4), 0.5, np.float32)
    opposed = same * np.array([1, -1, 1, -1], np.float32)
    assert (8.0, 0.0) == (logit_power(gradient, same), logit_power(gradient, opposed))


def test_harmful_clips_are_told_by_their_effect() -> None:
    """Clipping at a tenth of the range costs most; 5 % above the range costs next to nothing."""
    chain, images = chain_of(), images_of()
    clips = [{"minmax": c, "tight": c / 10, "wide": c * 1.05} for c in minmax(chain, images)]
    found = list(clip_effects(gradients(chain, images), clips, len(images)))
    assert len(chain.stages) == len(found)
    for effects in found:
        assert effects["tight"] > 5 * effects["minmax"]
        assert effects["wide"] < 3 * effects["minmax"]


@pytest.mark.parametrize(
    ("effects", "winner"),
    [
        ({"minmax": 1.0, "mse": 0.9, "entropy": 3.0}, "minmax"),
        ({"minmax": 1.0, "mse": 0.41, "entropy": 3.0}, "minmax"),
        ({"minmax": 1.0, "mse": 0.35, "entropy": 0.6}, "mse"),
        ({"minmax": 1.0, "mse": 2.0, "entropy": 0.1}, "entropy"),
        ({"minmax": 0.0, "mse": 0.0}, "minmax"),
    ],
)
def test_minmax_stays_unless_clearly_beaten(effects: dict[str, float], winner: str) -> None:
    """Another clip value is chosen only if its error is 4 dB below min-max's."""
    assert winner == best_clip(effects)


def test_candidates_cover_the_methods() -> None:
    """Candidates are named after their methods, and min-max is the given maximum."""
    observer = TensorObserver()
    observer.update(np.arange(1000, dtype=np.float32))
    clips = candidate_clips(observer, 1234.0)
    assert {"minmax", "percentile", "mse", "entropy"} == set(clips)
    assert (1234.0, 1.0) == (clips["minmax"], candidate_clips(observer, 0.0)["minmax"])
    assert np.float32(1234.0 / 127) == input_scale(1234.0)


def test_predicted_effects_are_near_the_measured() -> None:
    """The predicted power of each stage is within 4 dB of quantizing that stage alone."""
    chain, images = chain_of(2), images_of(5, 64)
    found = quantized(chain, images)
    predicted = predicted_effects(chain, found, images)
    reference = run_chain(chain, images)
    assert list(NAMES) == [effect.name for effect in predicted]
    assert stage_macs(chain, (16, 16)) == tuple(effect.macs for effect in predicted)
    for effect in predicted:
        alone = quantized(chain, images, keep_float=set(NAMES) - {effect.name})
        error = run_quantized(alone, images).astype(np.float64) - reference
        measured = (error**2).sum(axis=1).mean()
        assert abs(10 * np.log10(effect.power / measured)) < 4
    total = sqnr_db(reference, run_quantized(found, images))
    points = pareto(predicted, signal_power(chain, images))
    assert abs(points[0].sqnr_db - total) < 3


def test_macs_are_counted_per_image() -> None:
    """MACs are weights times positions of the output."""
    assert (
        12 * 3 * 9 * 64, 12 * 4 * 9 * 64, 12 * 9 * 64, 12 * 12 * 64, 12 * 12 * 9 * 16,
    ) == stage_macs(chain_of(), (16, 16))  # fmt: skip


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.integers(1, 10**9)), min_size=1, max_size=12))
def test_pareto_trades_sqnr_for_int8(pairs: list[tuple[float, int]]) -> None:
    """From all to none in INT8: each point keeps one more stage and has a larger SQNR."""
    effects = [StageEffect(name=str(i), power=p, macs=m) for i, (p, m) in enumerate(pairs)]
    points = pareto(effects, 1e4)
    assert list(range(len(effects) + 1)) == [len(point.kept) for point in points]
    assert (1.0, 0.0) == (points[0].int8_share, points[-1].int8_share)
    for left, right in pairwise(points):
        assert left.sqnr_db <= right.sqnr_db
        assert left.int8_share > right.int8_share
        assert left.kept == right.kept[:-1]


def test_pareto_keeps_the_most_harmful_per_mac_first() -> None:
    """The first stage kept is the one with the most error power per MAC."""
    effects = [
        StageEffect(name="large", power=5.0, macs=100),
        StageEffect(name="small", power=4.0, macs=10),
        StageEffect(name="harmless", power=0.001, macs=1),
    ]
    points = pareto(effects, 9.001)
    assert ("small", "large", "harmless") == points[-1].kept
    assert (0.0, 101 / 111) == (points[0].sqnr_db, points[1].int8_share)


def test_pareto_needs_a_signal() -> None:
    """No stages and logits that are all zero are refused."""
    with pytest.raises(ValueError, match="positive signal"):
        pareto([], 1.0)
    with pytest.raises(ValueError, match="positive signal"):
        pareto([StageEffect(name="a", power=1.0, macs=1)], 0.0)


@given(st.integers(0, 8), st.integers(1, 8))
def test_fewest_stages_that_pass_are_found_in_few_runs(first: int, count: int) -> None:
    """Bisection finds the first passing point, or None, in about log2 measurements."""
    effects = [StageEffect(name=str(i), power=1.0 + i, macs=1) for i in range(count)]
    points = pareto(effects, 1.0)
    calls = []

    def passes(point: object) -> bool:
        calls.append(point)
        return points.index(point) >= first

    found = first_passing(points, passes)
    assert (points[first] if first <= count else None) == found
    assert len(calls) <= 4


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_a_rescaled_chain_are_rescaled_gradients(gated: bool) -> None:
    """Inputs divided and their gradients multiplied: one backward pass serves both chains."""
    chain, images = chain_of(gated=gated), images_of(count=4)
    rng = np.random.default_rng(0)
    scales = [2.0 ** rng.uniform(-2, 2, stage.out_channels) for stage in chain.stages]
    incoming = [None, *scales]
    for before, after in zip(
        gradients(chain, images), gradients(rescale(chain, scales), images), strict=True
    ):
        moved = before.at_scaled_input(incoming[before.index])
        np.testing.assert_allclose(after.x, moved.x, rtol=1e-3, atol=1e-5)
        largest = np.abs(after.at_input).max()
        np.testing.assert_allclose(after.at_input, moved.at_input, atol=1e-4 * largest)
