"""A command with everything that it starts: wall time, processor time, memory; stopped at a limit.

Memory is the largest sum of the resident sets of all its processes at one moment, looked at every
:data:`INTERVAL_S`: a short peak between two looks is missed, pages that two processes share count
twice. A process that stands between fork and exec is left out, for it shows its parent's memory.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from quantizer_job import resident_mib
from quantizer_run import Failure, reason_of

INTERVAL_S = 0.02
MEMORY, TIME = "memory", "time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a command is stopped, so that it takes neither the machine nor the day."""

    memory_mib: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a command took until its end, or until ``stopped`` by the limit of that name.

    ``peak_mib`` is of all its processes together, ``own_peak_mib`` of the first alone.
    ``others`` is what the rest of the machine did meanwhile, in processors.
    """

    wall_s: float
    cpu_s: float
    peak_mib: float
    own_peak_mib: float
    others: float
    stopped: str | None
    stdout: str


def measure(
    command: Sequence[str], limits: Limits, environment: Mapping[str, str]
) -> Usage | Failure:
    """Run ``command`` to its end or to its limit, alone."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        before, busy, start = _children_cpu_s(), _busy_s(), time.perf_counter()
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, env=dict(environment), start_new_session=True
        )
        try:
            stopped, peak, own = _watch(process, limits)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        wall = time.perf_counter() - start
        cpu = _children_cpu_s() - before
        said, complained = (_text(stream) for stream in (stdout, stderr))
        if stopped is None and process.returncode != 0:
            done = subprocess.CompletedProcess(list(command), process.returncode, said, complained)
            return Failure(reason=reason_of(done, limited=False))
        return Usage(
            wall_s=wall,
            cpu_s=cpu,
            peak_mib=peak,
            own_peak_mib=own,
            others=max(0.0, (_busy_s() - busy - cpu) / wall),
            stopped=stopped,
            stdout=said,
        )


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> tuple[str | None, float, float]:
    """Until the end or a limit: which, and the peaks of all processes and of the first."""
    deadline = time.perf_counter() + limits.seconds
    peak = own = 0.0
    while process.poll() is None:
        together = sum(now for now, _ in _sizes(_tree(process.pid)))
        own = max([own, *(highest for _, highest in _sizes([process.pid]))])
        peak = max(peak, together, own)
        if together > limits.memory_mib:
            return MEMORY, peak, own
        if time.perf_counter() > deadline:
            return TIME, peak, own
        time.sleep(INTERVAL_S)
    return None, peak, own


def _sizes(processes: Iterable[int]) -> Iterator[tuple[float, float]]:
    for each in processes:
        try:
            yield resident_mib(each)
        except (OSError, KeyError):  # it ended a moment ago
            continue


def _tree(process: int) -> Iterator[int]:
    """``process`` and all that descend from it."""
    yield process
    try:
        own_words = Path(f"/proc/{process}/cmdline").read_bytes()
        tasks = [*Path(f"/proc/{process}/task").glob("*/children")]
        children = [int(word) for task in tasks for word in task.read_text().split()]
        started = [c for c in children if Path(f"/proc/{c}/cmdline").read_bytes() != own_words]
    except OSError:
        return
    for child in started:
        yield from _tree(child)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _busy_s() -> float:
    """Seconds that all processors together have worked since the machine started."""
    with Path("/proc/stat").open() as file:
        ticks = [int(word) for word in file.readline().split()[1:]]
    user, nice, system, _idle, _waiting, interrupts, soft, *_ = ticks
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def _text(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()
