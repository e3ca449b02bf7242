"""Renders report.html: one file that needs nothing outside itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from exporter.engine import same_figures
from exporter.plan.engine import DEFERRED
from exporter.report import numbers
from exporter.report.command import command_line
from exporter.report.content import ReportContent
from exporter.report.layer_views import deviation_bars, layer_bars, spreads
from exporter.report.recipe_views import half_curve, ladder
from exporter.report.road import stations
from exporter.report.verdict import sentence, tiles

_FILTERS = {
    "capitalized": numbers.capitalized,
    "decibel": numbers.decibel,
    "percent": numbers.percent,
    "significant": numbers.significant,
    "cosine": numbers.cosine,
    "seconds": numbers.seconds,
    "size": numbers.size,
    "times": numbers.times,
}
_KINDS = {"int8": "INT8", "half": "half", "float": "float", "bf16": "bfloat16", "fp8": "FP8"}
_USUAL = ("int8", "half", "float")
GATE_WORDS = {
    "max_relative": "difference at most",
    "min_sqnr_db": "SQNR at least",
    "min_top1_agreement": "same top-1 at least",
    "max_top1_drop": "top-1 loss at most",
}


@functools.cache
def environment() -> Environment:
    """The templates of all pages; every text from outside is escaped."""
    found = Environment(
        loader=PackageLoader("exporter.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= _FILTERS
    return found


def html(content: ReportContent) -> str:
    """The page; every text from outside is escaped."""
    parity = content.parity
    layers = parity.get("layers")
    localization = parity.get("localization")
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            manifest=content.manifest,
            spec=content.manifest["spec"],
            parity=parity,
            engine=content.engine,
            deferred=_deferred(content.engine),
            engine_groups=same_figures((content.engine or {}).get("per_target", {})),
            engine_kinds=_engine_kinds(content.engine),
            failed=content.failure is not None or parity["verdict"] == "fail",
            failure=content.failure,
            sentence=sentence(content),
            tiles=tiles(content),
            stations=stations(parity, content.seconds, content.precision, content.failed_in),
            seconds={name: time for name, time in content.seconds.items() if time is not None},
            files=content.files,
            ladder=ladder(parity, content.precision),
            curve=half_curve(parity),
            layers=layers,
            layer_bars=layer_bars(layers),
            activations=spreads(layers, "activations"),
            weights=spreads(layers, "weights"),
            localization=localization,
            deviation_bars=deviation_bars(localization),
            worst=parity.get("worst_images"),
            pictures=content.pictures,
            command=command_line(content.manifest["spec"]),
            gate_words=_gate_words,
        )
    )
    # A file name on Linux need not be valid UTF-8; the page is.
    return page.encode("utf-8", "replace").decode("utf-8")


def _gate_words(tolerance: Mapping[str, float]) -> str:
    """``SQNR at least 25 dB, same top-1 at least 98.00 %``."""
    words = []
    for name, limit in tolerance.items():
        figure = numbers.significant(limit)
        if name == "min_sqnr_db":
            figure = numbers.decibel(limit)
        elif name in ("min_top1_agreement", "max_top1_drop"):
            figure = numbers.percent(limit)
        elif name == "max_relative":
            figure = f"{figure} of the range"
        words.append(f"{GATE_WORDS.get(name, name)} {figure}")
    return ", ".join(words)


def _deferred(engine: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if engine is None:
        return None
    return engine if engine.get("status") == DEFERRED else engine.get("deferred")


def _engine_kinds(engine: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Key and label of the data types worth a column: the usual ones, and what is there."""
    rows = [row["convolutions"] for row in (engine or {}).get("per_target", {}).values()]
    return [
        (key, label)
        for key, label in _KINDS.items()
        if key in _USUAL or any(row.get(key) for row in rows)
    ]
