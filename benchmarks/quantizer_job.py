"""One quantizer's work in a process of its own: what it is told, and how time and memory are taken.

A job is a JSON object on the command line, the answer one JSON object on the last line of standard
output. Both children read this file, each in its own environment: standard library and numpy only.

Memory is the highest resident set during the work less the resident set just before it, when the
libraries are imported and, where a quantizer wants them as one array, the images are loaded. It is
read from /proc: ``ru_maxrss`` of a child starts at the peak of the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """``method`` makes the Q/DQ graph ``target`` of the float graph ``source``.

    ``images`` holds float32 values of ``shape`` and nothing else, so that a batch can be read
    without the rest. ``address_space_mib`` caps the process's address space.
    """

    method: str
    source: str
    target: str
    images: str
    shape: tuple[int, int, int, int]
    per_tensor_weights: bool = False
    address_space_mib: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**(values | {"shape": tuple(values["shape"])}))

    def batches(self) -> Iterator[npt.NDArray[np.float32]]:
        """The images, ``BATCH_SIZE`` at a time."""
        with Path(self.images).open("rb") as file:
            for start in range(0, self.shape[0], BATCH_SIZE):
                count = min(BATCH_SIZE, self.shape[0] - start)
                values = np.fromfile(file, np.float32, count * int(np.prod(self.shape[1:])))
                yield values.reshape(count, *self.shape[1:])

    def all_images(self) -> npt.NDArray[np.float32]:
        """The images as one array."""
        return np.fromfile(self.images, np.float32).reshape(self.shape)


def answer(job: Job, work: Callable[[], None]) -> None:
    """Do ``work`` and print what it took. What the libraries print goes to standard error."""
    if job.address_space_mib is not None:
        limit = job.address_space_mib << 20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before, _ = resident_mib(reset_peak=True)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        work()
    seconds = time.perf_counter() - start
    _, peak = resident_mib()
    print(json.dumps({"seconds": seconds, "peak_growth_mib": peak - before, "peak_mib": peak}))


def resident_mib(process: int | None = None, *, reset_peak: bool = False) -> tuple[float, float]:
    """The resident set of ``process``, else of this one, now and at its highest.

    Raises:
        OSError, KeyError: if there is no such process, or if it has ended.
    """
    place = Path("/proc", str(process or os.getpid()))
    if reset_peak:
        with contextlib.suppress(OSError):
            (place / "clear_refs").write_text("5")
    status = (place / "status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines())
    now, highest = (float(values[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, highest
