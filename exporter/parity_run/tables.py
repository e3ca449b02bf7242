"""The results as a table for people; printing it is the console's."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from exporter.cases.case_result import ENGINE_CONTENTS, CaseResult, Status
from exporter.parity_run.baseline import Comparison
from exporter.terminal.cells import figure


def results_table(
    results: Sequence[CaseResult], comparison: Comparison, title: str, *, has_baseline: bool
) -> Table:
    """One row a case; the figures are those of its last stage that was measured."""
    table = Table(title=escape(title))
    for heading in ("case", "gates", "baseline", "stage"):
        table.add_column(heading)
    for heading in ("SQNR dB", "agreement", "top-1", "INT8 convolutions", "plan MB", "s"):
        table.add_column(heading, justify="right")
    for result in results:
        worse = sum(change.case == result.name for change in comparison.regressions)
        against = f"{worse} worse" if worse else "pass"
        stage = next((name for name in [*result.figures][::-1] if not _apart(name)), "")
        figures = result.figures.get(stage, {})
        engine = result.figures.get(ENGINE_CONTENTS, {})
        table.add_row(
            escape(result.name),
            str(result.status),
            against if has_baseline and result.status is Status.PASS else "",
            stage,
            figure(figures.get("sqnr_db"), "{:.1f}"),
            figure(figures.get("top1_agreement"), "{:.2%}"),
            figure(figures.get("top1"), "{:.2%}"),
            figure(engine.get("int8_convolutions"), "{:.0f}"),
            "" if not engine else f"{engine['plan_bytes'] / 1e6:.1f}",
            f"{result.seconds:.1f}",
        )
    return table


def _apart(stage: str) -> bool:
    return stage in (ENGINE_CONTENTS, "files")
