"""What to make: a TOML file of axes, whose product are the cells.

::

    [matrix]                            # an axis a key: any key of an export, the model first
    model = ["A0", "B1"]
    precision = ["fp16", "int8"]
    recipe = ["mse", "full"]            # of int8 cells only
    target = ["sm86", "orin,sm89"]      # each text is the target of a cell

    [defaults]                          # of every cell
    batch = "1:8:32"

    [[override]]                        # for the cells that have all values of `when`
    when = { model = "B1" }
    weights = "b1.pth"

    [[exclude]]                         # cells with all these values are left out
    model = "B1"
    target = "orin,sm89"

Paths are relative to the file's folder.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.cases import (
    KEYS,
    SAFE_NAME,
    Complaints,
    Layers,
    read_toml,
    read_values,
    table_of,
    tables_of,
)
from exporter.errors import InputError
from exporter.request import ExportRequest
from exporter.spec import Precision

_TABLES = ("matrix", "defaults", "override", "exclude")
_INT8_ONLY = ("recipe",)
_MOST_CELLS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One export. ``name`` is also the name of its folder, ``axes`` its place in the matrix."""

    name: str
    axes: Mapping[str, str]
    request: ExportRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixConfig:
    """All cells in the order of the axes, the last one running fastest."""

    path: Path
    cells: tuple[Cell, ...]

    def into(self, folder: Path) -> tuple[Cell, ...]:
        """The cells, each with its own folder in ``folder`` to go to."""
        return tuple(
            replace(cell, request=replace(cell.request, out=str(folder / cell.name)))
            for cell in self.cells
        )


def read_matrix(path: Path) -> MatrixConfig:
    """Everything that ``path`` asks for.

    Raises:
        InputError: if it cannot be read, or with all that is wrong in it, each complaint naming
            its table and key.
    """
    content = read_toml(path)
    complaints = Complaints()
    for key in content.keys() - set(_TABLES):
        complaints.add_unknown("the file", key, _TABLES)
    axes = _axes(table_of(content, "matrix", complaints), complaints)
    defaults = table_of(content, "defaults", complaints)
    overrides = [
        _Override.of(table, place, path.parent, complaints)
        for place, table in _placed(content, "override", complaints)
    ]
    excludes = [
        _condition(table, place, complaints)
        for place, table in _placed(content, "exclude", complaints)
    ]
    shared = read_values(defaults, "[defaults]", path.parent, complaints, apart=())
    cells: dict[str, Cell] = {}
    for place in _product(axes):
        if not any(_holds(wanted, place) for wanted in excludes):
            cell = _cell(place, shared, overrides, path.parent, complaints)
            if cell is not None:
                _add(cells, cell, complaints)
    if not cells and not complaints.all:
        complaints.add("the file", "matrix", "has no cells")
    if complaints.all:
        raise InputError(f"{path}: {'; '.join(complaints.all)}")
    return MatrixConfig(path=path, cells=tuple(cells.values()))


def _axes(table: Mapping[str, Any], complaints: Complaints) -> dict[str, tuple[Any, ...]]:
    axes: dict[str, tuple[Any, ...]] = {}
    for key, raw in table.items():
        values = raw if isinstance(raw, list) else [raw]
        if key not in KEYS:
            complaints.add_unknown("[matrix]", key, KEYS)
        elif not values:
            complaints.add("[matrix]", key, "has no values")
        elif any(isinstance(value, list | dict) for value in values):
            complaints.add("[matrix]", key, "must be a list of texts and numbers")
        else:
            axes[key] = tuple(dict.fromkeys(values))
    if "model" not in table:
        complaints.add("[matrix]", "model", "is missing")
    count = 1
    for named in axes.values():
        count *= len(named)
    if count > _MOST_CELLS:
        complaints.add("the file", "matrix", f"has {count} cells, at most {_MOST_CELLS} are made")
        return {}
    # The model names a cell first, whatever the order of the file.
    return dict(sorted(axes.items(), key=lambda item: item[0] != "model"))


def _product(axes: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Every combination once; what means nothing for a precision is left away."""
    seen = set()
    for values in itertools.product(*axes.values()) if axes else ():
        place = dict(zip(axes, values, strict=True))
        if str(place.get("precision", Precision.INT8)).lower() != Precision.INT8.value:
            place = {key: value for key, value in place.items() if key not in _INT8_ONLY}
        mark = tuple(map(str, place.items()))
        if mark not in seen:
            seen.add(mark)
            yield place


def _placed(
    content: Mapping[str, Any], name: str, complaints: Complaints
) -> list[tuple[str, dict[str, Any]]]:
    """The tables ``[[name]]``, each with what it is called."""
    tables = tables_of(content, name, complaints)
    return [(f"[[{name}]] {number}", table) for number, table in enumerate(tables, 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Override:
    """Values for the cells that hold ``when``; ``place`` is what its table is called."""

    place: str
    when: Mapping[str, Any]
    values: Mapping[str, Any]

    @classmethod
    def of(
        cls, table: Mapping[str, Any], place: str, folder: Path, complaints: Complaints
    ) -> _Override:
        when = table.get("when")
        if not isinstance(when, dict):
            complaints.add(place, "when", 'must be a table, such as { model = "B1" }')
            when = {}
        own = read_values(table, place, folder, complaints, apart=("when",))
        return cls(place=place, when=_condition(when, f"{place}, when", complaints), values=own)


def _condition(table: Mapping[str, Any], place: str, complaints: Complaints) -> Mapping[str, Any]:
    for key in table:
        if key not in KEYS:
            complaints.add_unknown(place, key, KEYS)
    return table


def _holds(wanted: Mapping[str, Any], place: Mapping[str, Any]) -> bool:
    return all(key in place and str(place[key]) == str(value) for key, value in wanted.items())


def _cell(
    axes: Mapping[str, Any],
    defaults: Mapping[str, Any],
    overrides: list[_Override],
    folder: Path,
    complaints: Complaints,
) -> Cell | None:
    """The cell, or None where something in it is wrong, which is then among the complaints."""
    known = len(complaints.all)
    own = read_values(axes, "[matrix]", folder, complaints, apart=())
    base = dict(defaults)
    for override in overrides:
        if _holds(override.when, axes):
            base |= override.values
    if len(complaints.all) == known and "model" in own:
        Layers(defaults=base, own=own, place="[matrix]").judge(complaints)
    if len(complaints.all) > known or "model" not in own:
        return None
    named = {key: str(value) for key, value in axes.items()}
    return Cell(name=_name(named), axes=named, request=ExportRequest(**{**base, **own}))


def _name(axes: Mapping[str, str]) -> str:
    """``B1-int8-full-sm86``; what no folder can be called becomes an underscore."""
    name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", Path(text).name) for text in axes.values())
    return name if SAFE_NAME.fullmatch(name) else f"_{name}"


def _add(cells: dict[str, Cell], cell: Cell, complaints: Complaints) -> None:
    if cell.name in cells:
        others = ", ".join(f"{key} {value}" for key, value in cell.axes.items())
        complaints.add("the file", "matrix", f"two cells would be called {cell.name}: {others}")
    cells[cell.name] = cell
