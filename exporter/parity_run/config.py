"""What to run: a TOML file of cases, read and judged as a whole.

::

    [defaults]                  # of every case
    target = "sm86"

    [margins]                   # of every case, against a baseline
    sqnr_db = 1.0

    [[case]]
    name = "A0-int8"            # default: MODEL-PRECISION
    model = "A0"
    precision = "int8"
    min_sqnr_db = 35
    margins = { sqnr_db = 0.5 } # of this case

A case has the keys of :class:`exporter.request.ExportRequest`, without ``out``. Paths are relative
to the file's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.cases import (
    SAFE_NAME,
    Complaints,
    Layers,
    read_toml,
    read_values,
    table_of,
    tables_of,
)
from exporter.errors import InputError
from exporter.parity_run.margins import KINDS, Margins
from exporter.request import ExportRequest

_TABLES = ("defaults", "margins", "case")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One export. ``name`` is also the name of its folder."""

    name: str
    request: ExportRequest
    margins: Margins


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityConfig:
    """All cases, in the order of the file, each with a name of its own."""

    path: Path
    cases: tuple[Case, ...]


def read_config(path: Path) -> ParityConfig:
    """Everything that ``path`` asks for.

    Raises:
        InputError: if it cannot be read, or with all that is wrong in it, each complaint naming
            its table and key.
    """
    content = read_toml(path)
    complaints = Complaints()
    for key in content.keys() - set(_TABLES):
        complaints.add_unknown("the file", key, _TABLES)
    defaults = table_of(content, "defaults", complaints)
    margins = table_of(content, "margins", complaints)
    shared = _Shared(
        folder=path.parent,
        complaints=complaints,
        defaults=read_values(defaults, "[defaults]", path.parent, complaints, apart=()),
        margins=_margins(margins, "[margins]", Margins(), complaints),
    )
    tables = tables_of(content, "case", complaints)
    if content.get("case", []) == []:
        complaints.add("the file", "case", "there is none; head each with [[case]]")
    cases: list[Case] = []
    for number, table in enumerate(tables, 1):
        case = _case(table, _place(table, number), shared)
        if case is not None and case.name in {other.name for other in cases}:
            complaints.add(_place(table, number), "name", f"{case.name!r} is taken already")
        elif case is not None:
            cases.append(case)
    if complaints.all:
        raise InputError(f"{path}: {'; '.join(complaints.all)}")
    return ParityConfig(path=path, cases=tuple(cases))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What all cases of a file have in common."""

    folder: Path
    complaints: Complaints
    defaults: Mapping[str, Any]
    margins: Margins


def _place(table: Mapping[str, Any], number: int) -> str:
    name = table.get("name")
    return f"[[case]] {number}" + (f" ({name})" if isinstance(name, str) and name else "")


def _case(table: Mapping[str, Any], place: str, shared: _Shared) -> Case | None:
    """The case, or None where something in it is wrong, which is then among the complaints."""
    complaints = shared.complaints
    known = len(complaints.all)
    own = read_values(table, place, shared.folder, complaints, apart=("name", "margins"))
    margins, wanted = shared.margins, table.get("margins", {})
    if isinstance(wanted, dict):
        margins = _margins(wanted, f"{place}, margins", margins, complaints)
    else:
        complaints.add(place, "margins", "must be a table, such as { sqnr_db = 0.5 }")
    layers = Layers(defaults=shared.defaults, own=own, place=place)
    if "model" not in layers.values:
        complaints.add(place, "model", "is missing")
        return None
    name = table.get("name", f"{layers.values['model']}-{layers.values.get('precision', 'int8')}")
    if not isinstance(name, str) or not SAFE_NAME.fullmatch(name):
        words = "must be letters, digits, dots, dashes and underscores, and begin with no dot"
        complaints.add(place, "name", f"{words}, not {name!r}")
    layers.judge(complaints)
    if len(complaints.all) > known:
        return None
    return Case(name=str(name), request=ExportRequest(**layers.values), margins=margins)


def _margins(
    table: Mapping[str, Any], place: str, margins: Margins, complaints: Complaints
) -> Margins:
    found = {}
    for key, value in table.items():
        if key not in KINDS:
            complaints.add_unknown(place, key, KINDS)
        elif (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300
        ):
            complaints.add(place, key, f"must be a number of at least 0, not {value!r}")
        else:
            found[key] = float(value)
    return margins.with_values(found)
