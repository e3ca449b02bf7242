"""The bundle on disk: manifest, hashes, atomic publication, reading it back.

A bundle is written in a folder beside its destination and renamed into place when it is complete,
so that the destination is always the old bundle whole, the new one whole, or absent.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.bundle.records import are_files, manifest_fault, parity_fault
from exporter.errors import InputError
from exporter.files.text_file import read_json
from exporter.pixel_input import FLOAT
from exporter.running.onnx_runner import FloatArray, fits

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
SBOM = "sbom.cdx.json"
CHECKSUMS = "SHA256SUMS"
REFERENCE_IMAGES = 8
"""How many of the images a bundle keeps, with the original network's outputs for them."""
SIGNED = (MANIFEST, CHECKSUMS)
"""What a signature is made of: between them they have the sha256 of every other file."""

_SIGNATURE = ".minisig"
UNLISTED = frozenset({*SIGNED, *(f"{name}{_SIGNATURE}" for name in SIGNED)})
"""Files of a bundle that its manifest cannot list, because they are made from it."""

_LISTED = frozenset(
    {
        MODEL, ENGINE, ENGINE_SUMMARY, PARITY, REFERENCE, CALIBRATION, CALIBRATION_CACHE, BUILD_LOG,
        JUNIT, REPORT, SBOM,
    }
)  # fmt: skip
_GRAPH = re.compile(r"model\.\w+\.onnx")

_MOST_ARRAY_BYTES = 512 << 20
"""Of the reference inputs and outputs together; a few images are a hundredth of it."""


def signature_path(path: Path) -> Path:
    """Where the signature of the file ``path`` stands, by the name that minisign looks for."""
    return path.with_name(path.name + _SIGNATURE)


def checksums_text(files: Mapping[str, Mapping[str, Any]], manifest_sha256: str) -> str:
    """SHA256SUMS as ``sha256sum --check`` reads it; ``files`` is the manifest's."""
    found = {name: str(entry["sha256"]) for name, entry in files.items()}
    found[MANIFEST] = manifest_sha256
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))


def graph_name(precision: str) -> str:
    """The file that the builder parses."""
    return MODEL if precision == "fp32" else f"model.{precision}.onnx"


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
            InputError: if the folder is no bundle, one of a newer schema, or one whose records are
                not what they must be to be used.
        """
        bundle = cls.read(path)
        for name, fault in (
            (MANIFEST, manifest_fault(bundle.manifest)),
            (PARITY, parity_fault(bundle.parity)),
        ):
            if fault is not None:
                words = f"in {name} {fault}; export it again"
                raise InputError(f"bundle {bundle.path} is damaged: {words}")
        return bundle

    @classmethod
    def read(cls, path: Path | str) -> Bundle:
        """As :meth:`load`, for those who only describe it: beyond the files nothing is checked.

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
        if not are_files(manifest.get("files")):
            raise InputError(f"{path} is not a bundle: {MANIFEST} lists no files with their sha256")
        return cls(path, manifest, _read_object(path, PARITY))

    def damaged_files(self) -> tuple[str, ...]:
        """Names of the files that are missing or whose hash is not the manifest's."""
        return tuple(
            name
            for name, entry in self.manifest["files"].items()
            if not (self.path / name).is_file() or file_sha256(self.path / name) != entry["sha256"]
        )

    def unlisted_files(self) -> tuple[str, ...]:
        """Files with names of a bundle's own that the manifest knows nothing of.

        They would be taken for the bundle's; whatever else lies in the folder nobody reads.
        """
        listed = self.manifest["files"]
        names = sorted(path.name for path in self.path.iterdir() if path.name not in listed)
        return tuple(name for name in names if name in _LISTED or _GRAPH.fullmatch(name))

    @property
    def checksums(self) -> str:
        """What SHA256SUMS must say of the files, by the manifest that lies there now."""
        return checksums_text(self.manifest["files"], file_sha256(self.path / MANIFEST))

    @property
    def graph_path(self) -> Path:
        """The ONNX that the engine was built from."""
        return self.path / graph_name(self.manifest["spec"]["precision"])

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
            stored = _arrays(path, (*inputs, *outputs))
        except Exception as error:
            # zipfile, zlib and numpy raise a dozen types on damaged bytes.
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
        # The floor above, which knows engines: pyproject.toml names this one way up.
        from exporter.device import run_bundle

        outputs = run_bundle(self, batch, backend)
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
            if not isinstance(array, (np.ndarray, np.generic)):
                raise InputError(f"input is a {type(array).__name__}, expected a numpy array")
            dtype = port.get("dtype", FLOAT)
            if not fits(array, wanted, dtype) or not len(array) == len(batch[0]) > 0:
                pixels = ", RGB pixels that are not normalized," if "layout" in port else ""
                raise InputError(
                    f"input is {array.dtype} {list(array.shape)}, expected {dtype} "
                    f"[N, {', '.join(map(str, wanted))}]{pixels} with N at least 1"
                )


def _arrays(path: Path, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """These arrays of an ``.npz``; whatever is wrong raises."""
    if not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
        if size > _MOST_ARRAY_BYTES:
            raise ValueError(f"it unpacks to {size / 1e9:.3g} GB")
        # Opened here, because np.load leaves a damaged archive open.
        with np.load(file, allow_pickle=False) as arrays:
            stored = {name: arrays[name] for name in names}
    for name, array in stored.items():
        if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.uint8):
            raise ValueError(f"{name} is no array of float32 or uint8")
        if array.ndim == 0 or len(array) == 0:
            raise ValueError(f"{name} is empty")
    if len({len(array) for array in stored.values()}) != 1:
        raise ValueError("its arrays are of different numbers of images")
    return stored


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    try:
        data = read_json(folder / name)
    except OSError as error:
        reason = f"{name} cannot be read ({error.strerror or error})"
        raise InputError(f"{folder} is not a bundle: {reason}") from error
    except ValueError as error:
        raise InputError(f"{folder} is not a bundle: {name} is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{folder} is not a bundle: {name} is no JSON object")
    return data
