"""What the manifest says about the environment that made a bundle."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata

DISTRIBUTIONS = {
    "repvgg-exporter": ("repvgg-exporter",),
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnxsim": ("onnxsim",),
    "numpy": ("numpy",),
    "Pillow": ("Pillow",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx"),
}


def versions() -> dict[str, str | None]:
    """Installed version of everything that takes part in an export; None where it is missing."""
    return {"python": platform.python_version(), **{name: version(name) for name in DISTRIBUTIONS}}


def version(name: str) -> str | None:
    """Installed version of one of `DISTRIBUTIONS`, under any of its names; None without it."""
    for distribution in DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def moment() -> datetime:
    """Now in UTC, or what ``SOURCE_DATE_EPOCH`` names: seconds since 1970."""
    epoch = _source_date_epoch()
    return datetime.now(timezone.utc) if epoch is None else epoch


def created() -> str:
    """The :func:`moment` as ISO 8601 to the second."""
    return moment().isoformat(timespec="seconds")


def recorded_seconds(seconds: float) -> float | None:
    """What a file says of a wall time: nothing where ``SOURCE_DATE_EPOCH`` wants equal files."""
    return seconds if _source_date_epoch() is None else None


def _source_date_epoch() -> datetime | None:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.fromtimestamp(int(epoch), timezone.utc) if epoch.isdigit() else None
