"""Writing a bundle: beside its destination, and moved into place when it is complete.

The destination is always the old bundle whole, the new one whole, or absent.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from exporter.bundle import (
    CHECKSUMS,
    ENGINE,
    MANIFEST,
    SCHEMA_VERSION,
    SIGNED,
    Bundle,
    checksums_text,
    dumps,
    file_sha256,
    signature_path,
)
from exporter.errors import InputError
from exporter.files.private_folder import FULL, NEW, OLD, private_folder, remove_dead
from exporter.files.replacing import put_in_place, sync_folder

_UNWRITABLE = (*FULL, errno.EROFS)

Signer = Callable[[str, bytes], bytes]
"""Takes a file's name and content, gives the content of its detached signature."""


class BundleWriter:
    """Collects a bundle's files beside ``out``; :meth:`publish` moves them there in one step.

    Used as a context manager: leaving it without publishing removes everything written, entering
    it removes what killed runs left. Two writers of the same ``out`` do not disturb each other; the
    last to publish wins. With a ``signer`` the bundle is published with its signatures. After
    :meth:`publish`, ``lost`` is what the bundle that lay there held and the new one has not.

    Raises:
        InputError: if ``out`` cannot be written or holds something that is no bundle; when the
            disk is full or the folder of ``out`` vanishes.
    """

    def __init__(self, out: Path, signer: Signer | None = None) -> None:
        self._out = out
        self._signer = signer
        self.lost: tuple[str, ...] = ()
        self._staging: Path | None = None
        self._folder = ExitStack()

    def __enter__(self) -> BundleWriter:
        with ExitStack() as stack:
            try:
                # Resolved: a destination reached through a link is replaced where it really is.
                self._out = out = self._out.resolve()
                remove_dead(out)
                require_replaceable(out)
                for parent in reversed([p for p in out.parents if not p.exists()]):
                    parent.mkdir(exist_ok=True)
                    stack.callback(_remove_if_empty, parent)
                self._staging = stack.enter_context(private_folder(out))
                self.path(".").mkdir(0o755)
                self.path(".").chmod(0o755)
            except (OSError, RuntimeError, ValueError) as error:
                # RuntimeError: a loop of links; ValueError: a zero byte in the name.
                raise self._not_writable(error) from error
            self._folder = stack.pop_all()
        return self

    def path(self, name: str) -> Path:
        """Where to write the file ``name``."""
        if self._staging is None:
            raise RuntimeError("the bundle is not open for writing")
        return self._staging / NEW / name

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 file; paths that are no text are escaped."""
        self.path(name).write_text(text, encoding="utf-8", errors="backslashreplace")

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
        self._seal(files)
        for path in staging.iterdir():
            _sync(path)
        sync_folder(staging)
        bundle = replace(Bundle.read(staging), path=self._out)
        # Again: the run may have taken hours.
        require_replaceable(self._out)
        self.lost = _lost(self._out, staging)
        put_in_place(staging, self._out, staging.parent / OLD)
        return bundle

    def _seal(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """What is made from the manifest: the checksums of all files, and the signatures."""
        self.write_text(CHECKSUMS, checksums_text(files, file_sha256(self.path(MANIFEST))))
        if self._signer is not None:
            for path in map(self.path, SIGNED):
                signature_path(path).write_bytes(self._signer(path.name, path.read_bytes()))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        vanished = isinstance(error, OSError) and not self.path(".").parent.is_dir()
        self._staging = None
        self._folder.close()
        if vanished:
            raise InputError(
                f"OUT {self._out} cannot be written: its folder vanished during the run"
            ) from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise self._not_writable(error) from error

    def _not_writable(self, error: Exception) -> InputError:
        reason = error.strerror if isinstance(error, OSError) else None
        return InputError(f"OUT {self._out} cannot be written: {reason or error}")


def require_replaceable(out: Path) -> None:
    """Raises InputError where something else than a bundle lies at ``out``."""
    if not out.exists():
        return
    if not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise InputError(f"OUT {out} exists and is no bundle; name a new folder or remove it first")


def _lost(old: Path, new: Path) -> tuple[str, ...]:
    """What the bundle in the folder ``old``, if it is one, holds and that in ``new`` does not."""
    try:
        before, after = Bundle.read(old), Bundle.read(new)
    except InputError:
        return ()
    lost = []
    missing = [target for target in _built_for(before) if target not in _built_for(after)]
    if missing:
        lost.append(f"an engine for {', '.join(missing)}")
    if signature_path(old / MANIFEST).is_file() and not signature_path(new / MANIFEST).is_file():
        lost.append("a signature")
    return tuple(lost)


def _built_for(bundle: Bundle) -> tuple[str, ...]:
    """The targets of the bundle's engine; none where that waits for its device."""
    targets = bundle.manifest.get("targets")
    if ENGINE not in bundle.manifest["files"] or not isinstance(targets, list):
        return ()
    return tuple(map(str, targets))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
