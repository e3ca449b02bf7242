"""Describe a bundle by its manifest, and check its files against it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.bundle import ENGINE_SUMMARY, MANIFEST, Bundle, file_sha256
from exporter.files.text_file import read_json
from exporter.inspection.finding import OWN_FORMAT, Inspection, Kind
from exporter.plan.engine import DEFERRED


def inspect_bundle(path: Path) -> Inspection:
    """Read a published bundle; damaged files are listed, not refused.

    Raises:
        InputError: if the folder is no bundle.
    """
    bundle = Bundle.read(path)
    damaged, unlisted = bundle.damaged_files(), bundle.unlisted_files()
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
        "unlisted_files": list(unlisted),
        "files": sorted(bundle.manifest["files"]),
        "precision": spec.get("precision"),
        "targets": engine.get("targets", bundle.manifest.get("targets")),
        "weights": {key: weights.get(key) for key in ("source", "file", "sha256")},
        "calibration_images": calibration.get("images"),
        "convolutions": engine.get("convolutions"),
        "engine": _status(engine),
        "stages": [
            {key: _mapping(stage).get(key) for key in ("stage", "status", "sqnr_db")}
            for stage in _list(bundle.parity.get("stages"))
        ],
        "versions": _mapping(bundle.manifest.get("versions")),
    }
    notes = _waiting(engine)
    if damaged:
        notes = (f"missing or not what the manifest says: {', '.join(damaged)}", *notes)
    if unlisted:
        notes = (f"not among the files of the manifest: {', '.join(unlisted)}", *notes)
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
        return _mapping(read_json(bundle.path / ENGINE_SUMMARY))
    except (OSError, ValueError):
        return {}


def _status(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Whether there is an engine, who made it, and what of it waits for its device."""
    keys = ("status", "backend", "version", "plan_bytes")
    waiting = _deferred(engine)
    found = {key: engine[key] for key in keys if key in engine}
    for key in ("devices", "targets", "reason", "build_with", "commands"):
        if waiting.get(key):
            found["deferred_" * (waiting is not engine) + key] = waiting[key]
    return found


def _waiting(engine: Mapping[str, Any]) -> tuple[str, ...]:
    """What is to be done where an engine waits for its device."""
    waiting = _deferred(engine)
    if not waiting:
        return ()
    names = _list(waiting.get("devices")) or _list(waiting.get("targets"))
    return (
        f"the engine for {', '.join(map(str, names))} is deferred: {waiting.get('reason')}; "
        f"on the device: {waiting.get('build_with')}",
    )


def _deferred(engine: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of ``engine.json`` that tells of a deferred engine; empty if none is."""
    return engine if engine.get("status") == DEFERRED else _mapping(engine.get("deferred"))


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
