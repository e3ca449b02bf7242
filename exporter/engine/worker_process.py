"""Runs the build worker, listens to it, and makes sure that nothing of it remains."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from exporter.child_process import environment, signal_name
from exporter.engine import protocol
from exporter.engine.backend import BuildRequest, ProgressCallback
from exporter.engine.protocol import Result, Status
from exporter.engine.summary import EngineTyping
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.files.private_folder import require_space, scratch_folder

WORKER: tuple[str, ...] = (sys.executable, "-m", "exporter.engine.worker")
"""To be followed by the name of the library to build with."""

DEFAULT_TIMEOUT_S = 1800.0
_KILL_WAIT_S = 10.0
_STDERR = "stderr.txt"
_SHOWN_ERRORS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOutput:
    """What a successful worker leaves; ``version`` is that of the library it built with.

    ``layers`` is the library's own layer information on the plan, JSON text, if it gives any.
    """

    plan: bytes
    log: str
    version: str
    layers: str | None = None
    notes: tuple[str, ...] = ()
    typing: EngineTyping = EngineTyping.STRONG


def run_worker(
    request: BuildRequest,
    progress: ProgressCallback,
    *,
    command: Sequence[str],
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> WorkerOutput:
    """Build in a process of its own and return what it made.

    ``command`` gets the private folder as its last argument. However this function ends, the
    process has ended and the folder is gone; an interrupt or an error of ``progress`` is passed on.

    Raises:
        OSError: the disk is full.
        InputError: the request does not fit the model.
        GateFailedError: the builder refuses the network, in its own words.
        EnvironmentLackError: the worker crashed, ran out of time, or left nothing usable.
    """
    with scratch_folder("engine") as folder:
        content = json.dumps(protocol.request_to_json(request))
        (folder / protocol.REQUEST).write_text(content, encoding="utf-8")
        with _started(command, folder) as worker:
            phase = _follow(worker, progress, timeout_s)
        result = Result.read(folder)
        if result is None:
            code = worker.process.returncode
            require_space(code, folder)
            raise EnvironmentLackError(_crash_sentence(code, phase, folder))
        return _accept(result, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Worker:
    """A running worker and the lines it prints, ended by None."""

    process: subprocess.Popen[str]
    lines: queue.SimpleQueue[str | None]


@contextmanager
def _started(command: Sequence[str], folder: Path) -> Iterator[_Worker]:
    """The running worker; on leaving it is dead and waited for, whatever happened."""
    with (folder / _STDERR).open("wb") as stderr:
        try:
            process = subprocess.Popen(
                [*command, str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=folder,
                env=environment(),
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise EnvironmentLackError(f"the engine builder cannot be started: {error}") from error
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
        try:
            reader.start()
            yield _Worker(process=process, lines=lines)
        finally:
            process.kill()
            process.wait(_KILL_WAIT_S)
            reader.join(_KILL_WAIT_S)


def _follow(worker: _Worker, progress: ProgressCallback, timeout_s: float) -> str:
    """Pass progress on until the worker has ended; return the last phase it named."""
    deadline = time.monotonic() + timeout_s

    def left_s() -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise queue.Empty
        return left

    phase, best = "starting", 0.0
    try:
        while (line := worker.lines.get(timeout=left_s())) is not None:
            found = protocol.progress_from_line(line)
            if found is not None:
                phase, best = found[0], max(best, found[1])
                progress(phase, best)
        worker.process.wait(left_s())
    except (queue.Empty, subprocess.TimeoutExpired):
        raise EnvironmentLackError(
            f"the engine builder did not finish within {timeout_s:g} s and was stopped (last "
            f"phase: {phase}): try fewer targets, or a machine with more cores and memory"
        ) from None
    return phase


def _pump(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    """Queue the worker's lines, then None."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _accept(result: Result, folder: Path) -> WorkerOutput:
    words = "; ".join(" ".join(error.split()) for error in result.errors[:_SHOWN_ERRORS])
    if len(result.errors) > _SHOWN_ERRORS:
        words += f"; and {len(result.errors) - _SHOWN_ERRORS} more"
    if result.status is Status.REFUSED:
        raise GateFailedError(f"the engine builder refuses the network: {words}")
    if result.status is Status.BAD_INPUT:
        raise InputError(words)
    if result.status is Status.LACKING:
        raise EnvironmentLackError(words)
    try:
        plan = (folder / protocol.PLAN).read_bytes()
        log = (folder / protocol.LOG).read_text(encoding="utf-8", errors="replace")
        table = folder / protocol.LAYERS
        layers = table.read_text(encoding="utf-8", errors="replace") if table.exists() else None
    except OSError as error:
        raise EnvironmentLackError(
            f"the engine builder reports success but left no {Path(error.filename).name}"
        ) from error
    if not plan:
        raise EnvironmentLackError("the engine builder reports success but its plan is empty")
    return WorkerOutput(
        plan=plan,
        log=log,
        version=result.version,
        layers=layers,
        notes=result.notes,
        typing=result.typing,
    )


def _crash_sentence(code: int, phase: str, folder: Path) -> str:
    if code < 0:
        name = signal_name(code)
        cause = f"was killed by {name}"
        if name == "SIGKILL":
            cause += ", as happens when memory runs out"
    else:
        cause = f"ended with exit code {code} and left no result"
    words = (folder / _STDERR).read_text(encoding="utf-8", errors="replace").strip()
    said = f"; its last words: {words.splitlines()[-1].strip()[:300]}" if words else ""
    return f"the engine builder {cause} (last phase: {phase}){said}"
