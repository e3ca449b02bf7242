"""What the process that builds and the process that waits say to each other.

The parent makes a private folder and writes `REQUEST` there. The child prints progress as one JSON
object a line, ``{"phase": str, "fraction": float}``, and leaves `LOG`, `PLAN`, where the library
inspects its plans `LAYERS`, and, last, `RESULT` in the folder. A child that leaves no `RESULT` did
not finish, whatever its exit code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from exporter.build_options import BuildOptions, Dla, HardwareCompatibility, Quantization, Typing
from exporter.engine.backend import BuildRequest
from exporter.engine.summary import EngineTyping
from exporter.profiles import BatchProfile, SizeProfile
from exporter.spec import Precision

REQUEST = "request.json"
RESULT = "result.json"
PLAN = "plan"
LOG = "build.log"
LAYERS = "layers.json"


class Status(str, Enum):
    """How a build ended."""

    BUILT = "built"
    REFUSED = "refused"
    BAD_INPUT = "bad_input"
    LACKING = "lacking"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The child's last word; ``errors`` is empty exactly if the plan was built.

    ``notes`` are for people: what the builder was told and what it will not do. ``typing`` is who
    chose the data types.
    """

    status: Status
    version: str = ""
    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    typing: EngineTyping = EngineTyping.STRONG

    def write(self, folder: Path) -> None:
        """Leave the result in ``folder``."""
        content = {
            "status": self.status.value,
            "version": self.version,
            "errors": list(self.errors),
            "notes": list(self.notes),
            "typing": self.typing.value,
        }
        (folder / RESULT).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """The result in ``folder``; None if there is none or it makes no sense."""
        try:
            content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            return cls(
                status=Status(content["status"]),
                version=str(content["version"]),
                errors=tuple(str(error) for error in content["errors"]),
                notes=tuple(str(note) for note in content.get("notes", ())),
                typing=EngineTyping(content.get("typing", EngineTyping.STRONG)),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None


def request_to_json(request: BuildRequest) -> dict[str, object]:
    """The request with an absolute path, so that it holds in any working directory."""
    batch, size = request.batch, request.size
    return {
        "onnx_path": str(request.onnx_path.absolute()),
        "precision": request.precision.value,
        "targets": list(request.targets),
        "batch": [batch.min, batch.opt, batch.max],
        "size": None if size is None else str(size),
        "workspace_mib": request.workspace_mib,
        "float_path": _absolute(request.float_path),
        "cache_path": _absolute(request.cache_path),
        "options": _options_to_json(request.options),
    }


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _options_to_json(options: BuildOptions) -> dict[str, object]:
    dla = options.dla
    return {
        "typing": options.typing.value,
        "quantization": options.quantization.value,
        "calibration_cache": _absolute(options.calibration_cache),
        "dla": None if dla is None else {"core": dla.core, "gpu_fallback": dla.gpu_fallback},
        "timing_cache": _absolute(options.timing_cache),
        "optimization_level": options.optimization_level,
        "hardware_compatibility": options.hardware_compatibility.value,
        "version_compatible": options.version_compatible,
        "allow_emulated": options.allow_emulated,
    }


def request_from_json(text: str) -> BuildRequest:
    """The inverse of `request_to_json` on its JSON text.

    Raises:
        ValueError, KeyError, TypeError: if the text is no request.
    """
    content = json.loads(text)
    return BuildRequest(
        onnx_path=Path(content["onnx_path"]),
        precision=Precision(content["precision"]),
        targets=tuple(content["targets"]),
        batch=BatchProfile(*content["batch"]),
        size=None if content["size"] is None else SizeProfile.parse(content["size"]),
        workspace_mib=content["workspace_mib"],
        float_path=_path(content["float_path"]),
        cache_path=_path(content["cache_path"]),
        options=_options_from_json(content["options"]),
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _options_from_json(content: Mapping[str, Any]) -> BuildOptions:
    dla = content["dla"]
    return BuildOptions(
        typing=Typing(content["typing"]),
        quantization=Quantization(content["quantization"]),
        calibration_cache=_path(content["calibration_cache"]),
        dla=None if dla is None else Dla(core=dla["core"], gpu_fallback=dla["gpu_fallback"]),
        timing_cache=_path(content["timing_cache"]),
        optimization_level=content["optimization_level"],
        hardware_compatibility=HardwareCompatibility(content["hardware_compatibility"]),
        version_compatible=content["version_compatible"],
        allow_emulated=content["allow_emulated"],
    )


def progress_from_line(line: str) -> tuple[str, float] | None:
    """Phase and fraction of one line of the child's output; None for anything else."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, Mapping):
        return None
    phase, fraction = content.get("phase"), content.get("fraction")
    if not isinstance(phase, str) or not isinstance(fraction, (int, float)):
        return None
    return phase, min(1.0, max(0.0, float(fraction)))
