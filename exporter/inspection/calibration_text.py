"""Describe a calibration table (our JSON) or a calibration cache (TensorRT's text)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibration.cache_text import CalibrationTableError, parse_cache_text
from calibration.table import CalibrationTable
from exporter.bundle import file_sha256
from exporter.errors import InputError
from exporter.files.text_file import read_text
from exporter.inspection.finding import OWN_FORMAT, Inspection, Kind
from exporter.inspection.recognition import may_be_table, nothing_known


def inspect_table(path: Path) -> Inspection:
    """Read ``calibration.json``.

    Raises:
        InputError: if it is no calibration table, or a damaged one.
    """
    text = _text(path)
    if not may_be_table(text):
        raise nothing_known(path)
    try:
        table = CalibrationTable.loads(text)
    except CalibrationTableError as error:
        raise InputError(f"{path} is JSON but no calibration table ({error})") from error
    details = {
        "method": table.method,
        "images": table.image_count,
        "data_sha256": table.data_sha256,
        "onnx_sha256": table.onnx_sha256,
        **_scales(table.activation_scales),
    }
    return Inspection(
        path=path,
        kind=Kind.CALIBRATION_TABLE,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        format=OWN_FORMAT,
        details=details,
    )


def inspect_cache(path: Path) -> Inspection:
    """Read a calibration cache of any TensorRT version.

    Raises:
        InputError: naming the line that is damaged.
    """
    text = _text(path)
    try:
        scales = parse_cache_text(text)
    except CalibrationTableError as error:
        raise InputError(f"{path}: {error}") from error
    return Inspection(
        path=path,
        kind=Kind.CALIBRATION_CACHE,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        details={"header": text.partition("\n")[0].strip(), **_scales(scales)},
    )


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged: it is not text from byte {error.start} on") from error


def _scales(scales: Any) -> dict[str, Any]:
    values = list(scales.values())
    return {
        "tensors": len(values),
        "smallest_scale": min(values, default=None),
        "largest_scale": max(values, default=None),
    }
