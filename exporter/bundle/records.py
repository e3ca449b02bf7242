"""What the records of a bundle must be for everybody who reads them.

A bundle comes from another machine and perhaps from another hand. Its two records are checked once,
when it is opened, so that no reader meets a list where it expects a name. What is absent is no
fault where a reader has a default; unknown fields are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from exporter.pixel_input import DTYPE, FLOAT, Layout
from exporter.profiles import BatchProfile, SizeProfile
from exporter.spec import Precision

Check = Callable[[Any], bool]
_LARGEST = 2**31 - 1
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_STATUS = ("pass", "fail", "not_run")
GATE_FIELDS = ("max_relative", "min_sqnr_db", "min_top1_agreement", "max_top1_drop")
"""Those of exporter.parity.Gate, which stands above the bundle; a test holds them together."""


def manifest_fault(manifest: Mapping[str, Any]) -> str | None:
    """The first field of manifest.json that cannot be used; None if all can."""
    return _fault(manifest, _MANIFEST, "")


def parity_fault(parity: Mapping[str, Any]) -> str | None:
    """The first field of parity.json that cannot be used; None if all can."""
    fault = _fault(parity, {"stages": _list_of(_is_mapping)}, "")
    if fault is not None:
        return fault
    rows = (_fault(row, _STAGE, f"stages[{n}].") for n, row in enumerate(parity["stages"]))
    return next((row for row in rows if row is not None), None)


def _fault(record: Mapping[str, Any], checks: Mapping[str, Any], place: str) -> str | None:
    """Fields are checked in the order of ``checks``; a name that ends in ``?`` may be absent."""
    for key, check in checks.items():
        name = key.removesuffix("?")
        if name not in record:
            if name == key:
                return f"{place}{name} is missing"
            continue
        value = record[name]
        if isinstance(check, Mapping):
            if not isinstance(value, Mapping):
                return f"{place}{name} is no object"
            fault = _fault(value, check, f"{place}{name}.")
            if fault is not None:
                return fault
        elif not check(value):
            shown = repr(value)
            return f"{place}{name} is {shown if len(shown) <= 60 else f'{shown[:60]}...'}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and _UNPRINTABLE.search(value) is None


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53


def _is_extent(value: Any) -> bool:
    return _is_text(value) or (_is_count(value) and 1 <= value <= _LARGEST)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _one_of(*known: str) -> Check:
    return lambda value: isinstance(value, str) and value in known


def _parses(parse: Callable[[str], object]) -> Check:
    def check(value: Any) -> bool:
        try:
            return _is_text(value) and parse(value) is not None
        except ValueError:
            return False

    return check


def are_files(value: Any) -> bool:
    """Whether it maps names to hashes; plain names, so that no file outside the folder is read."""
    return isinstance(value, Mapping) and all(
        _is_text(name) and name not in ("", ".", "..") and "/" not in name and _is_mapping(entry)
        and _fault(entry, _FILE, "") is None
        for name, entry in value.items()
    )  # fmt: skip


def _are_ports(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(_is_mapping(port) and _fault(port, _PORT, "") is None for port in value)
        and len({port["name"] for port in value}) == len(value)
    )


def _is_gate(value: Any) -> bool:
    return _is_mapping(value) and all(
        key in GATE_FIELDS and (limit is None or _is_number(limit)) for key, limit in value.items()
    )


_FILE = {"sha256": _is_text, "bytes?": _is_count}
_PORT = {
    "name": _is_text,
    "shape": _list_of(_is_extent),
    "dtype?": _one_of(DTYPE, FLOAT),
    "layout?": _one_of(*map(str, Layout)),
}
_STAGE = {
    "stage": _is_text,
    "status": _one_of(*_STATUS),
    "reference": _is_text,
    "reason?": _or_null(_is_text),
    "tolerance": _is_gate,
}
_MANIFEST = {
    "files": are_files,
    "spec": {
        "precision": _one_of(*map(str, Precision)),
        "batch": _parses(BatchProfile.parse),
        "dynamic_size?": _or_null(_parses(SizeProfile.parse)),
        "name?": _is_text,
        "target?": _or_null(_is_text),
        "workspace_mib?": _or_null(_is_count),
        "build?": {
            "dla?": _or_null(_is_count),
            "gpu_fallback?": _is_flag,
            "optimization_level?": _or_null(_is_count),
            "version_compatible?": _is_flag,
            "allow_emulated?": _is_flag,
        },
    },
    "model": {"num_classes?": _or_null(_is_extent)},
    "inputs?": _are_ports,
    "outputs?": _are_ports,
    "class_names?": _or_null(_list_of(_is_text)),
    "contract?": {"convolutions?": _is_count},
    "notes?": _list_of(_is_text),
    "targets?": _list_of(_is_text),
    "half_scales?": _is_flag,
}
