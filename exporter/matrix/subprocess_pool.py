"""Cells on this machine, each in a process of its own, which a crash takes nothing else with."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue

from exporter.cases import CaseResult, Status
from exporter.child_process import environment, signal_name, thread_environment
from exporter.errors import EnvironmentLackError
from exporter.matrix.config import Cell
from exporter.matrix.worker import job, result_of

ATTEMPTS = 2
"""A process that is killed, by a lack of memory for example, gets a second one."""

_PROGRAM = """
import sys
sys.path = [folder for folder in sys.path if folder]
from exporter.matrix.worker import main
sys.exit(main())
"""
WORKER = (sys.executable, "-c", _PROGRAM)
"""It runs where this process does, since paths of requests may be relative."""


@dataclass(slots=True)
class SubprocessPool:
    """``width`` processes at once, each computing with ``threads`` threads.

    Each cuts its images into ``shards``, and has as many processes of as many threads for them.
    Used as a context manager: leaving it ends what still runs.
    """

    width: int
    threads: int
    cached: bool = True
    shards: int = 1
    command: tuple[str, ...] = WORKER
    _ended: SimpleQueue[tuple[Cell, CaseResult]] = field(default_factory=SimpleQueue)
    _processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    _closed: bool = False

    def __enter__(self) -> SubprocessPool:
        return self

    def __exit__(self, *_error: object) -> None:
        self._closed = True
        for process in list(self._processes.values()):
            process.terminate()

    def start(self, cell: Cell, after: tuple[str, ...]) -> None:
        """Begin a cell; what ``after`` made lies in the stage cache."""
        del after
        threading.Thread(target=self._run, args=(cell,), daemon=True).start()

    def wait(self) -> tuple[Cell, CaseResult]:
        """The next cell that ends."""
        return self._ended.get()

    def _run(self, cell: Cell) -> None:
        """Whatever happens, the cell ends: who waits for it has nobody else to ask."""
        start = time.perf_counter()
        try:
            result = self._result(cell, start)
        except (OSError, ValueError, KeyError, TypeError) as error:
            result = _failed(cell, f"its process is of no use: {error}", start)
        self._ended.put((cell, result))

    def _result(self, cell: Cell, start: float) -> CaseResult:
        for attempt in range(1, ATTEMPTS + 1):
            code, out, err = self._process(cell)
            if code == 0:
                return result_of(out)
            if code > 0 or self._closed or attempt == ATTEMPTS:
                break
        return _failed(cell, _crash_sentence(code, err), start)

    def _process(self, cell: Cell) -> tuple[int, str, str]:
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**environment(), **thread_environment(self.threads)},
        )
        self._processes[cell.name] = process
        out, err = process.communicate(
            job(cell.name, cell.request, cached=self.cached, shards=self.shards)
        )
        del self._processes[cell.name]
        return process.returncode, out, err


def _crash_sentence(code: int, err: str) -> str:
    how = f"was ended by {signal_name(code)}" if code < 0 else f"ended with exit code {code}"
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "it said nothing")
    return f"its process {how}: {last}"


def _failed(cell: Cell, message: str, start: float) -> CaseResult:
    return CaseResult(
        name=cell.name,
        status=Status.ERROR,
        seconds=time.perf_counter() - start,
        exit_code=EnvironmentLackError.exit_code,
        message=message,
    )
