"""Second-order rounding: never worse than nearest, better where it can be, exact moments."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.rounding import (
    InputMoments,
    cholesky_lower,
    moment_blocks,
    output_error,
    round_weights,
)
from calibration.threshold import quantize_weights, tensor_scale, weight_scales


def patches_of(seed: int, blocks: int, columns: int, count: int = 200) -> np.ndarray:
    """Correlated non-negative integers up to 127, as ReLU outputs are."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(0, 1, (blocks, columns, columns)) @ rng.normal(
        0, 1, (blocks, columns, count)
    )
    return np.clip(np.rint(mixed * 12), 0, 127).astype(np.float32)


def moments_of(patches: np.ndarray, blocks: int | None = None) -> InputMoments:
    blocks = blocks or len(patches)
    moments = InputMoments(blocks, patches.shape[0] * patches.shape[1] // blocks)
    moments.update(patches)
    return moments


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 9), st.integers(0, 1500))
def test_moments_merge_exactly(seed: int, blocks: int, columns: int, cut: int) -> None:
    """Moments of a union are the merge of its parts' moments bit for bit, wherever it is cut."""
    patches = patches_of(seed, blocks, columns, 1500)
    left, right = moments_of(patches[:, :, :cut]), moments_of(patches[:, :, cut:])
    assert moments_of(patches) == left.merge(right) == right.merge(left)


def test_moments_are_exact_integers() -> None:
    """Products of 5000 positions of the largest integers equal those in 64-bit integers."""
    patches = np.full((1, 4, 5000), -128, np.float32)
    patches[0, 1] = 127
    exact = patches[0].astype(np.int64) @ patches[0].astype(np.int64).T
    assert exact.tolist() == moments_of(patches).products[0].tolist()


def test_covariance_is_numpys() -> None:
    """The covariance agrees with numpy's, block by block, and is zero before any position."""
    patches = patches_of(0, 2, 5)
    found = moments_of(patches).covariance()
    for block in range(2):
        np.testing.assert_allclose(found[block], np.cov(patches[block], bias=True), rtol=1e-6)
    assert not InputMoments(2, 5).covariance().any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9999),
    st.sampled_from([(1, 6, 4, 9), (2, 4, 3, 9), (6, 6, 1, 9), (1, 5, 7, 1), (1, 3, 40, 9)]),
    st.sampled_from([1, 20, 400]),
    st.booleans(),
)
def test_never_worse_than_nearest(
    seed: int, shape: tuple[int, int, int, int], count: int, spike: bool
) -> None:
    """No output channel has a larger error on the moments than with rounding to nearest."""
    groups, outputs, inputs, taps = shape
    rng = np.random.default_rng(seed)
    weight = rng.normal(0, 1, (outputs, inputs, taps, 1))
    if spike:
        weight[:, 0, 0] *= 30
    scales = weight_scales(weight)
    covariance = moments_of(patches_of(seed, groups, inputs * taps, count)).covariance()
    found = round_weights(weight, scales, covariance)
    nearest = quantize_weights(weight, scales)
    assert np.abs(found).max() <= 127
    ours = output_error(weight, found, scales, covariance)
    theirs = output_error(weight, nearest, scales, covariance)
    assert (ours <= theirs * (1 + 1e-9)).all()


def test_correlated_inputs_gain_decibels() -> None:
    """With strongly correlated inputs the error is several times smaller than nearest's."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (16, 8, 3, 3))
    scales = weight_scales(weight) * np.float32(8)
    low_rank = rng.normal(0, 1, (72, 8)) @ rng.normal(0, 1, (8, 2000))
    patches = np.clip(np.rint(low_rank * 15 + rng.normal(0, 2, (72, 2000))), -128, 127)
    covariance = moments_of(patches[None].astype(np.float32)).covariance()
    ours = output_error(weight, round_weights(weight, scales, covariance), scales, covariance)
    theirs = output_error(weight, quantize_weights(weight, scales), scales, covariance)
    assert ours.sum() < theirs.sum() / 4


def test_close_to_the_best_of_all_integers() -> None:
    """On three columns the error is within a factor of two of the best found by exhaustion."""
    rng = np.random.default_rng(4)
    weight = rng.normal(0, 1, (6, 3, 1, 1))
    scales = weight_scales(weight) * np.float32(16)
    covariance = moments_of(patches_of(4, 1, 3)).covariance()
    found = output_error(weight, round_weights(weight, scales, covariance), scales, covariance)
    nearest = quantize_weights(weight, scales)
    best = np.full(6, np.inf)
    for step in product((-2, -1, 0, 1, 2), repeat=3):
        tried = (nearest + np.array(step).reshape(1, 3, 1, 1)).astype(np.int8)
        best = np.minimum(best, output_error(weight, tried, scales, covariance))
    assert found.sum() <= 2 * best.sum()


def test_uncorrelated_inputs_keep_nearest() -> None:
    """With a diagonal covariance nothing can be made good, and the integers are the nearest."""
    weight = np.random.default_rng(0).normal(0, 1, (4, 3, 3, 3))
    scales = weight_scales(weight)
    covariance = np.diag(np.arange(1.0, 28.0))[None]
    found = round_weights(weight, scales, covariance)
    assert quantize_weights(weight, scales).tolist() == found.tolist()


def test_constant_inputs_keep_nearest() -> None:
    """Without any variance there is nothing to go by, and the integers are the nearest."""
    weight = np.random.default_rng(0).normal(0, 1, (4, 3, 3, 3))
    scales = weight_scales(weight)
    found = round_weights(weight, scales, np.zeros((1, 27, 27)))
    assert quantize_weights(weight, scales).tolist() == found.tolist()


@pytest.mark.parametrize(
    ("groups", "channels", "taps", "columns", "blocks"),
    [(1, 192, 9, 8192, 1), (1, 2560, 9, 8192, 4), (4, 640, 9, 8192, 4), (1, 7, 9, 20, 7)],
)
def test_wide_layers_are_cut(
    groups: int, channels: int, taps: int, columns: int, blocks: int
) -> None:
    """A group is cut into the fewest equal blocks of channels that fit."""
    assert blocks == moment_blocks(groups, channels, taps, columns)


def test_cut_moments_round_every_block() -> None:
    """With blocks of channels the error summed over blocks is still at most nearest's."""
    weight = np.random.default_rng(1).normal(0, 1, (4, 6, 3, 1))
    scales = weight_scales(weight)
    covariance = moments_of(patches_of(1, 1, 18), blocks=3).covariance()
    found = round_weights(weight, scales, covariance)
    ours = output_error(weight, found, scales, covariance)
    theirs = output_error(weight, quantize_weights(weight, scales), scales, covariance)
    assert (3, 6, 6) == covariance.shape
    assert (ours <= theirs).all()
    assert ours.sum() < theirs.sum()


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 300))
def test_cholesky_by_panels_is_numpys(seed: int, size: int) -> None:
    """The lower factor agrees with numpy's, whatever the size."""
    factor = np.random.default_rng(seed).normal(size=(size, size))
    matrix = factor @ factor.T + size * np.eye(size)
    found = np.tril(cholesky_lower(matrix.copy()))
    np.testing.assert_allclose(found, np.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)


