"""parity.json: the rows of all stages, the INT8 ladder, and what keeping layers in half brings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from calibration.sensitivity import ParetoPoint
from exporter.parity import Gate, StageResult
from exporter.parity.deviation import Localization
from exporter.parity.layer_figures import LayerTable
from exporter.parity.worst_images import WorstImages
from exporter.provenance import recorded_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One recipe's score. ``result`` is None where it could not be made, for ``reason``.

    ``seconds`` is what quantizing took, the observation of the calibration images not included.
    """

    recipe: str
    seconds: float
    result: StageResult | None = None
    reason: str | None = None
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """Figures are null where there is no result, the time where files must be reproducible."""
        keys = ("status", "reason", "sqnr_db", "cosine", "kl_nats", "top1_agreement", "top1")
        row = self.result.to_json() if self.result else {"status": "fail", "reason": self.reason}
        figures = {key: row.get(key) for key in keys}
        return {
            "recipe": self.recipe,
            "chosen": self.chosen,
            **figures,
            "seconds": recorded_seconds(round(self.seconds, 2)),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """A point of the Pareto list, and the measurement where it was tried."""

    point: ParetoPoint
    result: StageResult | None = None

    def to_json(self) -> dict[str, Any]:
        """``added`` is the layer that joined those kept in half; decibels beyond 200 are null."""
        found = self.result.to_json() if self.result else {}
        predicted = self.point.sqnr_db
        return {
            "kept": len(self.point.kept),
            "added": self.point.kept[-1] if self.point.kept else None,
            "int8_share": self.point.int8_share,
            "predicted_sqnr_db": predicted if math.isfinite(predicted) else None,
            **{
                key: found.get(key)
                for key in ("status", "sqnr_db", "kl_nats", "top1_agreement", "top1")
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedPrecision:
    """Layers in half against SQNR and the INT8 share of the multiply-accumulates.

    ``kept`` are the layers that the published graph computes in half; ``wanted`` is the gate for
    which they were chosen, empty where none was asked for.
    """

    curve: tuple[CurvePoint, ...]
    kept: tuple[str, ...] = ()
    wanted: Gate = field(default_factory=Gate)

    def to_json(self) -> dict[str, Any]:
        """Names of what is kept, and the whole list."""
        return {
            "wanted": self.wanted.to_json(),
            "kept": list(self.kept),
            "curve": [point.to_json() for point in self.curve],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """All stages in order. ``images`` says in words which images were compared.

    ``localization`` is there where a stage failed and its graph could be searched.
    """

    stages: tuple[StageResult, ...]
    images: str
    image_count: int
    original_top1: float | None = None
    ladder: tuple[Rung, ...] = ()
    mixed_precision: MixedPrecision | None = None
    layers: LayerTable | None = None
    worst_images: WorstImages | None = None
    localization: Localization | None = None

    @property
    def verdict(self) -> str:
        """``pass`` if something ran and nothing failed; what did not run is listed beside it."""
        statuses = {stage.status for stage in self.stages}
        return "pass" if "pass" in statuses and "fail" not in statuses else "fail"

    @property
    def not_run(self) -> tuple[str, ...]:
        """Names of the stages that did not run; they never count as passed."""
        return tuple(stage.stage for stage in self.stages if stage.status == "not_run")

    def with_stage(self, result: StageResult) -> Ledger:
        """A ledger with one more row."""
        return replace(self, stages=(*self.stages, result))

    def to_json(self) -> dict[str, Any]:
        """parity.json."""
        mixed = self.mixed_precision
        return {
            "verdict": self.verdict,
            "not_run": list(self.not_run),
            "images": self.images,
            "image_count": self.image_count,
            "original_top1": self.original_top1,
            "stages": [stage.to_json() for stage in self.stages],
            **({"ladder": [rung.to_json() for rung in self.ladder]} if self.ladder else {}),
            **({"mixed_precision": mixed.to_json()} if mixed else {}),
            **({"layers": self.layers.to_json()} if self.layers else {}),
            **({"worst_images": self.worst_images.to_json()} if self.worst_images else {}),
            **({"localization": self.localization.to_json()} if self.localization else {}),
        }
