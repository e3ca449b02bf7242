"""How far the work has got: a bar a stage on a terminal, plain lines elsewhere.

Off a terminal a stage is announced once; one that takes long also says how far it is, every
``EVERY_S`` seconds, and how long the rest takes if it goes on like this: elapsed / done - elapsed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO, cast

from exporter.terminal.interrupts import heeding
from exporter.terminal.streams import Streams, streams

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of it that is done, 0 to 1."""

EVERY_S = 10.0


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere, nothing if ``quiet``; the log file gets lines always.

    A terminal that cannot move its cursor (``TERM=dumb``) gets lines. ``FORCE_COLOR`` makes no
    terminal of a file. An interrupt that was lost is raised at the next step.
    """
    own = streams()
    if quiet or own.quiet:
        yield heeding(_Lines(lambda line: own.record("progress", line)))
    elif moves_its_cursor(own.err):
        with _bars(own) as bars:
            yield heeding(bars)
    else:
        yield heeding(_Lines(own.progress))


def moves_its_cursor(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal that understands escape codes."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


@dataclass(slots=True)
class _Lines:
    """Announces each stage once, and what takes long again and again."""

    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    started: dict[str, float] = field(default_factory=dict)
    said: dict[str, float] = field(default_factory=dict)

    def __call__(self, stage: str, fraction: float) -> None:
        now = self.clock()
        if stage not in self.started:
            self.started[stage] = self.said[stage] = now
            self.say(f"{stage} ...")
        elif 0 < fraction < 1 and now - self.said[stage] >= EVERY_S:
            self.said[stage] = now
            elapsed = now - self.started[stage]
            self.say(f"{stage} {fraction:.0%}, {elapsed / fraction - elapsed:.0f} s left")


class _Lasting:
    """A terminal for rich, which would end the work when somebody closes its window."""

    def __init__(self, own: Streams) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own.err, name)

    def write(self, text: str) -> int:
        with self._own.telling() as err:
            err.write(text)
        return len(text)

    def flush(self) -> None:
        with self._own.telling() as err:
            err.flush()


@contextmanager
def _bars(own: Streams) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = None if task.finished else task.time_remaining
            return Text("" if seconds is None else f"{seconds:.0f} s left")

    columns = (TextColumn("{task.description:15}", markup=False), BarColumn(), TimeElapsedColumn())
    record = _Lines(lambda line: own.record("progress", line))
    # rich would lead sys.stdout to this console, and whatever libraries print with it.
    with Bars(
        *columns, Left(), console=Console(file=cast("TextIO", _Lasting(own))),
        redirect_stdout=False, redirect_stderr=False,
    ) as bars:  # fmt: skip
        tasks: dict[str, TaskID] = {}

        def update(stage: str, fraction: float) -> None:
            record(stage, fraction)
            if stage not in tasks:
                # Without a total the bar swings: nothing is known of the time it takes.
                tasks[stage] = bars.add_task(stage, total=None)
            if fraction > 0:
                bars.update(tasks[stage], total=1.0, completed=fraction)

        yield update
