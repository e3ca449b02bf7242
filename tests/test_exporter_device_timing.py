"""The stopwatch, under a clock that the test moves: no assertion here depends on real time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.device.timing import (
    FEWEST_RUNS,
    ROUNDS,
    Effort,
    Latency,
    Ratio,
    percentile,
    rounds_of,
    timed,
)

TIMES = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200)


class Clock:
    """Tells the time that steps have moved it to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float, log: list[str] | None = None, name: str = ""):
        def run() -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return run


@given(times=TIMES, q=st.integers(1, 100))
def test_a_percentile_is_a_measured_time_with_its_share_at_or_below(times: list[float], q: int):
    """Nearest rank: at least q percent are at or below it, and fewer below any smaller time."""
    found = percentile(times, q)
    assert found in times
    assert 100 * sum(time <= found for time in times) >= q * len(times)
    assert 100 * sum(time < found for time in times) < q * len(times)


@given(times=TIMES)
def test_percentiles_are_ordered_and_do_not_depend_on_the_order(times: list[float]):
    """p50 <= p90 <= p99 <= p100, the largest."""
    row = Latency.of(4, times)
    assert row == Latency.of(4, sorted(times)) or math.isclose(
        row.images_per_second, Latency.of(4, sorted(times)).images_per_second
    )
    assert row.p50_ms <= row.p90_ms <= row.p99_ms <= 1e3 * max(times)
    assert percentile(times, 100) == max(times)


def test_a_slow_step_still_runs_often_enough():
    """Time alone does not end a measurement of few runs."""
    clock = Clock()
    assert [5.0] * FEWEST_RUNS == timed(clock.step(5.0), Effort(seconds=1), clock)


def test_a_fast_step_runs_until_the_time_is_spent():
    """As many runs as fit."""
    clock = Clock()
    times = timed(clock.step(0.25), Effort(seconds=10), clock)
    assert 40 == len(times)
    assert 8 * 4.0 == Latency.of(8, times).images_per_second


def test_two_steps_take_turns_and_every_other_round_begins_with_the_other():
    """A B, then B A: neither always runs on the other's warm cache."""
    clock, log = Clock(), []
    steps = [clock.step(1.0, log, "a"), clock.step(2.0, log, "b")]
    rounds = rounds_of(steps, Effort(seconds=0), clock)
    assert ROUNDS == len(rounds)
    assert list("ab" + "abba" * (ROUNDS // 2)) == log
    assert all(([1.0], [2.0]) == pair for pair in rounds)
    assert (2.0, 2.0, 2.0) == ((found := Ratio.of(1, rounds)).median, found.low, found.high)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([0.8] * 9 + [1.5], "faster"),
        ([0.8] * 8 + [1.5] * 2, "no difference"),
        ([1.2] * 9 + [0.5], "no difference"),
        ([1.2] * 10, "slower"),
    ],
)
def test_a_verdict_needs_the_spread_to_agree(ratios: list[float], verdict: str):
    """The 10th and the 90th percentile of the rounds must lie on one side of 1."""
    assert verdict == Ratio.of(1, [([1.0], [ratio]) for ratio in ratios]).verdict


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seconds": -1.0}, "seconds must be a number of at least 0, not -1"),
        ({"seconds": float("nan")}, "seconds must be a number of at least 0, not nan"),
        ({"warmup": -1}, "warmup must be at least 0 runs, not -1"),
    ],
)
def test_a_senseless_effort_is_refused(options, sentence: str):
    """Each has its sentence."""
    with pytest.raises(ValueError, match=sentence):
        Effort(**options)
