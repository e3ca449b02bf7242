"""What a person sees: progress on standard error, results as tables on standard output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.parity import Ledger
    from exporter.pipeline import ExportResult


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, one line a stage elsewhere, nothing if ``quiet``."""
    if quiet:
        yield _silent
    elif not sys.stderr.isatty():
        seen: set[str] = set()

        def announce(stage: str, _fraction: float) -> None:
            if stage not in seen:
                seen.add(stage)
                print(f"{stage} ...", file=sys.stderr, flush=True)

        yield announce
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:15}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            tasks: dict[str, Any] = {}

            def update(stage: str, fraction: float) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=1.0)
                bars.update(tasks[stage], completed=fraction)

            yield update


def _silent(_stage: str, _fraction: float) -> None:
    return


def result_json(result: ExportResult) -> dict[str, Any]:
    """What ``--json`` prints of an export."""
    return {
        "bundle": str(result.bundle.path),
        "verdict": result.ledger.verdict,
        "parity": result.ledger.to_json(),
        "engine": result.engine,
        "notes": list(result.notes),
        "seconds": result.seconds,
    }


def print_result(result: ExportResult) -> None:
    """The ledger, what the engine contains, and where the bundle is."""
    spec = result.bundle.manifest["spec"]
    print_ledger(result.ledger, f"RepVGG-{spec['variant']} {spec['precision']}")
    for targets, figures in _same_figures(result.engine["per_target"]):
        counts = figures["convolutions"]
        print(
            f"{targets}: {counts['total']} convolutions ({counts['int8']} INT8, {counts['half']} "
            f"half, {counts['float']} float), {figures['epilogue_fused']} with fused epilogue, "
            f"{figures['other_kernels']} other kernels"
        )
    for warning in result.engine["warnings"]:
        print(f"warning: {warning}")
    total = sum(result.seconds.values())
    print(
        f"{spec['out']}: engine of {result.engine['plan_bytes'] / 1e6:.1f} MB for "
        f"{', '.join(result.engine['targets'])}; {total:.1f} s"
    )


def _same_figures(per_target: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Targets with equal figures on one line: a plan for several has one layer table."""
    groups: list[tuple[str, dict[str, Any]]] = []
    for target, figures in per_target.items():
        if groups and groups[-1][1] == figures:
            groups[-1] = (f"{groups[-1][0]} {target}", figures)
        else:
            groups.append((target, figures))
    return groups


def print_ledger(ledger: Ledger, title: str) -> None:
    """One row a stage."""
    from rich.table import Table

    top1 = (
        ""
        if ledger.original_top1 is None
        else f", original top-1 {100 * ledger.original_top1:.2f} %"
    )
    table = Table(title=f"{title}: {ledger.image_count} images ({ledger.images}){top1}")
    table.add_column("stage")
    table.add_column("status")
    for heading in ("SQNR dB", "max |diff|", "cosine", "agreement", "top-1"):
        table.add_column(heading, justify="right")
    for row in ledger.stages:
        figures = row.comparison
        cells = ["", "", "", ""]
        if figures is not None:
            cells = [
                f"{figures.sqnr_db:.1f}",
                f"{figures.max_abs:.3g}",
                f"{figures.cosine:.6f}",
                "" if figures.top1_agreement is None else f"{100 * figures.top1_agreement:.2f} %",
            ]
        top = "" if row.top1 is None else f"{100 * row.top1:.2f} %"
        table.add_row(row.stage, row.status.replace("_", " "), *cells, top)
    print_table(table)
    for row in ledger.stages:
        if row.status == "not_run":
            print(f"{row.stage} not run: {row.reason}")


def print_table(table: Table) -> None:
    """On standard output; off a terminal rich would assume 80 columns and cut figures off."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)
