"""The first screen: one sentence and a handful of figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.report.content import ReportContent
from exporter.report.numbers import capitalized, decibel, percent, points, size

ENGINE = "model.engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One figure, what it is, and a word to it."""

    label: str
    figure: str
    detail: str = ""


def sentence(content: ReportContent) -> str:
    """What passed, what did not run and why; or what failed."""
    if content.failure is not None:
        # What localization found has a place of its own below.
        found = (content.parity.get("localization") or {}).get("sentence", "")
        return f"{capitalized(content.failure.replace(f'; {found}', ''))}."
    rows = content.parity["stages"]
    passed = [row["stage"] for row in rows if row["status"] == "pass"]
    words = f"{_listed(passed)} passed on {content.parity['image_count']} real images"
    few = {row["stage"]: row["images"] for row in rows if _on_few(row, content.parity)}
    if few:
        words += f" ({_listed(list(few))} on the first {max(few.values())} of them)"
    for row in rows:
        if row["status"] == "not_run":
            words += f"; {row['stage']} did not run: {row['reason'] or 'no reason is recorded'}"
    return f"{words}."


def _on_few(row: Mapping[str, Any], parity: Mapping[str, Any]) -> bool:
    images = row.get("images")
    return row["status"] == "pass" and images is not None and images < parity["image_count"]


def tiles(content: ReportContent) -> tuple[Tile, ...]:
    """Top-1 before and after, closeness, sizes; only what is known."""
    found = []
    row, before = content.last_row, content.parity["original_top1"]
    if row is not None and before is not None and row["top1"] is not None:
        found.append(
            Tile(
                label="top-1",
                figure=percent(row["top1"]),
                detail=f"{percent(before)} before: {points(before, row['top1'])}",
            )
        )
    if row is not None:
        detail = f"{row['stage']} against the {row['reference']}"
        found.append(Tile(label="SQNR", figure=decibel(row["sqnr_db"]), detail=detail))
        if row["top1_agreement"] is not None:
            found.append(
                Tile(
                    label="same top-1",
                    figure=percent(row["top1_agreement"]),
                    detail=f"of {content.parity['image_count']} images",
                )
            )
    engine = content.engine
    if engine is not None and "plan_bytes" in engine:
        found.append(
            Tile(
                label="engine",
                figure=size(engine["plan_bytes"]),
                detail=f"for {', '.join(engine['targets'])}",
            )
        )
    found += _graph_tile(content)
    return tuple(found)


def _graph_tile(content: ReportContent) -> list[Tile]:
    own = content.files.get(f"model.{content.precision}.onnx")
    whole = content.files.get("model.onnx")
    if own is None or whole is None:
        return []
    detail = f"{size(whole)} in float: {100 * own / whole:.0f}\u00a0%"
    return [Tile(label=f"{content.precision} graph", figure=size(own), detail=detail)]


def _listed(names: list[str]) -> str:
    if len(names) < 2:
        return "".join(names) or "nothing"
    return f"{', '.join(names[:-1])} and {names[-1]}"
