"""Figures of the layers on their axes: SQNR as bars, channel maxima as strips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.report.plots import Scale, linear, logarithmic


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBar:
    """One layer; lengths are percent of the axis. ``own`` is the mark of its own error."""

    name: str
    computed_in: str
    sqnr_db: float
    length: float
    own_db: float | None
    own: float | None
    deviates: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBars:
    """All layers on one axis."""

    scale: Scale
    rows: tuple[LayerBar, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers computed in something else than most are."""
        kinds = [row.computed_in for row in self.rows]
        usual = max(set(kinds), key=kinds.count)
        return tuple(row.name for row in self.rows if row.computed_in != usual)


def layer_bars(layers: Mapping[str, Any] | None) -> LayerBars | None:
    """SQNR of each layer of parity.json's ``layers``; None where none was compared."""
    rows = [row for row in (layers or {}).get("rows", ()) if row["sqnr_db"] is not None]
    if not rows:
        return None
    scale = linear([v for row in rows for v in (row["sqnr_db"], row["own_sqnr_db"] or 0.0)])
    return LayerBars(
        scale=scale,
        rows=tuple(
            LayerBar(
                name=row["name"],
                computed_in=row["computed_in"],
                sqnr_db=row["sqnr_db"],
                length=scale.place(row["sqnr_db"]),
                own_db=row["own_sqnr_db"],
                own=None if row["own_sqnr_db"] is None else scale.place(row["own_sqnr_db"]),
            )
            for row in rows
        ),
    )


def deviation_bars(localization: Mapping[str, Any] | None) -> LayerBars | None:
    """The own error of each node of a localization, the one that deviates marked."""
    rows = (localization or {}).get("rows", ())
    if not rows:
        return None
    scale = linear([row["sqnr_db"] for row in rows])
    return LayerBars(
        scale=scale,
        rows=tuple(
            LayerBar(
                name=row["name"],
                computed_in=row["operator"],
                sqnr_db=row["sqnr_db"],
                length=scale.place(row["sqnr_db"]),
                own_db=None,
                own=None,
                deviates=row["deviates"],
            )
            for row in rows
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """Channel maxima from the smallest to the largest, percent of the axis."""

    start: float
    length: float
    median: float
    smallest_value: float
    median_value: float
    largest_value: float
    dead: int

    @property
    def ratio(self) -> float:
        """The largest over the median: how many times too coarse one scale is for most."""
        return self.largest_value / self.median_value


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadRow:
    """One layer before and after equalization; ``before`` is None where nothing was rescaled."""

    name: str
    before: Strip | None
    after: Strip


@dataclass(frozen=True, slots=True, kw_only=True)
class Spreads:
    """All layers on one logarithmic axis."""

    scale: Scale
    rows: tuple[SpreadRow, ...]

    @property
    def rescaled(self) -> bool:
        """Whether there is a before."""
        return any(row.before for row in self.rows)


def spreads(layers: Mapping[str, Any] | None, kind: str) -> Spreads | None:
    """``kind`` is ``activations`` or ``weights`` of parity.json's layers."""
    found = [
        (row["name"], row[kind].get("before"), row[kind]["after"])
        for row in (layers or {}).get("rows", ())
        if row[kind] is not None and row[kind]["after"]["largest"] > 0
    ]
    if not found:
        return None
    values = [
        part[key]
        for _, *parts in found
        for part in parts
        if part
        for key in ("smallest", "median", "largest")
    ]
    scale = logarithmic(values)
    return Spreads(
        scale=scale,
        rows=tuple(
            SpreadRow(
                name=name,
                before=_strip(before, scale) if before and before["largest"] > 0 else None,
                after=_strip(after, scale),
            )
            for name, before, after in found
        ),
    )


def _strip(spread: Mapping[str, Any], scale: Scale) -> Strip:
    start, end = scale.place(spread["smallest"]), scale.place(spread["largest"])
    return Strip(
        start=start,
        length=round(end - start, 2),
        median=scale.place(spread["median"]),
        smallest_value=spread["smallest"],
        median_value=spread["median"],
        largest_value=spread["largest"],
        dead=spread["dead"],
    )
