"""The INT8 ladder as bars, and layers in half against quality as a curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.report.numbers import decibel, percent
from exporter.report.plots import Curve, Scale, curve, linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """Every rung of parity.json beside the length of its bar, and where the gate stands."""

    scale: Scale
    rungs: tuple[tuple[Mapping[str, Any], float | None], ...]
    gate_db: float | None
    gate: float | None


def ladder(parity: Mapping[str, Any], precision: str) -> Ladder | None:
    """None where no ladder was climbed."""
    rungs = parity.get("ladder", ())
    if not rungs:
        return None
    row = next((row for row in parity["stages"] if row["stage"] == precision), None)
    gate_db = row["tolerance"].get("min_sqnr_db") if row else None
    known = [rung["sqnr_db"] for rung in rungs if rung["sqnr_db"] is not None]
    scale = linear([*known, *([gate_db] if gate_db is not None else [])])
    return Ladder(
        scale=scale,
        rungs=tuple(
            (rung, None if rung["sqnr_db"] is None else scale.place(rung["sqnr_db"]))
            for rung in rungs
        ),
        gate_db=gate_db,
        gate=None if gate_db is None else scale.place(gate_db),
    )


def half_curve(parity: Mapping[str, Any]) -> Curve | None:
    """SQNR over the number of layers in half; None where fewer than two points are known."""
    mixed = parity.get("mixed_precision")
    if mixed is None:
        return None
    line, measured = [], []
    for point in mixed["curve"]:
        words = f"{point['kept']} in half, INT8 share {percent(point['int8_share'])}"
        if point["predicted_sqnr_db"] is not None:
            text = f"{words}: {decibel(point['predicted_sqnr_db'])} predicted"
            line.append((float(point["kept"]), float(point["predicted_sqnr_db"]), text))
        if point["sqnr_db"] is not None:
            text = f"{words}: {decibel(point['sqnr_db'])} measured"
            measured.append((float(point["kept"]), float(point["sqnr_db"]), text))
    if len(line) < 2:
        return None
    published = [(x, y) for x, y, _ in measured if x == len(mixed["kept"])]
    return curve(
        line,
        measured,
        chosen=published[0] if published else None,
        wanted=mixed["wanted"].get("min_sqnr_db"),
    )
