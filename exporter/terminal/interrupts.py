"""Ctrl-C and SIGTERM: KeyboardInterrupt at once, and once more at the next step if it was lost.

Python raises it wherever the main thread happens to be. In a destructor, in a callback of native
code or under a library's bare ``except`` it ends nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


@dataclass(slots=True)
class _Interrupts:
    """Of one command."""

    came: bool = False

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


_CURRENT: ContextVar[_Interrupts | None] = ContextVar("interrupts", default=None)


@contextmanager
def interruptible() -> Iterator[None]:
    """Both signals raise KeyboardInterrupt; on leaving they do what they did before.

    One that is ignored (a job in the background) stays so.
    """
    own = _Interrupts()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) in _DEFAULT:
                before[number] = signal.signal(number, own.handle)
    token = _CURRENT.set(own)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        for number, handler in before.items():
            signal.signal(number, handler)


def heeding(progress: Callable[[str, float], None]) -> Callable[[str, float], None]:
    """``progress``, which raises what was lost since the last step.

    Not at the end of a stage: what has been published can no longer be called interrupted.
    """

    def heed(stage: str, fraction: float) -> None:
        own = _CURRENT.get()
        if own is not None and own.came and fraction < 1:
            raise KeyboardInterrupt
        progress(stage, fraction)

    return heed
