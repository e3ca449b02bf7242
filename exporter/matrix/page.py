"""index.html: all bundles of a matrix side by side, and which of them no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.cases import CaseResult
from exporter.matrix.config import Cell
from exporter.matrix.state import MatrixState
from exporter.plan.engine import DEFERRED
from exporter.report import curve, environment, numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell as a line of the table.

    ``top1`` and ``sqnr_db`` are of the precision's stage, ``graph_bytes`` the size of the graph to
    build from, ``engine_bytes`` of the engine, ``int8_share`` is of its convolutions; None where
    there is none.
    """

    cell: Cell
    result: CaseResult
    kept: bool
    top1: float | None
    sqnr_db: float | None
    graph_bytes: int | None
    engine_bytes: int | None
    int8_share: float | None
    engine: str

    @classmethod
    def of(cls, cell: Cell, result: CaseResult, *, kept: bool) -> Row:
        """What of a result is compared."""
        judged = [stage for stage in result.stages if stage["sqnr_db"] is not None]
        last = judged[-1] if judged else {}
        engine, counts = result.engine, result.engine.get("convolutions")
        graphs = [size for name, size in result.files.items() if name.endswith(".onnx")]
        words = "deferred" if engine.get("status") == DEFERRED else "built" if engine else ""
        return cls(
            cell=cell,
            result=result,
            kept=kept,
            top1=last.get("top1"),
            sqnr_db=last.get("sqnr_db"),
            graph_bytes=min(graphs, default=None),
            engine_bytes=engine.get("plan_bytes"),
            int8_share=counts["int8"] / counts["total"] if counts and counts["total"] else None,
            engine=words,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Figures that all bundles have: top-1 where there are labels, else SQNR; a size."""

    words: str
    percent: bool
    of_engines: bool

    @property
    def size_words(self) -> str:
        """Whose size it is."""
        return "engine" if self.of_engines else "graph that the engine is built from"

    def size(self, row: Row) -> int | None:
        """In bytes."""
        return row.engine_bytes if self.of_engines else row.graph_bytes

    def of(self, row: Row) -> float | None:
        """In percent or decibels."""
        if self.percent:
            return None if row.top1 is None else 100 * row.top1
        return row.sqnr_db


def rows_of(state: MatrixState) -> tuple[Row, ...]:
    """The cells that have ended, in their order."""
    return tuple(
        Row.of(cell, state.results[cell.name], kept=cell.name in state.kept)
        for cell in state.cells
        if cell.name in state.results
    )


def measure_of(rows: Sequence[Row]) -> Measure:
    """Top-1 if every published bundle has it, the engine's size if every one has an engine."""
    made = [row for row in rows if row.graph_bytes is not None]
    percent = bool(made) and all(row.top1 is not None for row in made)
    return Measure(
        words="top-1, %" if percent else "SQNR, dB",
        percent=percent,
        of_engines=bool(made) and all(row.engine_bytes is not None for row in made),
    )


def front(rows: Sequence[Row], measure: Measure) -> tuple[Row, ...]:
    """Those that no other one beats: none is as small and as accurate, and better in one of them.

    By size, the smallest first.
    """
    known = [
        (size, accuracy, row)
        for row in rows
        if (size := measure.size(row)) is not None and (accuracy := measure.of(row)) is not None
    ]
    best: list[Row] = []
    highest = float("-inf")
    for _, accuracy, row in sorted(known, key=lambda item: (item[0], -item[1])):
        if accuracy > highest:
            best.append(row)
            highest = accuracy
    return tuple(best)


def index_page(state: MatrixState, title: str) -> str:
    """The page; every text from outside is escaped."""
    rows = rows_of(state)
    measure = measure_of(rows)
    best = front(rows, measure)
    failed = [row for row in rows if row.result.exit_code]
    return (
        environment()
        .get_template("matrix.html.j2")
        .render(
            title=title,
            rows=rows,
            failed=failed,
            missing=len(state.missing),
            front={row.cell.name for row in best},
            measure=measure,
            plot=_plot(rows, best, measure),
        )
    )


def _plot(rows: Sequence[Row], best: Sequence[Row], measure: Measure) -> Any:
    """Accuracy over size; None where there are fewer than two bundles to compare."""
    points = [point for row in rows if (point := _point(row, measure)) is not None]
    line = [point for row in best if (point := _point(row, measure)) is not None]
    return curve(line, points, chosen=None, wanted=None) if len(points) > 1 else None


def _point(row: Row, measure: Measure) -> tuple[float, float, str] | None:
    accuracy, size = measure.of(row), measure.size(row)
    if size is None or accuracy is None:
        return None
    share = "" if row.int8_share is None else f", INT8 share {numbers.percent(row.int8_share)}"
    unit = "%" if measure.percent else "dB"
    text = f"{row.cell.name}: {accuracy:.2f} {unit}, {numbers.size(size)}{share}"
    return size / 1e6, accuracy, text
