"""Histogram -> clip value -> INT8 scale.

Quantization is symmetric and signed, ``q = clip(round_half_even(x / s), -127, 127)``,
``s = T / 127``, with ``T > 0`` the clip value. -128 is left out: the levels are then closed under
negation, ``Q(-x) = -Q(x)``, so that clipping adds no bias to a signed tensor, and the products of
an INT8 dot product stay within 127^2.

Four ways to choose T from the histogram of magnitudes, bins of width w, count n_i in
``[i w, (i + 1) w)``, exact zeros left out: zero is a level of its own at any scale, so zeros say
nothing about T, and counted in, the half of a ReLU's output that is zero would drown the rest.

*minmax*      ``T = max |x|``: nothing is clipped.

*percentile*  the smallest bin edge with at least p % of the non-zero magnitudes below it: at most
              (100 - p) % are clipped, whatever their distribution.

*mse*         the T with the least mean of ``(x - Q(x))^2``. With ``t_k = (k - 1/2) s`` the decision
              points, ``Q(x) = s sum_k [x > t_k]`` for x >= 0. Since ``2 s (t_1 + ... + t_m) =
              (m s)^2``, ``x^2 - (x - Q)^2 = 2 x Q - Q^2 = 2 s sum_k (x - t_k)^+``, and thus

                  E (x - Q(x))^2 = E x^2 - 2 s sum_{k=1..127} R(t_k),    R(t) = E (x - t)^+.

              Rounding and clipping are in it together. A magnitude counts as uniform within its
              bin, which makes R exact and piecewise quadratic: for t = (b + 1 - d) w, 0 < d <= 1,
              ``R(t) = R_{b+1} + w d (N_{b+1} + n_b d / 2)``, N and R the tail sums at bin edges.
              This holds for bins narrower and wider than s. Every bin edge is a candidate, so no
              percentile and no minmax can have a smaller error on the same histogram.

*entropy*     the T with the least KL divergence between the clipped histogram P (what lies beyond
              T is added to its last bin) and its picture Q in 128 levels: each level spreads the
              counts that lie inside T evenly over the bins of that level where P > 0 (S. Migacz,
              "8-bit Inference with TensorRT", GTC 2017). Within level g of n_g such bins and S_g
              counts q is constant, so with the sum of ``P log P`` as a running sum, KL costs 128
              logarithms a candidate:

                  KL = sum_j P_j log P_j - sum_g S_g log q_g - (count beyond T) log q_last.

              Q is mixed with 1e-4 of the uniform distribution on the support of P, which keeps KL
              finite where P has counts and Q has none.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.observer import TensorObserver

Float64Array = npt.NDArray[np.float64]

LEVELS = 127
# Devices flush subnormal numbers to zero, and a scale of zero divides by zero.
MIN_SCALE = float(np.finfo(np.float32).smallest_normal)
_ENTROPY_LEVELS = 128
_SMOOTHING = 1e-4
# Candidates per step: about 1 MB of float64 per intermediate, which stays in the cache.
_ROWS = 512


class Method(str, Enum):
    """How the clip value of an activation is chosen; the module docstring defines each."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


def threshold(observer: TensorObserver, method: Method, *, percentile: float = 99.99) -> float:
    """The clip value T in the tensor's units, ``0 < T <= observer.abs_max``.

    An all-zero tensor has no range; its T is 1.0, an ordinary number at which zero stays exact.
    Deterministic: equal observers give the same T bit for bit. ``percentile`` is in percent of the
    non-zero values and is read by ``Method.PERCENTILE`` only.

    Raises:
        ValueError: if the observer has seen no values, or ``percentile`` is not in (0, 100].
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], not {percentile}")
    abs_max = observer.abs_max
    if abs_max == 0:
        return 1.0
    histogram = observer.histogram
    counts = histogram[: int(np.flatnonzero(histogram)[-1]) + 1]
    if method is Method.MINMAX:
        edge = len(counts)
    elif method is Method.PERCENTILE:
        edge = _percentile_edge(counts, percentile)
    elif method is Method.MSE:
        candidates = np.arange(1, len(counts) + 1, dtype=np.float64)
        candidates[-1] = abs_max / observer.bin_width
        edge = _last_minimum(_squared_errors(counts, candidates)) + 1
    else:
        edge = _entropy_edge(counts)
    return abs_max if edge == len(counts) else edge * observer.bin_width


def activation_scale(
    observer: TensorObserver, method: Method, *, percentile: float = 99.99
) -> float:
    """``T / 127`` rounded to float32, never below 2^-126, the smallest normal float32.

    An all-zero tensor gets 1/127 (see :func:`threshold`). With ``Method.MINMAX`` no observed value
    is more than half a step beyond the outermost level, so nothing is clipped.

    Raises:
        ValueError: as :func:`threshold`.
    """
    clip = threshold(observer, method, percentile=percentile)
    return max(float(np.float32(clip / LEVELS)), MIN_SCALE)


def weight_scales(weight: np.ndarray[Any, Any]) -> npt.NDArray[np.float32]:
    """``max |W_o| / 127`` of each output channel (axis 0), float32 ``[O]``, at least 2^-126.

    Weights are never clipped: a trained kernel's largest taps carry its identity branch. A channel
    of zeros gets 1/127, an ordinary number at which zero stays exact.

    Raises:
        ValueError: if ``weight`` has no channel axis, an empty channel, or NaN or infinity.
    """
    if weight.ndim < 1 or weight.size == 0:
        raise ValueError(f"weight must be a non-empty [O, ...] array, not {list(weight.shape)}")
    if not np.isfinite(weight).all():
        bad = weight.size - int(np.count_nonzero(np.isfinite(weight)))
        raise ValueError(f"{bad} of {weight.size} weights are NaN or infinite")
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    scales = np.where(largest > 0, largest, 1.0) / LEVELS
    return np.maximum(scales.astype(np.float32), np.float32(MIN_SCALE))


def tensor_scale(weight: np.ndarray[Any, Any]) -> npt.NDArray[np.float32]:
    """``max |W| / 127`` of the whole tensor, repeated for each output channel, float32 ``[O]``.

    Raises:
        ValueError: as :func:`weight_scales`.
    """
    scales = weight_scales(weight.reshape(1, -1) if weight.ndim else weight)
    return np.repeat(scales, len(weight))


def quantize_weights(
    weight: np.ndarray[Any, Any], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.int8]:
    """``clip(round_half_even(W_o / s_o), -127, 127)`` along axis 0, int8 in ``weight``'s shape.

    The quotient is formed in float64, so with the scales of :func:`weight_scales` each weight is
    at most half a step away from ``q * s``.

    Raises:
        ValueError: if ``scales`` is not one positive finite number per output channel.
    """
    if weight.ndim < 1 or scales.shape != weight.shape[:1]:
        raise ValueError(
            f"scales {list(scales.shape)} do not match weight {list(weight.shape)}; expected [O]"
        )
    if not np.all(np.isfinite(scales) & (scales > 0)):
        raise ValueError("weight scales must be positive and finite")
    steps = scales.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight / steps), -LEVELS, LEVELS).astype(np.int8)


def _last_minimum(values: Float64Array) -> int:
    """Index of the least value; of equal ones the last, which clips least."""
    return len(values) - 1 - int(np.argmin(values[::-1]))


def _percentile_edge(counts: npt.NDArray[np.int64], percentile: float) -> int:
    cumulative = np.cumsum(counts)
    wanted = min(int(np.ceil(percentile / 100 * cumulative[-1])), int(cumulative[-1]))
    return int(np.searchsorted(cumulative, max(wanted, 1))) + 1


def _tail_sums(values: Float64Array) -> Float64Array:
    """``out[i] = sum of values[i:]``, one longer than ``values``."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


