"""Describe a bundle by its manifest, and check its files against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from exporter.bundle import ENGINE_SUMMARY, MANIFEST, Bundle, file_sha256
from exporter.inspection.finding import OWN_FORMAT, Inspection, Kind


def inspect_bundle(path: Path) -> Inspection:
    """Read a published bundle; damaged files are listed, not refused.

    Raises:
        InputError: if the folder is no bundle.
    """
    bundle = Bundle.load(path)
    damaged = bundle.damaged_files()
    spec = _mapping(bundle.manifest.get("spec"))
    model = _mapping(bundle.manifest.get("model"))
    weights = _mapping(bundle.manifest.get("weights"))
    calibration = _mapping(bundle.manifest.get("calibration"))
    contract = _mapping(bundle.manifest.get("contract"))
    engine = _engine(bundle, damaged)
    details = {
        "network": model.get("name"),
        "verdict": bundle.parity.get("verdict"),
        "contract": contract.get("verdict"),
        "prologue": _list(contract.get("prologue")),
        "inputs": _list(bundle.manifest.get("inputs")),
        "damaged_files": list(damaged),
        "files": sorted(bundle.manifest["files"]),
        "precision": spec.get("precision"),
        "targets": engine.get("targets", bundle.manifest.get("targets")),
        "weights": {key: weights.get(key) for key in ("source", "file", "sha256")},
        "calibration_images": calibration.get("images"),
        "convolutions": engine.get("convolutions"),
        "stages": [
            {key: _mapping(stage).get(key) for key in ("stage", "status", "sqnr_db")}
            for stage in _list(bundle.parity.get("stages"))
        ],
        "versions": _mapping(bundle.manifest.get("versions")),
    }
    notes = (f"missing or not what the manifest says: {', '.join(damaged)}",) if damaged else ()
    return Inspection(
        path=path,
        kind=Kind.BUNDLE,
        size_bytes=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        sha256=file_sha256(path / MANIFEST),
        format=OWN_FORMAT,
        form="deploy",
        variant=model.get("variant"),
        num_classes=model.get("num_classes"),
        parameters=model.get("parameters"),
        details=details,
        notes=notes,
    )


def _engine(bundle: Bundle, damaged: tuple[str, ...]) -> dict[str, Any]:
    """``engine.json``, if it is there and what the manifest says."""
    if ENGINE_SUMMARY not in bundle.manifest["files"] or ENGINE_SUMMARY in damaged:
        return {}
    try:
        return _mapping(json.loads((bundle.path / ENGINE_SUMMARY).read_text("utf-8")))
    except (ValueError, RecursionError):
        return {}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
