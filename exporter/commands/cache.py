"""The command `cache`: what the stage cache holds, and emptying it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from exporter.commands import AddCommand
from exporter.console import print_json, print_line, print_table
from exporter.errors import EXIT_DONE, EnvironmentLackError

if TYPE_CHECKING:
    from rich.table import Table

    from exporter.stage_cache import EntryInfo, StageStore

_MIB = 1 << 20


def add_command(command: AddCommand) -> None:
    """Add the command; its ``run`` default executes it."""
    parser = command("cache", "list or empty the stage cache")
    parser.add_argument("action", choices=("ls", "clear"), help="list its entries, or remove all")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from exporter.stage_cache import CACHE_VARIABLE, open_cache

    store = open_cache()
    if store is None:
        raise EnvironmentLackError(
            f"there is no stage cache: {CACHE_VARIABLE} is off, or there is no home directory"
        )
    run = {"ls": _list, "clear": _clear}[options.action]
    try:
        return run(store, options.json)
    except OSError as error:
        raise EnvironmentLackError(
            f"the stage cache {store.root} cannot be used: {error.strerror or error}"
        ) from error


def _list(store: StageStore, as_json: bool) -> int:
    entries = store.entries()
    total = sum(entry.bytes for entry in entries)
    if as_json:
        print_json({
            "root": str(store.root), "limit": store.limit, "bytes": total,
            "entries": [entry.to_json() for entry in entries],
        })  # fmt: skip
        return EXIT_DONE
    if entries:
        print_table(_table(entries))
    print_line(
        f"{store.root}: {len(entries)} entries, {total / _MIB:.1f} MiB of {store.limit / _MIB:.0f}"
    )
    return EXIT_DONE


def _table(entries: Sequence[EntryInfo]) -> Table:
    from rich.table import Table

    table = Table("stage", "of", "key", title="stage cache", title_justify="left")
    for name in ("MiB", "made in s", "last used"):
        table.add_column(name, justify="right")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        figures = (f"{entry.bytes / _MIB:.1f}", f"{entry.seconds:.1f}", used)
        table.add_row(entry.stage, _words(entry), entry.key[:12], *figures)
    return table


def _words(entry: EntryInfo) -> str:
    """What tells one entry from another, in a few words."""
    names = ("name", "precision", "recipe", "target")
    return " ".join(text for name in names if (text := entry.inputs.get(name, "")))


def _clear(store: StageStore, as_json: bool) -> int:
    count = store.clear()
    if as_json:
        print_json({"root": str(store.root), "removed": count})
    else:
        print_line(f"{store.root}: {count} entries removed")
    return EXIT_DONE
