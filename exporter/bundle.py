"""The bundle on disk: manifest, hashes, atomic publication, reading it back.

A bundle is written in a folder beside its destination and renamed into place when it is complete,
so that the destination is always the old bundle whole, the new one whole, or absent.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from exporter.errors import InputError
from exporter.onnx_runner import FloatArray, fits
from exporter.pixel_input import FLOAT

Arrays = Any
"""One float32 array, or several: a tuple of inputs, a dict of outputs by name.

Not a union: whoever calls knows which of them the network has."""

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
ENGINE = "model.engine"
ENGINE_SUMMARY = "engine.json"
PARITY = "parity.json"
REFERENCE = "reference.npz"
CALIBRATION = "calibration.json"
CALIBRATION_CACHE = "calibration.cache"
BUILD_LOG = "build.log"
JUNIT = "junit.xml"
REPORT = "report.html"


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def dumps(data: Any) -> str:
    """JSON as this project writes it: indented, strict (no NaN), one newline at the end."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


class BundleWriter:
    """Collects a bundle's files beside ``out``; :meth:`publish` moves them there in one step.

    Used as a context manager: leaving it without publishing removes everything written.

    Raises:
        InputError: if ``out`` cannot be written or holds something that is no bundle; when the
            disk is full.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._staging: Path | None = None
        self._made_parents: list[Path] = []

    def __enter__(self) -> BundleWriter:
        try:
            # Resolved, so that a destination reached through a link is replaced where it really is.
            self._out = out = self._out.resolve()
            if out.exists() and not _replaceable(out):
                raise InputError(
                    f"OUT {out} exists and is no bundle; name a new folder or remove it first"
                )
            for parent in reversed([p for p in out.parents if not p.exists()]):
                parent.mkdir(exist_ok=True)
                self._made_parents.append(parent)
            staging = tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".staging", dir=out.parent)
            self._staging = Path(staging)
            self._staging.chmod(0o755)
        except (OSError, RuntimeError, ValueError) as error:
            # RuntimeError: a loop of links; ValueError: a zero byte in the name.
            self._discard()
            raise self._not_writable(error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def path(self, name: str) -> Path:
        """Where to write the file ``name``."""
        if self._staging is None:
            raise RuntimeError("the bundle is not open for writing")
        return self._staging / name

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file."""
        self.path(name).write_text(text, encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that has been written, by name."""
        return {path.name: path.stat().st_size for path in sorted(self.path(".").iterdir())}

    def publish(self, manifest: Mapping[str, Any]) -> Bundle:
        """Add ``files`` (sha256 and size of each) to ``manifest``, write it, move into place.

        Raises:
            InputError: if ``out`` cannot be written, or what was written is no bundle.
        """
        try:
            return self._publish(manifest)
        except OSError as error:
            raise self._not_writable(error) from error

    def _publish(self, manifest: Mapping[str, Any]) -> Bundle:
        staging = self.path(".")
        files = {
            path.name: {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            for path in sorted(staging.iterdir())
        }
        document = {"schema_version": SCHEMA_VERSION, **manifest, "files": files}
        self.write_text(MANIFEST, dumps(document))
        for path in staging.iterdir():
            _sync(path)
        bundle = replace(Bundle.load(staging), path=self._out)
        _move_into_place(staging, self._out)
        self._staging = None
        return bundle

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._staging is not None:
            self._discard()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise self._not_writable(error) from error

    def _discard(self) -> None:
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def _not_writable(self, error: Exception) -> InputError:
        reason = error.strerror if isinstance(error, OSError) else None
        return InputError(f"OUT {self._out} cannot be written: {reason or error}")


def _replaceable(out: Path) -> bool:
    return out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _move_into_place(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    old = staging.with_suffix(".old")
    try:
        out.rename(old)
        staging.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A published bundle. Reading it needs neither torch nor onnx."""

    path: Path
    manifest: Mapping[str, Any]
    parity: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path | str) -> Bundle:
        """Open the bundle in the folder ``path``; contents are checked by :meth:`damaged_files`.

        Raises:
            InputError: if the folder is no bundle, or one of a newer schema.
        """
        path = Path(path)
        manifest = _read_object(path, MANIFEST)
        version = manifest.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"bundle {path} has schema version {version}; this program reads {SCHEMA_VERSION}"
            )
        files = manifest.get("files")
        if not isinstance(files, dict) or not all(
            isinstance(entry, dict) and "sha256" in entry for entry in files.values()
        ):
            raise InputError(f"{path} is not a bundle: {MANIFEST} lists no files with their sha256")
        return cls(path, manifest, _read_object(path, PARITY))

    def damaged_files(self) -> tuple[str, ...]:
        """Names of the files that are missing or whose hash is not the manifest's."""
        return tuple(
            name
            for name, entry in self.manifest["files"].items()
            if not (self.path / name).is_file() or file_sha256(self.path / name) != entry["sha256"]
        )

    @property
    def graph_path(self) -> Path:
        """The ONNX that the engine was built from."""
        precision = self.manifest["spec"]["precision"]
        return self.path / (MODEL if precision == "fp32" else f"model.{precision}.onnx")

    @property
    def has_half_scales(self) -> bool:
        """Whether the Q/DQ graph is half all through; false for other graphs and older bundles."""
        return bool(self.manifest.get("half_scales", False))

    def _names(self, kind: str, default: str) -> list[str]:
        return [port["name"] for port in self.manifest.get(kind, [{"name": default}])]

    def reference(self) -> tuple[Arrays, Arrays]:
        """Real inputs ``[N, ...]`` and the original network's outputs for them.

        As :meth:`run` takes and returns them.

        Raises:
            InputError: if the file is missing, damaged, or holds anything but plain arrays.
        """
        path = self.path / REFERENCE
        inputs, outputs = self._names("inputs", "images"), self._names("outputs", "logits")
        try:
            # Opened here, because np.load leaves a damaged archive open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                stored = {name: arrays[name] for name in (*inputs, *outputs)}
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            # TypeError: a plain .npy file, whose array is no context manager.
            raise InputError(f"reference inputs {path} cannot be read: {error}") from error
        given = tuple(stored[name] for name in inputs)
        results = {name: stored[name] for name in outputs}
        return (
            given[0] if len(given) == 1 else given,
            results[outputs[0]] if len(results) == 1 else results,
        )

    def run(self, inputs: Arrays, *, backend: str = "auto") -> Arrays:
        """The network's outputs, by the engine where it runs and else by ONNX Runtime on the CPU.

        ``inputs`` is one preprocessed float32 array ``[N, ...]``, or a tuple of them in the order
        of the manifest's ``inputs``; where these say so, uint8 pixels. One output comes as an
        array, several as a dict of them. ``backend`` names who runs: ``"engine"`` or
        ``"onnxruntime"``, the same on every machine. Each call opens it anew;
        :func:`exporter.device.open_runner` keeps it open, and its ``backend`` says who it is.

        Raises:
            InputError: for another number of inputs, shape or data type, or an unknown backend.
            EnvironmentLackError: ``backend`` cannot run here, or the onnx package is needed.
            GateFailedError: the engine or ONNX Runtime refuses to run.
        """
        batch = inputs if isinstance(inputs, tuple) else (inputs,)
        self._require_inputs(batch)
        # A door to the floor above, which knows engines and is loaded when a bundle is run.
        outputs = import_module("exporter.device").run_bundle(self, batch, backend)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def _require_inputs(self, batch: tuple[FloatArray, ...]) -> None:
        if "inputs" in self.manifest:
            ports = self.manifest["inputs"]
        else:
            ports = [{"shape": ["batch", 3, *self.manifest["preprocess"]["image_size"]]}]
        shapes = [port["shape"][1:] for port in ports]
        if len(batch) != len(shapes):
            names = ", ".join(self._names("inputs", "images"))
            raise InputError(f"{len(batch)} arrays were passed, expected {len(shapes)}: {names}")
        for array, wanted, port in zip(batch, shapes, ports, strict=True):
            dtype = port.get("dtype", FLOAT)
            if not fits(array, wanted, dtype) or not len(array) == len(batch[0]) > 0:
                pixels = ", RGB pixels that are not normalized," if "layout" in port else ""
                raise InputError(
                    f"input is {array.dtype} {list(array.shape)}, expected {dtype} "
                    f"[N, {', '.join(map(str, wanted))}]{pixels} with N at least 1"
                )


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads((folder / name).read_text("utf-8"))
    except OSError as error:
        reason = f"{name} cannot be read ({error.strerror or error})"
        raise InputError(f"{folder} is not a bundle: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder} is not a bundle: {name} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{folder} is not a bundle: {name} is no JSON object")
    return data
