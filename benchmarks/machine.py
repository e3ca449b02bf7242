"""The machine that measured, for the head of a result."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, and the versions of ``packages``."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        **{name: metadata.version(name) for name in packages},
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
