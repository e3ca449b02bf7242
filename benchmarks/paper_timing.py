"""Latency of many graphs measured in turns, so that whatever else the machine does meets all.

A round runs every graph: once without the clock, because the others have emptied the caches, then
RUNS times with it. The next round begins one graph further on. What is compared is the ratio of two
graphs' medians within a round; the answer is the median over the rounds, with their 10th and 90th
percentile as its spread (exporter/device/timing.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ort_profile import open_session, session_options

from exporter.device.timing import Latency, Ratio
from exporter.onnx_export import INPUT_NAME

RUNS = 3
Step = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Seconds of each graph, round by round."""

    batch: int
    seconds: Mapping[str, Sequence[Sequence[float]]]

    def latency(self, key: str) -> Latency:
        """Of all rounds together."""
        return Latency.of(self.batch, [value for times in self.seconds[key] for value in times])

    def ratio(self, first: str, other: str) -> Ratio:
        """The other's time as a multiple of the first's."""
        pairs = zip(self.seconds[first], self.seconds[other], strict=True)
        return Ratio.of(self.batch, list(pairs))


def in_turns(
    steps: Mapping[str, Step],
    batch: int,
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], None] = lambda _: None,
) -> Turns:
    """Run every step in every round; ``progress`` gets the number of finished rounds."""
    names = list(steps)
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            steps[name]()
            times = []
            for _ in range(RUNS):
                begin = clock()
                steps[name]()
                times.append(clock() - begin)
            seconds[name].append(times)
        progress(number + 1)
    return Turns(batch=batch, seconds=seconds)


def model_steps(
    models: Mapping[str, Path], batch: int, image_size: tuple[int, int]
) -> dict[str, Step]:
    """Each model loaded by ONNX Runtime at its defaults and run on the same random images."""
    images = np.random.default_rng(2).standard_normal((batch, 3, *image_size), np.float32)
    feed = {INPUT_NAME: images}

    def step(model: Path) -> Step:
        options = session_options()
        # Threads of the graph before would spin for a while and slow this one down.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = open_session(model, options)
        return lambda: session.run(None, feed)

    return {key: step(model) for key, model in models.items()}
