"""Clip values and scales: laws on arbitrary tensors, and agreement with brute force."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.observer import ObservationError, TensorObserver
from calibration.threshold import (
    MIN_SCALE,
    Method,
    activation_scale,
    quantize_weights,
    threshold,
    weight_scales,
)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.one_of(FINITE, st.floats(-3, 3, width=32))
)
WEIGHTS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=FINITE
)
METHODS = st.sampled_from(Method)


def observed(values: np.ndarray) -> TensorObserver:
    observer = TensorObserver()
    observer.update(np.asarray(values, dtype=np.float32))
    return observer


def fake_quantized(values: np.ndarray, clip: float) -> np.ndarray:
    step = clip / 127
    return np.clip(np.rint(values.astype(np.float64) / step), -127, 127) * step


def mean_squared_error(observer: TensorObserver, clip: float) -> float:
    """Of the histogram, each magnitude uniform within its bin, by integration from edge to edge.

    The integral of ``(x - Q(x))^2`` from 0 to the level k and r beyond it is k s^3 / 12 + r^3 / 3.
    """
    step, bins = clip / 127, np.flatnonzero(observer.histogram)
    edges = observer.bin_width * np.stack([bins, bins + 1])
    levels = np.minimum(np.rint(edges / step), 127)
    start, end = levels * step**3 / 12 + (edges - levels * step) ** 3 / 3
    means = (end - start) / observer.bin_width
    return float(means @ observer.histogram[bins]) / observer.count


def gaussian(size: int = 400_000) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(size).astype(np.float32)


@given(TENSORS, METHODS, st.floats(0.01, 100))
def test_threshold_lies_within_the_range(
    values: np.ndarray, method: Method, percentile: float
) -> None:
    """0 < T <= abs_max for every method, except that an all-zero tensor has T = 1."""
    observer = observed(values)
    clip = threshold(observer, method, percentile=percentile)
    assert 0 < clip <= (observer.abs_max or 1.0)


@given(TENSORS, METHODS)
def test_scale_is_a_positive_float32(values: np.ndarray, method: Method) -> None:
    """Every scale is a normal float32, so that no device flushes it to zero."""
    scale = activation_scale(observed(values), method)
    assert scale == float(np.float32(scale))
    assert MIN_SCALE <= scale < np.inf


@given(TENSORS)
def test_minmax_never_clips(values: np.ndarray) -> None:
    """With min-max no observed value rounds to a level beyond 127."""
    scale = np.float32(activation_scale(observed(values), Method.MINMAX))
    assert np.abs(np.rint(values / scale)).max() <= 127


@given(TENSORS, TENSORS, METHODS)
@settings(deadline=None)
def test_equal_observers_give_equal_thresholds(
    a: np.ndarray, b: np.ndarray, method: Method
) -> None:
    """Merged and directly observed tensors have the same T bit for bit."""
    merged = observed(b).merge(observed(a))
    assert threshold(observed(np.concatenate([a, b])), method) == threshold(merged, method)


@given(TENSORS, METHODS, st.integers(-20, 20))
@settings(deadline=None)
def test_threshold_follows_powers_of_two(values: np.ndarray, method: Method, power: int) -> None:
    """Scaling a tensor of ordinary size by a power of two scales T by the same."""
    ordinary = np.where(np.abs(values) > 1e-3, np.clip(values, -1e3, 1e3), np.float32(1))
    scaled = (ordinary * 2.0**power).astype(np.float32)
    assert threshold(observed(scaled), method) == threshold(observed(ordinary), method) * 2.0**power


@settings(max_examples=40, deadline=None)
@given(TENSORS, st.lists(st.floats(0.01, 1), min_size=1, max_size=20))
def test_mse_is_the_best_clip(values: np.ndarray, shares: list[float]) -> None:
    """No bin edge has a smaller error than the MSE threshold, up to rounding, nor has min-max."""
    observer = observed(values)
    assume(observer.abs_max)
    bins = observer.abs_max // observer.bin_width
    others = [observer.bin_width * max(np.rint(share * bins), 1) for share in shares]
    clip = threshold(observer, Method.MSE)
    least = min(mean_squared_error(observer, other) for other in (*others, observer.abs_max))
    assert mean_squared_error(observer, clip) <= least * (1 + 1e-6)


@pytest.mark.parametrize("outlier", [1.0, 20.0, 400.0])
def test_mse_is_the_best_of_all_clips_of_a_gaussian(outlier: float) -> None:
    """No bin edge at all has a smaller error, for bins finer than a step or not."""
    values = gaussian(20_000).clip(-4.05, 4.05)
    observer = observed(np.append(values, np.float32(outlier)))
    edges = observer.bin_width * np.arange(1, observer.abs_max // observer.bin_width + 1)
    least = min(mean_squared_error(observer, edge) for edge in edges)
    assert mean_squared_error(observer, threshold(observer, Method.MSE)) <= least * (1 + 1e-9)


@settings(max_examples=40)
@given(TENSORS, st.floats(1, 100))
def test_percentile_clips_no_more_than_it_says(values: np.ndarray, percentile: float) -> None:
    """At most (100 - p) percent of the non-zero values exceed T, and T is within a bin of least."""
    observer = observed(values)
    clip = threshold(observer, Method.PERCENTILE, percentile=percentile)
    magnitudes = np.sort(np.abs(values[values != 0]).astype(np.float64))
    clipped = np.count_nonzero(magnitudes > clip)
    assert clipped <= len(magnitudes) * (1 - percentile / 100) + 1e-6
    if len(magnitudes):
        wanted = min(int(np.ceil(percentile / 100 * len(magnitudes))), len(magnitudes))
        assert clip <= magnitudes[wanted - 1] + observer.bin_width


def test_mse_finds_the_known_optimum() -> None:
    """The optimal clip of a unit Gaussian for 255 uniform levels is close to 3.9 sigma."""
    values = gaussian()
    clip = threshold(observed(values), Method.MSE)
    grid = np.linspace(3, 4.8, 60)
    brute = grid[np.argmin([np.mean((values - fake_quantized(values, t)) ** 2) for t in grid])]
    assert 3.7 < clip < 4.1
    assert abs(clip - brute) < 0.1


def reference_entropy_threshold(observer: TensorObserver) -> float:
    """The method as the talk describes it, bin by bin, with the module's smoothing."""
    counts = observer.histogram[: np.flatnonzero(observer.histogram)[-1] + 1].astype(float)
    best, best_edge = np.inf, len(counts)
    for edge in range(128, len(counts) + 1):
        p = counts[:edge].copy()
        p[-1] += counts[edge:].sum()
        q = np.zeros(edge)
        bounds = [edge * level // 128 for level in range(129)]
        for low, high in pairwise(bounds):
            support = p[low:high] > 0
            if support.any():
                q[low:high][support] = counts[low:high].sum() / support.sum()
        mask = p > 0
        q = (1 - 1e-4) * q / max(q.sum(), 1) + 1e-4 * mask / mask.sum()
        p /= p.sum()
        divergence = float((p[mask] * np.log(p[mask] / q[mask])).sum())
        if divergence <= best + 1e-12:
            best, best_edge = min(best, divergence), edge
    return min(best_edge * observer.bin_width, observer.abs_max)


@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_equals_the_plain_loop(seed: int) -> None:
    """The running-sum form picks the threshold of the bin-by-bin definition."""
    values = np.random.default_rng(seed).laplace(size=5000).clip(-4.05, 4.05)
    # 4.05 leaves 4148 of the 8192 bins in use, which keeps the plain loop short.
    observer = observed(values if seed else np.maximum(values, 0))
    found = threshold(observer, Method.ENTROPY)
    assert reference_entropy_threshold(observer) == pytest.approx(found, rel=0.01)


def test_entropy_ignores_exact_zeros() -> None:
    """A ReLU's zeros, however many, move no threshold."""
    positive = np.abs(gaussian(50_000))
    padded = np.append(positive, np.zeros(500_000, np.float32))
    for method in Method:
        assert threshold(observed(positive), method) == threshold(observed(padded), method)


def test_entropy_clips_a_lone_outlier() -> None:
    """One value at ten times the range of a Gaussian does not set the range."""
    values = np.append(gaussian(), np.float32(50))
    assert 3 < threshold(observed(values), Method.ENTROPY) < 10


def test_of_equal_divergences_the_largest_clip_wins() -> None:
    """Two equal counts in neighbouring bins have KL 0 clipped or not, and are not clipped."""
    observer = observed(np.array([5000.5, 5001.5]) / 4096)
    assert threshold(observer, Method.ENTROPY) == observer.abs_max


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("value", [1.0, 0.1, -3.0, 1e38, 2.0**-149, 3.4e38])
def test_a_constant_tensor_keeps_its_value(method: Method, value: float) -> None:
    """Where all values are equal every method but MSE returns that value, and MSE is no worse."""
    observer = observed(np.full(50, value))
    clip = threshold(observer, method)
    if method is Method.MSE:
        errors = [mean_squared_error(observer, other) for other in (clip, observer.abs_max)]
        assert errors[0] <= errors[1] * (1 + 1e-6)
    else:
        assert observer.abs_max == clip


@pytest.mark.parametrize("method", Method)
def test_an_all_zero_tensor_has_an_ordinary_scale(method: Method) -> None:
    """An all-zero tensor gets T = 1 and the scale 1/127."""
    observer = observed(np.zeros(10))
    assert threshold(observer, method) == 1.0
    assert activation_scale(observer, method) == float(np.float32(1 / 127))


@pytest.mark.parametrize("percentile", [0, -1, 100.1, float("nan")])
def test_percentile_out_of_range_is_refused(percentile: float) -> None:
    """A percentile outside (0, 100] is an error for every method."""
    with pytest.raises(ValueError, match=r"^percentile must be in \(0, 100\], not "):
        threshold(observed([1]), Method.MINMAX, percentile=percentile)


def test_an_empty_observer_is_refused() -> None:
    """Without values there is no threshold."""
    with pytest.raises(ObservationError, match="has no values yet"):
        threshold(TensorObserver(), Method.MSE)


def test_thresholds_are_fast() -> None:
    """Each method takes well under a fifth of a second on a full histogram."""
    observer = observed(np.append(gaussian(), np.float32(7.99)))
    for method in Method:
        start = time.process_time()
        threshold(observer, method)
        assert time.process_time() - start < 0.2


@given(WEIGHTS)
def test_weights_are_within_half_a_step(weight: np.ndarray) -> None:
    """Dequantized weights differ by at most half a step and are never clipped."""
    scales = weight_scales(weight)
    steps = scales.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    q = quantize_weights(weight, scales)
    assert (q.dtype, q.shape, scales.dtype) == (np.int8, weight.shape, np.float32)
    assert q.min() >= -127
    assert np.all(np.abs(q * steps - weight) <= steps * 0.5001)


@given(WEIGHTS)
def test_weight_scales_are_positive_normal_numbers(weight: np.ndarray) -> None:
    """Every channel, all-zero and subnormal ones included, has a normal positive scale."""
    scales = weight_scales(weight)
    assert np.all(np.isfinite(scales) & (scales >= MIN_SCALE))
    assert np.array_equal(quantize_weights(-weight, scales), -quantize_weights(weight, scales))


def test_weight_scales_by_hand() -> None:
    """Scales are per output channel; rounding is half to even; zeros get 1/127."""
    weight = np.float32([[127, 0.5, 1.5, -2.5], [0, 0, 0, 0], [-254, 1, 2, 3]])
    scales = weight_scales(weight)
    assert np.float32([1, 1 / 127, 2]).tolist() == scales.tolist()
    assert quantize_weights(weight, scales).tolist() == [
        [127, 0, 2, -2],
        [0, 0, 0, 0],
        [-127, 0, 1, 2],
    ]


def test_quantize_clips_to_127() -> None:
    """Scales from elsewhere clip symmetrically; -128 does not occur."""
    q = quantize_weights(np.float32([[-1000, 1000]]), np.float32([1]))
    assert q.tolist() == [[-127, 127]]


def test_bad_weights_are_refused() -> None:
    """Non-finite weights, empty shapes and foreign scales are errors with counts and shapes."""
    with pytest.raises(ValueError, match=r"^1 of 2 weights are NaN or infinite$"):
        weight_scales(np.float32([[1, np.nan]]))
    with pytest.raises(ValueError, match=r"^weight must be a non-empty \[O, ...\] array, not \["):
        weight_scales(np.empty((0, 3), np.float32))
    with pytest.raises(ValueError, match=r"^scales \[3\] do not match weight \[2, 2\]; expected"):
        quantize_weights(np.ones((2, 2), np.float32), np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"^weight scales must be positive and finite$"):
        quantize_weights(np.ones((2, 2), np.float32), np.float32([1, 0]))
