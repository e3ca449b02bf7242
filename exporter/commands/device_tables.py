"""Results of the device half as tables for people; printing them is the console's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from exporter.device.accuracy import Evaluation
from exporter.latency import Benchmark, SideBySide

_SHOWN_MISTAKES = 3


def engine_table(path: Path, engine: Mapping[str, Any]) -> Table:
    """What an engine contains, one row a target; ``engine`` is engine.json."""
    title = f"{path}: engine of {engine['plan_bytes'] / 1e6:.1f} MB by {engine['backend']} "
    table = _table(title + engine["version"], "target")
    kinds = ("INT8", "half", "float", "bfloat16", "FP8")
    for heading in ("convolutions", *kinds, "fused epilogues", "other kernels"):
        table.add_column(heading, justify="right")
    for target, figures in engine["per_target"].items():
        counts = figures["convolutions"]
        keys = ("total", "int8", "half", "float", "bf16", "fp8")
        numbers = [counts.get(key, 0) for key in keys]
        numbers += [figures["epilogue_fused"], figures["other_kernels"]]
        table.add_row(target, *map(str, numbers))
    return table


def evaluation_tables(result: Evaluation) -> Iterable[Table]:
    """The figures, then the classes with most mistakes."""
    table = _table(f"{result.bundle} on {result.data}, {result.library}", "shards")
    for heading in ("images", "skipped", "top-1", "top-5", "images/s"):
        table.add_column(heading, justify="right")
    rate = result.images_per_second
    table.add_row(
        ", ".join(map(str, result.shards)),
        str(result.images),
        str(result.skipped),
        _percent(result.top1_correct, result.images),
        _percent(result.top5_correct, result.images),
        "" if rate is None else f"{rate:.1f}",
    )
    yield table
    worst = result.worst_classes()
    if worst:
        table = _table("Classes with mistakes", "class")
        table.add_column("images", justify="right")
        table.add_column("right", justify="right")
        table.add_column("taken for")
        for row in worst:
            others = [f"{escape(name)} ({n})" for name, n in row.taken_for[:_SHOWN_MISTAKES]]
            more = ["..."] if len(row.taken_for) > _SHOWN_MISTAKES else []
            share = _percent(row.correct, row.images)
            table.add_row(escape(row.name), str(row.images), share, ", ".join(others + more))
        yield table


def latency_table(result: Benchmark) -> Table:
    """One row a batch size."""
    words = [f"{result.bundle}, {result.library}"]
    if result.threads is not None:
        words.append("all cores" if result.threads == 0 else f"threads: {result.threads}")
    if result.cuda_graph:
        words.append("CUDA graph")
    table = _table(", ".join(words))
    for heading in ("batch", "runs", "p50 ms", "p90 ms", "p99 ms", "images/s"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        times = (f"{value:.3f}" for value in (row.p50_ms, row.p90_ms, row.p99_ms))
        table.add_row(str(row.batch), str(row.runs), *times, f"{row.images_per_second:.1f}")
    table.caption = _start(result)
    return table


def _start(result: Benchmark) -> str | None:
    """What the start took, and what the cold one did."""
    if result.load_ms is None:
        return None
    words = [f"loaded in {result.load_ms:.1f} ms"]
    if result.first_run_ms is not None:
        words.append(f"first run {result.first_run_ms:.1f} ms")
    if result.runtime_cache is not None:
        words.append(f"runtime cache {result.runtime_cache}")
    if result.cold_load_ms is not None and result.cold_first_run_ms is not None:
        words.append(f"cold: {result.cold_load_ms:.1f} ms and {result.cold_first_run_ms:.1f} ms")
    return ", ".join(words)


def ratio_table(pair: SideBySide) -> Table:
    """The second bundle's time as a multiple of the first's, with its spread over the rounds."""
    table = _table(f"Time of {pair.second.bundle} / {pair.first.bundle}, measured in turns")
    for heading in ("batch", "ratio", "p10 to p90 of the rounds", "rounds"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in pair.ratios:
        spread = f"{row.low:.3f} to {row.high:.3f}"
        table.add_row(str(row.batch), f"{row.median:.3f}", spread, str(row.rounds), row.verdict)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title))
    for column in columns:
        table.add_column(column)
    return table


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %"
