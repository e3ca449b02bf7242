"""What an export made, as a table; printing it is the console's."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from exporter.bundle import ENGINE, ENGINE_SUMMARY, MANIFEST, MODEL, REPORT, UNLISTED, Bundle

_ROWS = {
    MODEL: "the plain float network",
    ENGINE: "the engine",
    ENGINE_SUMMARY: "what the engine contains",
    REPORT: "the evidence, to read",
}
_NO_ENGINE = "why there is no engine, and how to build it"


def made_table(bundle: Bundle) -> Table:
    """The files that people open, with their sizes; the rest in one row."""
    sizes = {name: entry["bytes"] for name, entry in bundle.manifest["files"].items()}
    own = [bundle.path / name for name in sorted(UNLISTED)]
    sizes |= {path.name: path.stat().st_size for path in own if path.is_file()}
    graph = bundle.graph_path.name
    between = {} if graph == MODEL else {graph: "the graph the engine is built from"}
    rows = {MODEL: _ROWS[MODEL], **between, **_ROWS}
    if ENGINE not in sizes:
        rows[ENGINE_SUMMARY] = _NO_ENGINE
    shown = [name for name in rows if name in sizes]
    table = Table(title=escape(f"{bundle.path}: {len(sizes)} files, {_size(sum(sizes.values()))}"))
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("what it is")
    for name in shown:
        table.add_row(escape(name), _size(sizes[name]), rows[name])
    others = sizes.keys() - set(shown)
    rest = _size(sum(sizes[name] for name in others))
    table.add_row(f"{len(others)} more", rest, f"records; {MANIFEST} lists them")
    return table


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
