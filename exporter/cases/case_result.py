"""What one case gave: its ledger, what its engine holds, the size of its files, or why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from exporter.errors import EXIT_DONE, GateFailedError

ENGINE_CONTENTS = "engine contents"
FILES = "files"

Figures = Mapping[str, Mapping[str, float]]
"""``{"int8": {"sqnr_db": 37.3, ...}, "engine contents": {...}, "files": {...}}``."""

_STAGE_FIGURES = ("sqnr_db", "top1_agreement", "top1")


class Status(str, Enum):
    """How a case ended. ``ERROR``: it could not be run to its end, and no gate says why."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """``stages`` are rows as parity.json has them, up to the failed one if one failed.

    ``message`` is the sentence of a failure or an error, ``exit_code`` what `engine` would have
    ended with. ``engine`` is engine.json, ``files`` the size of each file of the bundle in bytes;
    both are empty where nothing was published. ``reused`` are the stages that came from the cache.
    """

    name: str
    status: Status
    seconds: float
    exit_code: int = 0
    message: str | None = None
    stages: tuple[Mapping[str, Any], ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()

    @property
    def figures(self) -> Figures:
        """What a baseline compares, by stage; what was not measured is left out."""
        found: dict[str, dict[str, float]] = {}
        for row in self.stages:
            values = {key: row[key] for key in _STAGE_FIGURES if row.get(key) is not None}
            if values:
                found[row["stage"]] = values
        if "per_target" in self.engine:
            found[ENGINE_CONTENTS] = {
                "int8_convolutions": self.engine["convolutions"]["int8"],
                "epilogue_fused": self.engine["epilogue_fused"],
                "other_kernels": self.engine["other_kernels"],
                "plan_bytes": self.engine["plan_bytes"],
            }
        models = sum(size for name, size in self.files.items() if name.endswith(".onnx"))
        if models:
            found[FILES] = {"model_bytes": models}
        return found

    def to_json(self) -> dict[str, Any]:
        """One case of the results file."""
        return {
            "name": self.name,
            "status": str(self.status),
            "exit_code": self.exit_code,
            "message": self.message,
            "seconds": round(self.seconds, 1),
            "stages": [dict(row) for row in self.stages],
            "engine": dict(self.engine),
            "figures": {stage: dict(values) for stage, values in self.figures.items()},
            "notes": list(self.notes),
            "reused": list(self.reused),
        }


def exit_code_of(results: Sequence[CaseResult]) -> int:
    """That of all together: a failed gate counts before what kept a case from running."""
    codes = [result.exit_code for result in results if result.exit_code != EXIT_DONE]
    if GateFailedError.exit_code in codes:
        return GateFailedError.exit_code
    return codes[0] if codes else EXIT_DONE
