"""matrix.json: what came of every cell, up to date while they run, so that a re-run resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter.bundle import MANIFEST, Bundle, dumps, file_sha256
from exporter.cases import CaseResult, Status
from exporter.errors import EnvironmentLackError, InputError
from exporter.files.text_file import read_json
from exporter.files.whole_file import write_whole
from exporter.matrix.config import Cell
from exporter.provenance import versions
from exporter.request import validate
from exporter.spec import ExportSpec
from exporter.stage_cache import draft_inputs
from exporter.stage_cache.keys import DRAFT, FLOAT, float_part
from exporter.stage_cache.store import key_of
from exporter.stage_cache.values import from_json, to_json

STATE = "matrix.json"
INDEX = "index.html"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What a cell depends on: ``shared`` are its stages that others may want, ``own`` is all."""

    shared: tuple[tuple[str, str], ...]
    own: str

    @classmethod
    def of(cls, cell: Cell) -> Keys:
        """Those of a cell; what cannot be read or downloaded is the export's to complain about."""
        spec = validate(cell.request)
        try:
            draft = draft_inputs(spec, half_scales=False)
            shared = (
                (FLOAT, key_of(FLOAT, float_part(draft))),
                (DRAFT, key_of(DRAFT, draft)),
            )
        except (InputError, EnvironmentLackError):
            return cls(shared=(), own="")
        everything = {**draft, "spec": _text(spec), "versions": json.dumps(versions())}
        return cls(shared=shared, own=key_of("cell", everything))


@dataclass(slots=True)
class MatrixState:
    """The cells of a run in ``folder``, in the order of the configuration."""

    folder: Path
    cells: Sequence[Cell]
    keys: dict[str, Keys] = field(default_factory=dict)
    results: dict[str, CaseResult] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)

    @classmethod
    def resume(cls, folder: Path, cells: Sequence[Cell]) -> MatrixState:
        """With the results of an earlier run that still hold: nothing changed, the bundle whole."""
        state = cls(folder=folder, cells=cells, keys={cell.name: Keys.of(cell) for cell in cells})
        before = _read(folder / STATE)
        for cell in cells:
            known = before.get(cell.name)
            own = state.keys[cell.name].own
            if known is None or not own or known.key != own:
                continue
            if known.result.status is Status.PASS and _is_whole(_out(cell), known.manifest):
                state.results[cell.name] = known.result
                state.manifests[cell.name] = known.manifest
                state.kept.add(cell.name)
        return state

    @property
    def missing(self) -> tuple[Cell, ...]:
        """Those that are still to be made."""
        return tuple(cell for cell in self.cells if cell.name not in self.results)

    def record(self, cell: Cell, result: CaseResult) -> None:
        """Remember a result, on disk too.

        Raises:
            InputError: if the folder cannot be written.
        """
        self.results[cell.name] = result
        manifest = _out(cell) / MANIFEST
        passed = result.status is Status.PASS and manifest.is_file()
        self.manifests[cell.name] = file_sha256(manifest) if passed else ""
        write_whole(self.folder / STATE, dumps(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """The content of matrix.json: cells that ended, in their order."""
        return {
            "schema_version": SCHEMA_VERSION,
            "cells": [
                {
                    "axes": dict(cell.axes),
                    "key": self.keys[cell.name].own,
                    "manifest_sha256": self.manifests[cell.name],
                    **to_json(self.results[cell.name]),
                }
                for cell in self.cells
                if cell.name in self.results
            ],
        }


def _text(spec: ExportSpec) -> str:
    return json.dumps(spec.to_json(), sort_keys=True)


@dataclass(frozen=True, slots=True)
class _Known:
    """Of an earlier run: a cell's key, the hash of its bundle's manifest, and its result."""

    key: str
    manifest: str
    result: CaseResult


def _read(path: Path) -> dict[str, _Known]:
    """What an earlier run made, by name of the cell; nothing where there is no file."""
    try:
        cells = read_json(path)["cells"]
        found = {}
        for cell in cells:
            key, manifest = cell.pop("key"), cell.pop("manifest_sha256")
            del cell["axes"]
            result = from_json(cell, CaseResult)
            found[result.name] = _Known(key, manifest, result)
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}); remove it to begin anew"
        ) from error


def _out(cell: Cell) -> Path:
    return Path(str(cell.request.out))


def _is_whole(out: Path, manifest: str) -> bool:
    """Whether the bundle that was made, and no other, lies there undamaged."""
    try:
        bundle = Bundle.load(out)
        changed = bundle.damaged_files() or bundle.unlisted_files()
        return file_sha256(out / MANIFEST) == manifest and not changed
    except (InputError, OSError):
        return False
