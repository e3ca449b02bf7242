"""Independent pieces of numpy work on all cores: numpy lets go of the interpreter inside BLAS.

What a piece computes must not depend on how many pieces there are, so that results do not depend
on the number of cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8


def on_all_cores(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[work(item) for item in items]``, several at a time; raises what the first failure did."""
    items = list(items)
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST)) as pool:
        return list(pool.map(work, items))
