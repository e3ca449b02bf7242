"""What waits for what: cells that share a stage let the first of them make it.

A cell *follows* the first cell with its float graph, and the first with its draft; when those have
ended, well or not, it may run. So every shared stage is made once, and what is not shared runs at
the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from exporter.cases import CaseResult
from exporter.matrix.config import Cell

Followed = Mapping[str, tuple[str, ...]]
"""By the name of a cell: those that it waits for."""


class Pool(Protocol):
    """Runs cells somewhere."""

    def start(self, cell: Cell, after: tuple[str, ...]) -> None:
        """Begin a cell at once; the cells ``after`` have made stages that it will want."""
        ...

    def wait(self) -> tuple[Cell, CaseResult]:
        """The next cell that ends, whatever came of it."""
        ...

    @property
    def width(self) -> int:
        """How many cells may run at once."""
        ...


def followed(keys: Mapping[str, Sequence[str]]) -> Followed:
    """Whom each cell waits for; ``keys`` are those of its shared stages, None of them twice."""
    first: dict[str, str] = {}
    found: dict[str, tuple[str, ...]] = {}
    for name, own in keys.items():
        leaders = [first.setdefault(key, name) for key in own]
        found[name] = tuple(dict.fromkeys(leader for leader in leaders if leader != name))
    return found


def run_cells(
    cells: Sequence[Cell],
    keys: Mapping[str, Sequence[str]],
    pool: Pool,
    ended: Callable[[Cell, CaseResult], None],
) -> None:
    """Run all ``cells``; ``ended`` hears of each as it ends, in whatever order.

    ``keys`` may be those of more cells: nobody waits for one that is not run.
    """
    waits = followed({cell.name: keys[cell.name] for cell in cells})
    waiting = list(cells)
    done: set[str] = set()
    running = 0
    while waiting or running:
        ready = [cell for cell in waiting if done.issuperset(waits[cell.name])]
        for cell in ready[: pool.width - running]:
            waiting.remove(cell)
            pool.start(cell, waits[cell.name])
            running += 1
        cell, result = pool.wait()
        running -= 1
        done.add(cell.name)
        ended(cell, result)