def test_a_covariance_beyond_float32_is_factored_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where float32 finds no Cholesky factor, the integers are those of float64."""
    weight = np.random.default_rng(1).normal(0, 1, (8, 4, 3, 3))
    scales = weight_scales(weight)
    covariance = moments_of(patches_of(1, 1, 36, 500)).covariance()

    def refuse_float32(matrix: np.ndarray) -> np.ndarray:
        if matrix.dtype == np.float32:
            raise np.linalg.LinAlgError
        return cholesky_lower(matrix)

    monkeypatch.setattr("calibration.rounding.cholesky_lower", refuse_float32)
    expected = round_weights(weight, scales, covariance.astype(np.float64))
    assert expected.tolist() == round_weights(weight, scales, covariance).tolist()


@pytest.mark.parametrize("missing", [0.05, 0.5, 1e6])
def test_moments_that_are_no_covariance_still_give_integers(missing: float) -> None:
    """More damping where eigenvalues are negative, and rounding to nearest where none helps."""
    weight = np.random.default_rng(1).normal(0, 1, (6, 4, 3, 3))
    scales = weight_scales(weight)
    covariance = moments_of(patches_of(1, 1, 36, 500)).covariance()
    values, vectors = np.linalg.eigh(covariance[0])
    values[0] = -missing * covariance[0].diagonal().mean()
    broken = np.array([vectors @ np.diag(values) @ vectors.T])
    found = round_weights(weight, scales, broken)
    assert (np.int8, weight.shape) == (found.dtype, found.shape)
    if missing > 1:
        assert quantize_weights(weight, scales).tolist() == found.tolist()


def test_integers_are_the_same_every_time() -> None:
    """Two runs give the same integers."""
    weight = np.random.default_rng(1).normal(0, 1, (32, 16, 3, 3))
    scales = weight_scales(weight)
    covariance = moments_of(patches_of(1, 1, 144, 2000)).covariance()
    first, second = (round_weights(weight, scales, covariance) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_blocks_of_columns_do_not_change_the_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Working in blocks of columns gives the integers of working column by column."""
    weight = np.random.default_rng(1).normal(0, 1, (8, 4, 3, 3))
    scales = weight_scales(weight)
    covariance = moments_of(patches_of(1, 1, 36, 500)).covariance()
    expected = round_weights(weight, scales, covariance)
    for size in (1, 7):
        monkeypatch.setattr("calibration.rounding._BLOCK", size)
        assert expected.tolist() == round_weights(weight, scales, covariance).tolist()


@pytest.mark.parametrize("shape", [(1, 26, 26), (2, 27, 27), (1, 27, 26), (3, 27, 27)])
def test_wrong_covariance_is_refused(shape: tuple[int, int, int]) -> None:
    """A covariance of another size is refused."""
    weight = np.ones((4, 3, 3, 3))
    if shape == (2, 27, 27):
        weight = weight[:3]
    with pytest.raises(ValueError, match="does not fit"):
        round_weights(weight, weight_scales(weight), np.zeros(shape))


def test_one_scale_for_the_tensor() -> None:
    """The per-tensor scale is the largest of the per-channel scales, for every channel."""
    weight = np.random.default_rng(1).normal(0, 1, (4, 3, 3, 3))
    assert [float(weight_scales(weight).max())] * 4 == tensor_scale(weight).tolist()
