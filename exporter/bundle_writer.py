"""Writing a bundle: beside its destination, and renamed into place when it is complete.

The destination is always the old bundle whole, the new one whole, or absent.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from exporter.bundle import MANIFEST, SCHEMA_VERSION, Bundle, dumps, file_sha256
from exporter.errors import InputError


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
        bundle = replace(Bundle.read(staging), path=self._out)
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