def _squared_errors(counts: npt.NDArray[np.int64], clips: Float64Array) -> Float64Array:
    """Sums of squared errors ``[K]``, in bin widths squared; ``clips`` ``[K]`` in bin widths."""
    n = counts.astype(np.float64)
    index = np.arange(len(n), dtype=np.float64)
    energy = float(np.sum(n * (index * (index + 1) + 1 / 3)))
    beyond = _tail_sums(n)
    # R at an edge is the integral of the tail count to its right, a sum of trapezoids.
    excess = _tail_sums((beyond[:-1] + beyond[1:]) / 2)
    half_counts = np.append(n / 2, 0.0)
    midpoints = (np.arange(1, LEVELS + 1) - 0.5) / LEVELS
    errors = np.empty(len(clips))
    for start in range(0, len(clips), _ROWS):
        part = clips[start : start + _ROWS]
        points = np.minimum(part[:, None] * midpoints, float(len(n)))
        bins = points.astype(np.intp)
        right = np.minimum(bins + 1, len(n))
        d = (bins + 1) - points
        gains = excess[right] + d * (beyond[right] + half_counts[bins] * d)
        errors[start : start + _ROWS] = energy - 2 * part / LEVELS * gains.sum(axis=1)
    return np.maximum(errors, 0.0)


def _x_log_x(values: Float64Array) -> Float64Array:
    return values * np.log(np.where(values > 0, values, 1.0))


def _entropy_edge(counts: npt.NDArray[np.int64]) -> int:
    """The number of bins inside the clip value of least KL divergence, at least 128."""
    if len(counts) <= _ENTROPY_LEVELS:
        return len(counts)
    n = counts.astype(np.float64)
    inside = np.append(0.0, np.cumsum(n))
    support = np.append(0.0, np.cumsum(n > 0))
    self_terms = np.append(0.0, np.cumsum(_x_log_x(n)))
    edges = np.arange(_ENTROPY_LEVELS, len(n) + 1)
    divergence = np.concatenate(
        [
            _kl_divergences(n, inside, support, self_terms, edges[start : start + _ROWS])
            for start in range(0, len(edges), _ROWS)
        ]
    )
    return int(edges[_last_minimum(divergence)])


def _kl_divergences(
    n: Float64Array,
    inside: Float64Array,
    support: Float64Array,
    self_terms: Float64Array,
    edges: npt.NDArray[np.int64],
) -> Float64Array:
    """KL(P || Q) of each candidate, up to the constant factor and shift that all share."""
    bounds = edges[:, None] * np.arange(_ENTROPY_LEVELS + 1) // _ENTROPY_LEVELS
    level_counts = np.diff(inside[bounds], axis=1)
    level_bins = np.diff(support[bounds], axis=1)
    kept, last = inside[edges], n[edges - 1]
    clipped = inside[-1] - kept
    # The clipped counts open the last bin where it had none of its own.
    level_bins[:, -1] += (last == 0) & (clipped > 0)
    total_bins = level_bins.sum(axis=1, keepdims=True)
    even = level_counts / np.maximum(level_bins, 1.0) / np.maximum(kept, 1.0)[:, None]
    log_q = np.log((1 - _SMOOTHING) * even + _SMOOTHING / total_bins)
    p_log_p = self_terms[edges] - _x_log_x(last) + _x_log_x(last + clipped)
    cross: Float64Array = (level_counts * log_q).sum(axis=1) + clipped * log_q[:, -1]
    return np.asarray(p_log_p - cross, dtype=np.float64)
