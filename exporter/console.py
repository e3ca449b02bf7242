"""What a person sees of results: tables and lines on standard output."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from exporter.terminal import streams, visible
from exporter.terminal.cells import figure, percent

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from exporter.pipeline import ExportResult
    from exporter.plan.content import Plan


_WIDTH = 120
"""Columns of a table where nothing says how wide the reader's screen is."""


def result_json(result: ExportResult) -> dict[str, Any]:
    """What ``--json`` prints of an export."""
    return {
        "bundle": str(result.bundle.path),
        "verdict": result.ledger.verdict,
        "parity": result.ledger.to_json(),
        "engine": result.engine,
        "notes": list(result.notes),
        "seconds": result.seconds,
        "stages": [use.to_json() for use in result.stages],
    }


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    streams().result(json.dumps(content, allow_nan=False))


def print_line(text: str) -> None:
    """One line on standard output."""
    streams().result(text)


def print_note(text: str) -> None:
    """One line on standard error, unless quiet."""
    streams().note(text)


def print_warning(text: str) -> None:
    """One line on standard error, quiet or not."""
    streams().error(f"warning: {text}")


def print_result(result: ExportResult) -> None:
    """The ledger, what the engine contains, and where the bundle is."""
    from exporter.engine import count_words, same_figures

    spec = result.bundle.manifest["spec"]
    print_ledger(result.ledger.to_json(), f"{spec['name']} {spec['precision']}")
    total = sum(result.seconds.values())
    if result.engine.get("status") == "deferred":
        waiting = ", ".join(result.engine["targets"])
        print_line(f"{spec['out']}: no engine yet for {waiting}; {total:.1f} s")
        return
    for names, figures in same_figures(result.engine["per_target"]):
        counts = figures["convolutions"]
        print_line(
            f"{' '.join(names)}: {counts['total']} convolutions ({count_words(counts)}), "
            f"{figures['epilogue_fused']} with fused epilogue, "
            f"{figures['other_kernels']} other kernels"
        )
    for warning in result.engine["warnings"]:
        print_line(f"warning: {warning}")
    print_line(
        f"{spec['out']}: engine of {result.engine['plan_bytes'] / 1e6:.1f} MB for "
        f"{', '.join(result.engine['targets'])}; {total:.1f} s"
    )


_STAGES = {
    "float": "float graph",
    "draft": "graphs and evidence",
    "engine": "engine",
    "publish": "publishing",
}
"""What people call the stages of `--explain`."""


def print_stages(result: ExportResult) -> None:
    """`--explain`: each stage, whether it was reused, and what has changed. No second is in two."""
    from rich.table import Table

    table = Table("stage", "", title="stages", title_justify="left")
    for name in ("now s", "made in s"):
        table.add_column(name, justify="right")
    table.add_column("why", overflow="fold")
    uses = {use.stage: use for use in result.stages}
    # It is asked for within the draft, which therefore counts its seconds too.
    within = uses["float"].seconds if "float" in uses else 0.0
    for use in result.stages:
        taken = within if use.stage == "draft" else 0.0
        made_in = use.made_in if use.reused else use.made_in - taken
        words = [
            f"{name}: {was or '-'} -> {now or '-'}" for name, (was, now) in use.changed.items()
        ]
        why = "nothing has changed" if use.reused else "\n".join(words) or use.reason
        figures = (f"{use.seconds - taken:.2f}", f"{made_in:.2f}")
        table.add_row(_STAGES[use.stage], "reused" if use.reused else "made", *figures, why)
    for stage in ("engine", "publish"):
        if stage in result.seconds and stage not in uses:
            spent = f"{result.seconds[stage]:.2f}"
            table.add_row(_STAGES[stage], "made", spent, spent, "is never kept")
    print_table(table)
    draft = uses["draft"]
    print_line(f"up to the builder: {draft.seconds:.2f} s, {draft.made_in:.2f} s when it was made")


