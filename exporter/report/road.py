"""The stages of an export as a line with stations: status, parity and time of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.report.numbers import decibel, seconds

_JUDGED = {
    "reparameterize": "reparameterized",
    "export": "onnx",
    "simplify": "simplified",
    "engine": "engine",
}
"""Which row of the ledger judges a stage of the run; the precision's own row is found by name."""

_MAKES_PRECISION = ("quantize", "half", "bfloat16")
"""The last of these that was reached makes the graph of the precision."""

_WORDS = {"pass": "passed", "fail": "failed", "not_run": "not run", "done": "done"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """One stage. ``status`` is a row's, or ``done`` where no row judges it."""

    name: str
    status: str
    figure: str
    taken: str

    @property
    def words(self) -> str:
        """The status as a word."""
        return _WORDS[self.status]


def stations(
    parity: Mapping[str, Any],
    taken: Mapping[str, float | None],
    precision: str,
    failed_in: str | None = None,
) -> tuple[Station, ...]:
    """In the order of the run; a row that belongs to no stage of it is a station of its own.

    ``taken`` names the stages that were reached, with the time of each where it is told.

    A stage that was never reached is not there; ``failed_in``, where a run ended, has no time.
    """
    rows = {row["stage"]: row for row in parity["stages"]}
    owners = dict(_JUDGED)
    reached = {*taken, failed_in}
    owners |= dict.fromkeys([n for n in _MAKES_PRECISION if n in reached][-1:], precision)
    found = [
        _station(name, rows.pop(owners.get(name, ""), None), time, reached=True)
        for name, time in taken.items()
    ]
    # The run ends with publishing; what follows in the ledger stands before it.
    end = len(found) - 1 if found and found[-1].name == "publish" else len(found)
    names = {row: name for name, row in owners.items()}
    extra = [
        _station(names.get(stage, stage), row, None, reached=False) for stage, row in rows.items()
    ]
    everything = (*found[:end], *extra, *found[end:])
    if failed_in is not None and failed_in not in {station.name for station in everything}:
        return (*everything, Station(name=failed_in, status="fail", figure="failed", taken=""))
    return everything


def _station(
    name: str, row: Mapping[str, Any] | None, time: float | None, *, reached: bool
) -> Station:
    status = row["status"] if row else "done"
    figure = ""
    if row is not None:
        figure = decibel(row["sqnr_db"]) if row["sqnr_db"] is not None else _WORDS[status]
        if name == "engine" and status == "not_run" and reached:
            figure = "built, not run"
    return Station(
        name=name, status=status, figure=figure, taken="" if time is None else seconds(time)
    )
