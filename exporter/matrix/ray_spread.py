"""Parts of a cell's work as Ray tasks, which the cell's own task waits for."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from exporter.errors import EnvironmentLackError
from exporter.running.spread import Item, Result, run_pickled

RETRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySpread:
    """``width - 1`` tasks of ``threads`` processors each; for use inside a task of Ray's.

    A task that waits gives its processors back, so a cluster of one processor does it all in turn.
    Ray begins a task again whose worker or node died.
    """

    width: int
    threads: int

    def start(
        self, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Callable[[], Result]]:
        """As :class:`exporter.running.spread.Spread`."""
        import ray

        task = ray.remote(num_cpus=self.threads, max_retries=RETRIES)(run_pickled)
        text = ray.put(pickle.dumps(work))
        return [partial(_result, task.remote(text, item)) for item in items]


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Its text is a traceback; the cause is what the work itself said.
        raise error.cause from error
    except ray.exceptions.RayError as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentLackError(f"a part of the images was lost: {words[0]}") from error
