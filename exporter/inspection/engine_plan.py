"""Describe a serialized plan by its header."""

from __future__ import annotations

from pathlib import Path

from exporter.bundle import file_sha256
from exporter.engine.plan_header import read_plan_header
from exporter.inspection.finding import Inspection, Kind


def inspect_plan(path: Path) -> Inspection:
    """What the header of a TensorRT-RTX plan says.

    Raises:
        InputError: if the plan is cut.
    """
    header = read_plan_header(path)
    return Inspection(
        path=path,
        kind=Kind.ENGINE,
        size_bytes=header.plan_bytes,
        sha256=file_sha256(path),
        details={
            "builder": f"TensorRT-RTX {header.version}",
            "targets": list(header.targets),
            "weight_bytes": header.weight_bytes,
        },
        notes=(
            "a plan does not say which network it holds; the bundle it belongs to does "
            "(engine.json lists its convolutions by data type)",
        ),
    )
