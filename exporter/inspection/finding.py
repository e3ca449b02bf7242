"""What :func:`exporter.inspection.inspect_file` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from exporter.inspection.outlook import KernelOutlook

UNKNOWN_FORMAT = "unknown"
OWN_FORMAT = "exporter"


class Kind(str, Enum):
    """What a file is."""

    CHECKPOINT = "checkpoint"
    ONNX = "onnx"
    BUNDLE = "bundle"
    ENGINE = "engine"
    CALIBRATION_TABLE = "calibration table"
    CALIBRATION_CACHE = "calibration cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A file described; None where a figure does not apply or the file does not say.

    ``size_bytes`` and ``sha256`` are the file's; of a bundle, all its files' and the manifest's.
    ``details`` is JSON-ready and differs by kind. ``layers`` is filled for checkpoints. ``notes``
    are sentences for the user.
    """

    path: Path
    kind: Kind
    size_bytes: int
    sha256: str
    format: str = UNKNOWN_FORMAT
    form: str | None = None
    variant: str | None = None
    num_classes: int | None = None
    parameters: int | None = None
    nan_count: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[KernelOutlook, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that ``inspect --json`` prints."""
        return {
            "file": str(self.path),
            "kind": self.kind.value,
            "format": self.format,
            "form": self.form,
            "variant": self.variant,
            "num_classes": self.num_classes,
            "parameters": self.parameters,
            "nan_count": self.nan_count,
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            **self.details,
            "layers": [layer.to_json() for layer in self.layers],
            "notes": list(self.notes),
        }
