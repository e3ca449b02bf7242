"""How far the next image may reach: a law of extremes, fitted to what was seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.extremes import EULER, likely_peak

PEAKS = st.lists(st.floats(2.0**-10, 1000.0, width=32), min_size=1, max_size=40)


@given(PEAKS)
def test_nothing_that_was_seen_is_clipped(values: list[float]) -> None:
    """The clip is never below the largest peak."""
    peaks = np.array(values, dtype=np.float32)
    assert likely_peak(peaks) >= float(peaks.max())


@given(PEAKS, st.integers(-8, 8))
def test_it_scales_with_the_tensor(values: list[float], exponent: int) -> None:
    """A tensor twice as large has a clip twice as large."""
    peaks = np.array(values, dtype=np.float64)
    expected = 2.0**exponent * likely_peak(peaks)
    assert pytest.approx(expected, rel=1e-9) == likely_peak(2.0**exponent * peaks)


@given(st.permutations(range(12)))
def test_the_order_of_images_does_not_matter(order: list[int]) -> None:
    """The fit is by moments."""
    peaks = np.sqrt(np.arange(1.0, 13.0))
    assert pytest.approx(likely_peak(peaks)) == likely_peak(peaks[list(order)])


def test_images_that_all_reach_as_far_need_no_room() -> None:
    """Without spread the clip is what was seen."""
    assert 3.5 == likely_peak(np.full(64, 3.5))


def test_it_is_the_mode_of_gumbels_law() -> None:
    """Fitted by moments: mu + beta log(n / 2), where that is more than the largest peak."""
    peaks = np.linspace(1.0, 2.0, 1000)
    spread = math.sqrt(6) / math.pi * peaks.std()
    assert pytest.approx(np.euler_gamma) == EULER
    expected = peaks.mean() - EULER * spread + spread * math.log(500)
    assert pytest.approx(2.770, abs=1e-3) == expected
    assert pytest.approx(expected, rel=1e-12) == likely_peak(peaks)
