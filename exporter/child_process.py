"""What processes that this one starts are given, and how their end is told."""

from __future__ import annotations

import os
import signal
import sysconfig
from pathlib import Path


def environment() -> dict[str, str]:
    """This process's environment, with the import path made independent of the working directory.

    ``python -m`` and ``-c`` put the working directory first on the import path, where a stray
    ``models/`` may lie: the child runs in another folder, or takes the empty entry off. Relative
    entries of PYTHONPATH are made absolute, and the folder that holds this package is added unless
    Python finds it anyway.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    entries = [str(Path(entry).absolute()) for entry in given if entry]
    home = Path(__file__).resolve().parents[1]
    installed = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    if home not in {Path(path).resolve() for path in installed}:
        entries.insert(0, str(home))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(entries))}


def thread_environment(number: int) -> dict[str, str]:
    """Variables that make the libraries compute with ``number`` threads, and not spin."""
    return {
        "OMP_NUM_THREADS": str(number),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": "1",
    }


def signal_name(code: int) -> str:
    """Of the signal that ended a process whose return code is ``code``, below 0."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        # Real-time signals have numbers only.
        return f"signal {-code}"
