"""An inspection as tables for people; printing them is the command line's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from exporter.inspection.finding import Inspection
from exporter.inspection.outlook import KernelOutlook, Outlook

_STYLES = {
    Outlook.OK: "green",
    Outlook.WATCH: "yellow",
    Outlook.TROUBLE: "red",
    Outlook.UNKNOWN: "red",
}
_FOOTNOTE = "the outlook is for plain rounding; --recipe full, the default, is made for this"
_HEADINGS = ("max / median", "kurtosis", "peak sigmas", "centre sigmas", "dead")


def tables(inspection: Inspection) -> Iterable[Table]:
    """What the file is; for checkpoints also its fused kernels."""
    yield _facts(inspection)
    if inspection.layers:
        yield _kernels(inspection.layers)


def _facts(inspection: Inspection) -> Table:
    table = Table(title=escape(str(inspection.path)), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    facts = inspection.to_json()
    for key in ("file", "layers", "notes", "differences"):
        facts.pop(key, None)
    if not facts.get("difference_count"):
        facts.pop("difference_count", None)
    for key, value in facts.items():
        text = _text(value)
        if text:
            table.add_row(key.replace("_", " "), escape(text))
    return table


def _kernels(layers: tuple[KernelOutlook, ...]) -> Table:
    table = Table(title="fused kernels in INT8, before calibration")
    if any(layer.outlook in (Outlook.WATCH, Outlook.TROUBLE) for layer in layers):
        table.caption = _FOOTNOTE
    table.add_column("block")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    table.add_column("INT8 outlook")
    for layer in layers:
        figures = (layer.spread, layer.kurtosis, layer.peak_sigmas, layer.centre_sigmas)
        cells = ["" if figure is None else f"{figure:.1f}" for figure in figures]
        verdict = f"[{_STYLES[layer.outlook]}]{layer.outlook.value}[/]"
        table.add_row(layer.name, *cells, str(layer.dead_channels or ""), verdict)
    return table


def _text(value: Any) -> str:
    """A value in one cell; empty where there is nothing to say."""
    if value is None or (isinstance(value, (list, Mapping)) and not value):
        return ""
    if isinstance(value, Mapping):
        pairs = ((key, _text(inner)) for key, inner in value.items())
        return ", ".join(f"{key} {text}" for key, text in pairs if text)
    if isinstance(value, list) and not any(isinstance(item, (dict, list)) for item in value):
        return ", ".join(map(str, value))
    if isinstance(value, list):
        return "; ".join(
            _text(item) if isinstance(item, dict) else json.dumps(item) for item in value
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", " ")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
