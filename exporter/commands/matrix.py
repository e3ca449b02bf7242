"""The command `matrix`: many exports as one job."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.commands import AddCommand
from exporter.commands.export import prepare_export
from exporter.console import print_json, print_line, print_note, print_table
from exporter.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.cases import CaseResult
    from exporter.matrix import Cell, MatrixState
    from exporter.matrix.page import Row
    from exporter.matrix.schedule import Pool


def add_command(command: AddCommand) -> None:
    """Add the command; its ``run`` default executes it."""
    parser = command("matrix", "make many bundles, and compare them")
    add = parser.add_argument_group("what goes in").add_argument
    add("config", type=Path, help="a TOML file of axes; docs/matrix.md describes it")
    add = parser.add_argument_group("where it runs").add_argument
    add("--jobs", type=int, metavar="N", help="exports at once on this machine (default: one for "
        "two cores and shard)")  # fmt: skip
    add("--threads", type=int, metavar="N", help="of each export (default: the cores, shared out)")
    add("--shards", type=int, default=1, metavar="N", help="cut the images of each export into N "
        "parts that are looked at at the same time (default: 1)")  # fmt: skip
    add("--ray", metavar="ADDRESS", help="run on this Ray cluster: auto, HOST:PORT or "
        "ray://HOST:PORT")  # fmt: skip
    add("--no-cache", dest="cached", action="store_false", help="share no stages, and keep none")
    add = parser.add_argument_group("result").add_argument
    add("--out", type=Path, default=Path("build/matrix"), metavar="DIR",
        help="where the bundles and index.html go (default: build/matrix)")  # fmt: skip
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    prepare_export()
    from exporter.cases import exit_code_of
    from exporter.files.whole_file import write_whole
    from exporter.matrix import INDEX, MatrixState, index_page, read_matrix, run_cells
    from exporter.matrix.page import rows_of

    for name in ("jobs", "threads", "shards"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    config = read_matrix(options.config)
    state = MatrixState.resume(options.out, config.into(options.out))
    for name in sorted(state.kept):
        print_note(f"{name}: kept, nothing has changed")

    def ended(cell: Cell, result: CaseResult) -> None:
        state.record(cell, result)
        print_note(f"{cell.name}: {_words(result)}")
        write_whole(options.out / INDEX, index_page(state, options.config.stem))

    missing = state.missing
    if missing:
        shared = {name: [key for _, key in keys.shared] for name, keys in state.keys.items()}
        with _pool(options, state) as pool:
            run_cells(missing, shared if options.cached else {c.name: () for c in missing},
                      pool, ended)  # fmt: skip
    write_whole(options.out / INDEX, index_page(state, options.config.stem))
    rows = rows_of(state)
    if options.json:
        print_json({**state.to_json(), "index": str(options.out / INDEX)})
    else:
        print_table(_table(rows))
        print_line(f"{options.out / INDEX}: {len(rows)} bundles compared")
    for row in rows:
        if row.result.message is not None:
            print_note(f"{row.cell.name}: {row.result.message}")
    return exit_code_of([row.result for row in rows])


def _pool(options: argparse.Namespace, state: MatrixState) -> AbstractContextManager[Pool]:
    cores = os.cpu_count() or 1
    if options.ray is not None:
        from exporter.matrix.ray_pool import RayPool

        if options.jobs is not None:
            raise InputError("--jobs is for this machine; a cluster runs what it has room for")
        return RayPool(
            options.ray,
            threads=options.threads or 1,
            cached=options.cached,
            shared={name: keys.shared for name, keys in state.keys.items()},
            shards=options.shards,
        )
    from exporter.matrix.subprocess_pool import SubprocessPool

    shards = options.shards
    jobs = options.jobs or max(1, cores // (2 * shards))
    threads = options.threads or max(1, cores // (jobs * shards))
    return SubprocessPool(width=jobs, threads=threads, cached=options.cached, shards=shards)


def _words(result: CaseResult) -> str:
    reused = f", reused {' and '.join(result.reused)}" if result.reused else ""
    return f"{result.status} in {result.seconds:.1f} s{reused}"


def _table(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    from exporter.matrix.page import front, measure_of
    from exporter.report import numbers

    table = Table("bundle", "status", title="matrix", title_justify="left")
    for name in ("top-1", "SQNR", "size", "INT8 share"):
        table.add_column(name, justify="right")
    table.add_column("engine")
    table.add_column("beaten by none")
    measure = measure_of(rows)
    best = {row.cell.name for row in front(rows, measure)}
    for row in rows:
        table.add_row(
            row.cell.name,
            str(row.result.status),
            numbers.percent(row.top1),
            numbers.decibel(row.sqnr_db),
            numbers.size(measure.size(row)),
            numbers.percent(row.int8_share),
            row.engine,
            "yes" if row.cell.name in best else "",
        )
    return table
