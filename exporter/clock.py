"""Which stage of a run is on, how far it is, and how long those before it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of it that is done, 0 to 1."""


def silent(_stage: str, _fraction: float) -> None:
    """Report nothing."""


@dataclass(slots=True)
class StageClock:
    """Tells the caller which stage runs; ``seconds`` is the wall time of each that has ended."""

    progress: Progress = silent
    seconds: dict[str, float] = field(default_factory=dict)
    running: str | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        """Run a stage; gives what reports its progress."""
        start = time.perf_counter()
        self.running = name
        self.progress(name, 0.0)
        yield lambda fraction: self.progress(name, min(fraction, 1.0))
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.progress(name, 1.0)