def print_plan(plan: Plan) -> None:
    """What would be done, where the engines are built, and what to expect."""
    from exporter.plan.view import plan_lines, plan_tables

    for table in plan_tables(plan):
        print_table(table)
    for line in plan_lines(plan):
        print_line(line)


def print_ledger(parity: Mapping[str, Any], title: str) -> None:
    """parity.json as tables: one row a stage, then the ladder and the layers in half."""
    from rich.table import Table

    top1 = parity["original_top1"]
    words = "" if top1 is None else f", original top-1 {100 * top1:.2f} %"
    table = Table(title=f"{title}: {parity['image_count']} images ({parity['images']}){words}")
    table.add_column("stage")
    table.add_column("status")
    counts = {row.get("images") for row in parity["stages"] if row["status"] != "not_run"}
    headings = ("images",) if counts - {None, parity["image_count"]} else ()
    for heading in (*headings, "SQNR dB", "max |diff|", "cosine", "agreement", "top-1"):
        table.add_column(heading, justify="right")
    for row in parity["stages"]:
        table.add_row(
            row["stage"],
            row["status"].replace("_", " "),
            *(figure(row.get("images"), "{}") for _ in headings),
            figure(row["sqnr_db"], "{:.1f}"),
            figure(row["max_abs"], "{:.3g}"),
            figure(row["cosine"], "{:.6f}"),
            percent(row["top1_agreement"]),
            percent(row["top1"]),
        )
    print_table(table)
    if len(parity.get("ladder", ())) > 1:
        _print_ladder(parity["ladder"])
    mixed = parity.get("mixed_precision")
    if mixed and mixed["wanted"]:
        _print_curve(mixed)
    for row in parity["stages"]:
        if row["status"] == "not_run":
            print_line(f"{row['stage']} not run: {row['reason']}")


def _print_ladder(rungs: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="INT8 ladder")
    table.add_column("recipe")
    for heading in ("SQNR dB", "cosine", "KL, nats", "agreement", "top-1", "s"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for rung in rungs:
        table.add_row(
            rung["recipe"],
            figure(rung["sqnr_db"], "{:.1f}"),
            figure(rung["cosine"], "{:.6f}"),
            figure(rung["kl_nats"], "{:.2g}"),
            percent(rung["top1_agreement"]),
            percent(rung["top1"]),
            figure(rung["seconds"], "{:.1f}"),
            "chosen" if rung["chosen"] else rung["reason"] or "",
        )
    print_table(table)


def _print_curve(mixed: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title="Layers in half")
    table.add_column("layers", justify="right")
    table.add_column("added")
    for heading in ("INT8 share of MACs", "SQNR dB predicted", "measured", "agreement", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for point in mixed["curve"]:
        chosen = point["status"] == "pass" and point["kept"] == len(mixed["kept"])
        table.add_row(
            str(point["kept"]),
            point["added"] or "",
            percent(point["int8_share"]),
            figure(point["predicted_sqnr_db"], "{:.1f}"),
            figure(point["sqnr_db"], "{:.1f}"),
            percent(point["top1_agreement"]),
            percent(point["top1"]),
            "chosen" if chosen else "",
        )
    print_table(table)


def print_table(table: Table) -> None:
    """On standard output, as wide as the terminal or COLUMNS says.

    Elsewhere rich would assume 80 columns and cut figures off.
    """
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            """Leave it to the stream: rich itself would end the program with exit code 1."""
            raise BrokenPipeError

        def render_str(self, text: str, **more: Any) -> Text:
            """Cells hold names from files."""
            return super().render_str(visible(text), **more)

    own = streams()
    if own.log is not None:
        plain = io.StringIO()
        Pipe(file=plain, width=_WIDTH, highlight=False, color_system=None).print(table)
        own.record("result", plain.getvalue())
    known = own.out.isatty() or "COLUMNS" in os.environ
    with own.writing() as out:
        Pipe(file=out, width=None if known else _WIDTH, highlight=False).print(table)
