"""Engines: the one room that names TensorRT.

Importing it needs the standard library only; TensorRT is imported in a process of its own, for the
time of one build. The order to read: `backend` (what is asked), `tensorrt_rtx` (who answers),
`worker_process` and `worker` (how), `build_log` and `inventory` (what came out), `summary` (the
verdict).
"""

from __future__ import annotations

import difflib

from exporter.engine.backend import Backend, BuildRequest, BuiltEngine, ProgressCallback
from exporter.engine.driver import engine_not_run_reason
from exporter.engine.summary import (
    ConvolutionCounts,
    EngineSummary,
    TargetFigures,
    check_engine,
)
from exporter.engine.targets import parse_targets
from exporter.engine.tensorrt_rtx import TensorRtRtx
from exporter.errors import InputError

__all__ = [
    "Backend",
    "BuildRequest",
    "BuiltEngine",
    "ConvolutionCounts",
    "EngineSummary",
    "ProgressCallback",
    "TargetFigures",
    "TensorRtRtx",
    "check_engine",
    "engine_not_run_reason",
    "get_backend",
    "parse_targets",
]

_BACKENDS = {"auto": TensorRtRtx, TensorRtRtx.name: TensorRtRtx}


def get_backend(name: str) -> Backend:
    """Return the backend called ``name``; ``auto`` picks the one that can build here.

    Raises:
        InputError: no backend has this name; the message lists the names.
        EnvironmentLackError: its library is not installed, or too old.
    """
    wanted = name.strip().lower()
    if wanted in _BACKENDS:
        return _BACKENDS[wanted]()
    nearest = difflib.get_close_matches(wanted, _BACKENDS, n=1)
    hint = f"nearest: {nearest[0]}; " if nearest else ""
    raise InputError(f"unknown backend {name!r} ({hint}known: {', '.join(_BACKENDS)})")
