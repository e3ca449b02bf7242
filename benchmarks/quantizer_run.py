"""Runs one quantizer in a process of its own and says what it took, or why there is no result."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from quantizer_job import Job

_FOLDER = Path(__file__).parent
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "Failed to allocate", "Cannot allocate memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of the work alone: ``peak_growth_mib`` is over what was resident just before it."""

    seconds: float
    peak_growth_mib: float
    peak_mib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """No result; ``reason`` is a few words."""

    reason: str


def run(job: Job, modelopt: Path | None = None) -> Cost | Failure:
    """Do ``job`` in a fresh process; ``modelopt`` is the interpreter that has Model Optimizer."""
    python, child = Path(sys.executable), "quantizer_child.py"
    if job.method.startswith("modelopt"):
        if modelopt is None:
            return Failure(reason="not installed")
        python, child = modelopt, "modelopt_child.py"
    done = subprocess.run(
        [str(python), str(_FOLDER / child), job.to_json()],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return Failure(reason=reason_of(done, limited=job.address_space_mib is not None))
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def reason_of(done: subprocess.CompletedProcess[str], *, limited: bool) -> str:
    """Why a child ended without a result, in a few words."""
    # Under a limit a native library may die of a failed allocation without a word.
    if any(words in done.stderr for words in _OUT_OF_MEMORY) or (limited and done.returncode < 0):
        return "out of memory"
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
