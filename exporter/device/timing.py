"""A stopwatch: runs timed one by one, or two things timed in turns, and what the times say.

The q-th percentile of n sorted times is the ceil(q n / 100)-th of them (nearest rank): a time that
was measured, with at least q percent of the runs at or below it.

Two things are compared in one process, in rounds: within a round A and B take turns, and every
other round begins with B, so that whatever else the machine does meets both. Each round gives a
ratio of medians; the answer is the median ratio, with the 10th and 90th percentile of the rounds as
its spread. Times of different processes are not comparable on a busy machine, ratios inside one run
are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Step = Callable[[], None]
Clock = Callable[[], float]
FEWEST_RUNS = 10
ROUNDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long each batch size is measured: ``seconds``, and at least FEWEST_RUNS runs.

    ``warmup`` runs come first and do not count.
    """

    seconds: float = 2.0
    warmup: int = 5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise ValueError(f"seconds must be a number of at least 0, not {self.seconds:g}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 runs, not {self.warmup}")


DEFAULT_EFFORT = Effort()


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One batch size. ``images_per_second`` is of all runs together."""

    batch: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float

    @classmethod
    def of(cls, batch: int, seconds: Sequence[float]) -> Latency:
        """The figures of these run times."""
        low, high, highest = (1e3 * percentile(seconds, q) for q in (50, 90, 99))
        return cls(
            batch=batch,
            runs=len(seconds),
            p50_ms=low,
            p90_ms=high,
            p99_ms=highest,
            images_per_second=batch * len(seconds) / sum(seconds),
        )

    def to_json(self) -> dict[str, float]:
        """The figures, to the microsecond."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """At one batch size, the other bundle's median time as a multiple of the first's.

    Above 1 the other is slower. ``low`` and ``high`` are the 10th and 90th percentile of the
    rounds.
    """

    batch: int
    rounds: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, batch: int, rounds: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Ratio:
        """The figures of these rounds, each the times of the one and those of the other."""
        ratios = [percentile(other, 50) / percentile(one, 50) for one, other in rounds]
        low, median, high = (percentile(ratios, q) for q in (10, 50, 90))
        return cls(batch=batch, rounds=len(ratios), median=median, low=low, high=high)

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower``, if the spread agrees on it, else ``no difference``."""
        if self.high < 1:
            return "faster"
        return "slower" if self.low > 1 else "no difference"

    def to_json(self) -> dict[str, Any]:
        """The fields by name, and the verdict."""
        figures = {name: round(value, 4) for name, value in asdict(self).items()}
        return {**figures, "verdict": self.verdict}


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-th percentile by nearest rank, ``0 < q <= 100``; ``values`` are not empty."""
    # 99 * 100 / 100 must stay 99: exact for whole q.
    rank = math.ceil(q * len(values) / 100)
    return sorted(values)[max(rank, 1) - 1]


def timed(step: Step, effort: Effort, clock: Clock) -> list[float]:
    """Run times until the effort is spent."""
    times: list[float] = []
    end = clock() + effort.seconds
    while len(times) < FEWEST_RUNS or clock() < end:
        times.append(_once(step, clock))
    return times


def _once(step: Step, clock: Clock) -> float:
    start = clock()
    step()
    return clock() - start


def rounds_of(
    steps: Sequence[Step], effort: Effort, clock: Clock
) -> list[tuple[list[float], list[float]]]:
    """Run times of both sides, round by round; every other round begins with the other side."""
    pilot = sum(_once(step, clock) for step in steps)
    runs = max(1, math.ceil(effort.seconds / ROUNDS / pilot)) if pilot > 0 else 1
    rounds: list[tuple[list[float], list[float]]] = []
    for number in range(ROUNDS):
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(runs):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                times[side].append(_once(steps[side], clock))
        rounds.append(times)
    return rounds
