"""What is none of the kinds at all, so that nobody is told of a damaged checkpoint that is a text.

A file that begins as one of the kinds, or is named as weights, is that kind, be it damaged.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from exporter.bundle import CHECKSUMS, ENGINE_SUMMARY, MANIFEST, PARITY
from exporter.errors import InputError
from exporter.files.text_file import parse_json

_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")
_ZIP, _PICKLE = b"PK", b"\x80"
_OF_A_BUNDLE = (MANIFEST, CHECKSUMS, PARITY, ENGINE_SUMMARY)
_OF_A_TABLE = ("method", "source_sha256", "onnx_sha256", "data_sha256", "tensors")
"""Fields of a calibration table that no other JSON of this project has at its top."""


def nothing_known(path: Path) -> InputError:
    """The error of a path that is none of the kinds."""
    return InputError(
        f"{path} is nothing that inspect knows (a checkpoint, an ONNX, a bundle, an engine or a "
        "calibration table)"
    )


def is_safetensors(head: bytes) -> bool:
    """An 8-byte header length, then JSON. A length may begin like an ONNX."""
    return head[8:9] == b"{"


def may_be_weights(path: Path, head: bytes) -> bool:
    """Whether ``path``, which begins with ``head``, is a file of weights, be it damaged."""
    if path.suffix.lower() in _WEIGHTS or is_safetensors(head) or head.startswith(_PICKLE):
        return True
    return head.startswith(_ZIP) and _may_be_torchs(path)


def may_be_table(text: str) -> bool:
    """Whether JSON is a calibration table, be it cut or with fields missing."""
    try:
        document = parse_json(text)
    except ValueError:
        return any(f'"{name}"' in text for name in _OF_A_TABLE)
    return isinstance(document, Mapping) and any(name in document for name in _OF_A_TABLE)


def may_be_bundle(folder: Path) -> bool:
    """Whether some record of a bundle lies in ``folder``."""
    return any((folder / name).exists() for name in _OF_A_BUNDLE)


def _may_be_torchs(path: Path) -> bool:
    """Every zip of torch has its pickle; one that cannot be opened may have been torch's."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, EOFError, NotImplementedError):
        # torch's own reader names the damage.
        return True
