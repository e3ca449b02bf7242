"""Work cut into parts, some of which other processes do.

A part travels as bytes, and so does what comes of it: ``work`` is a function of a module with its
first arguments bound (functools.partial). The first part is done by whoever asks, which has a core
and has loaded everything already.

Whoever helps computes with as many threads as this process, by the same environment: on how many
threads a float sum is computed can decide its last bit.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from exporter.errors import EnvironmentLackError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Spread(Protocol):
    """Who helps."""

    @property
    def width(self) -> int:
        """Into how many parts work is cut, the one that is done here included."""
        ...

    def start(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Callable[[], Result]]:
        """Begin ``work(item)`` elsewhere, fewer items than ``width``.

        What comes back waits for each result in turn, and raises what ``work`` raised there, or
        EnvironmentLackError where a part was lost again and again.
        """
        ...


def cut(count: int, parts: int, step: int) -> list[range]:
    """``range(count)`` as at most ``parts`` neighbouring ranges, about as long as one another.

    Each begins at a multiple of ``step``, so that steps are those of the whole; none is empty.
    """
    steps = -(-count // step)
    parts = max(1, min(parts, steps))
    bounds = [min(step * (steps * part // parts), count) for part in range(parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


def run_pickled(work: bytes, item: Any) -> Any:
    """What a helper does."""
    return pickle.loads(work)(item)


class LocalSpread:
    """``width - 1`` processes beside this one, begun when there is something for them to do.

    Used as a context manager: leaving it ends them, and so does the end of this process, however it
    comes. A part whose process is killed gets a second one.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._helpers: dict[int, _Helper] = {}

    def __enter__(self) -> LocalSpread:
        return self

    def __exit__(self, *_error: object) -> None:
        for helper in self._helpers.values():
            helper.end()

    @property
    def width(self) -> int:
        return self._width

    def start(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Callable[[], Result]]:
        """As :class:`Spread`. The same place of ``items`` always has the same process."""
        text = pickle.dumps(work)
        futures = [self._submit(place, text, item) for place, item in enumerate(items)]
        return [
            partial(self._result, place, future, text, item)
            for place, (future, item) in enumerate(zip(futures, items, strict=True))
        ]

    def _submit(self, place: int, work: bytes, item: Any) -> Future[Any]:
        if place not in self._helpers:
            self._helpers[place] = _Helper()
        try:
            return self._helpers[place].pool.submit(run_pickled, work, item)
        except BrokenProcessPool:
            # It was killed while it had nothing to do.
            return self._renewed(place).pool.submit(run_pickled, work, item)

    def _result(self, place: int, future: Future[Any], work: bytes, item: Any) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            future = self._renewed(place).pool.submit(run_pickled, work, item)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise EnvironmentLackError(
                "a process that worked on a part of the images was killed twice; fewer --shards "
                "need less memory"
            ) from error

    def _renewed(self, place: int) -> _Helper:
        self._helpers[place].end()
        self._helpers[place] = _Helper()
        return self._helpers[place]


class _Helper:
    """One process, for one part after the other."""

    def __init__(self) -> None:
        # A fork would inherit threads that hold locks.
        context = multiprocessing.get_context("spawn")
        watched, self._open = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_end_with_parent, initargs=(watched,)
        )

    def end(self) -> None:
        """At once, whatever it does."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self._open.close()


def _end_with_parent(watched: Connection) -> None:
    """The pool's own processes would wait for a parent that was killed, for ever."""
    threading.Thread(target=_exit_when_closed, args=(watched,), daemon=True).start()


def _exit_when_closed(watched: Connection) -> None:
    try:
        watched.recv()
    except (EOFError, OSError):
        os._exit(1)
