"""Cells on this machine, each in a process of its own, which a crash takes nothing else with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue

from exporter.cases import CaseResult, Status
from exporter.errors import EnvironmentLackError
from exporter.matrix.config import Cell
from exporter.matrix.worker import job, result_of

ATTEMPTS = 2
"""A process that is killed, by a lack of memory for example, gets a second one."""


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
        start = time.perf_counter()
        for attempt in range(1, ATTEMPTS + 1):
            code, out, err = self._process(cell)
            if code == 0:
                self._ended.put((cell, result_of(out)))
                return
            if code > 0 or self._closed or attempt == ATTEMPTS:
                break
        seconds = time.perf_counter() - start
        self._ended.put((cell, _crashed(cell, code, err, seconds)))

    def _process(self, cell: Cell) -> tuple[int, str, str]:
        number = str(self.threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "exporter.matrix.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, **thread_environment(number)},
        )
        self._processes[cell.name] = process
        out, err = process.communicate(
            job(cell.name, cell.request, cached=self.cached, shards=self.shards)
        )
        del self._processes[cell.name]
        return process.returncode, out, err


def thread_environment(number: str) -> dict[str, str]:
    """Variables that make the libraries compute with ``number`` threads, and not spin."""
    return {
        "OMP_NUM_THREADS": number,
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _crashed(cell: Cell, code: int, err: str, seconds: float) -> CaseResult:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "it said nothing")
    return CaseResult(
        name=cell.name,
        status=Status.ERROR,
        seconds=seconds,
        exit_code=EnvironmentLackError.exit_code,
        message=f"its process ended by {how}: {last}",
    )
