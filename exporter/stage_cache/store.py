"""A folder of entries, each the files of one stage under the hash of its inputs.

::

    v1/STAGE/KEY/entry.json      inputs, seconds, sha256 and size of each file, a hash of itself
    v1/STAGE/KEY/...             the files
    v1/locks/STAGE-XX.lock       who makes an entry whose key begins with XX holds it
    v1/incoming/                 entries that are being written, by whoever holds put.lock

An entry appears by one rename, so it is whole or not there; its age is the time of its last use.
Every byte is hashed when it is read: an entry that is damaged is removed and made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from exporter.bundle import file_sha256
from exporter.files.private_folder import scratch_folder

FORMAT = "v1"
_ENTRY = "entry.json"
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryInfo:
    """One entry. ``used`` is the time of its last use in seconds since 1970."""

    stage: str
    key: str
    inputs: Mapping[str, str]
    seconds: float
    bytes: int
    used: float

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "stage": self.stage,
            "key": self.key,
            "bytes": self.bytes,
            "used": self.used,
            "seconds": self.seconds,
            "inputs": dict(self.inputs),
        }


class DamagedEntryError(Exception):
    """An entry is not what was stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStore:
    """The entries under ``root``, at most ``limit`` bytes of them.

    Methods raise OSError where the disk does; the caller can do without a cache.
    """

    root: Path
    limit: int

    @contextmanager
    def making(self, stage: str, key: str) -> Iterator[None]:
        """Hold the right to make an entry: who waits for it finds the entry made.

        A process that dies loses it. Within ``making`` of one stage only that of a stage further up
        the road may be asked for; keys that begin alike share a lock.
        """
        with self._lock(f"{stage}-{key[:2]}"):
            yield

    def has(self, stage: str, key: str) -> bool:
        """Whether there is an entry at this moment; nothing of it is read."""
        return self._path(stage, key).exists()

    def fetch(self, stage: str, key: str, folder: Path) -> EntryInfo | None:
        """Copy the files of an entry into ``folder``; None where there is no whole one."""
        path = self._path(stage, key)
        try:
            with _unless_damaged():
                entry = _read(path, stage, key)
                copied = []
                try:
                    for name, expected in entry["files"].items():
                        copied.append(folder / name)
                        _copy_checked(path / name, folder / name, expected)
                except BaseException:
                    for target in copied:
                        target.unlink(missing_ok=True)
                    raise
                with contextlib.suppress(OSError):
                    os.utime(path / _ENTRY)
                return _info(path, entry)
        except FileNotFoundError:
            # Never there, or another process made room at this moment.
            return None
        except DamagedEntryError:
            self._remove(path)
            return None

    def put(
        self, stage: str, key: str, inputs: Mapping[str, str], seconds: float, files: Iterable[Path]
    ) -> None:
        """Store copies of ``files`` as an entry, then make room for it."""
        with self._lock("put"):
            # Only one process at a time is here: what lies there is of one that was killed.
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=self._incoming))
            try:
                described = {path.name: _copy(path, staging / path.name) for path in files}
                _write_entry(staging, stage=stage, key=key, inputs=dict(inputs), seconds=seconds,
                             files=described)  # fmt: skip
                path = self._path(stage, key)
                self._remove(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                staging.rename(path)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            self._make_room(path)

    def pack(self, stage: str, key: str) -> bytes | None:
        """An entry as a tar archive, for a machine that has another cache; None without it."""
        with scratch_folder("stages") as folder:
            info = self.fetch(stage, key, folder)
            if info is None:
                return None
            described = {path.name: _described(path) for path in folder.iterdir()}
            _write_entry(folder, stage=stage, key=key, inputs=info.inputs, seconds=info.seconds,
                         files=described)  # fmt: skip
            return packed(folder)

    def unpack(self, archive: bytes) -> None:
        """Store what :meth:`pack` packed; nothing happens where it is there already, or damaged."""
        with scratch_folder("stages") as folder:
            try:
                with _unless_damaged():
                    unpack_into(archive, folder)
                    named = json.loads((folder / _ENTRY).read_text("utf-8"))
                    entry = _read(folder, named["stage"], named["key"])
                    files = {folder / name: file for name, file in entry["files"].items()}
                    whole = all(_described(path) == file for path, file in files.items())
            except (DamagedEntryError, FileNotFoundError, tarfile.TarError):
                return
            if whole and not self.has(entry["stage"], entry["key"]):
                inputs, seconds = entry["inputs"], entry["seconds"]
                self.put(entry["stage"], entry["key"], inputs, seconds, files)

    def entries(self) -> tuple[EntryInfo, ...]:
        """All that can be read, those used last first."""
        found = [info for folder in self._folders() if (info := _readable(folder)) is not None]
        return tuple(sorted(found, key=lambda info: -info.used))

    def clear(self) -> int:
        """Remove every entry, damaged ones too; how many there were."""
        with self._lock("put"):
            folders = self._folders()
            for path in folders:
                self._remove(path)
            shutil.rmtree(self._incoming, ignore_errors=True)
        return len(folders)

    def _folders(self) -> list[Path]:
        """Those of the entries, readable or not."""
        found = (self.root / FORMAT).glob("*/*")
        return [path for path in found if path.is_dir() and path.parent != self._incoming]

    @property
    def _incoming(self) -> Path:
        return self.root / FORMAT / "incoming"

    def _path(self, stage: str, key: str) -> Path:
        return self.root / FORMAT / stage / key

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        locks = self.root / FORMAT / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{name}.lock"):
            yield

    def _remove(self, path: Path) -> None:
        """First out of sight, so that nobody begins to read what is half gone."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        gone = self._incoming / f"removed-{path.parent.name}-{path.name}-{os.getpid()}"
        try:
            path.rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)

    def _make_room(self, newest: Path) -> None:
        """Remove what nobody can read, then what was used longest ago; not what was just stored."""
        for path in self._folders():
            if _readable(path) is None:
                self._remove(path)
        entries = self.entries()
        total = sum(info.bytes for info in entries)
        for info in reversed(entries):
            path = self._path(info.stage, info.key)
            if total <= self.limit:
                return
            if path != newest:
                self._remove(path)
                total -= info.bytes


def packed(folder: Path) -> bytes:
    """The files of ``folder`` as an uncompressed tar archive: most of them are weights."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    return archive.getvalue()


def unpack_into(archive: bytes, folder: Path) -> None:
    """Write the files of :func:`packed` into ``folder``."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")


def key_of(stage: str, inputs: Mapping[str, str]) -> str:
    """Hex digest of a stage and its inputs."""
    return _digest({"stage": stage, "inputs": dict(inputs)})


@contextmanager
def _unless_damaged() -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedEntryError from error


def _read(path: Path, stage: str, key: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((path / _ENTRY).read_text("utf-8"))
    stored = entry.pop("sha256")
    if stored != _digest(entry) or (stage, key) != (entry["stage"], entry["key"]):
        raise DamagedEntryError
    return entry


def _readable(path: Path) -> EntryInfo | None:
    """The entry in ``path`` without its files' content; None if it is damaged or gone."""
    with contextlib.suppress(OSError, DamagedEntryError), _unless_damaged():
        return _info(path, _read(path, path.parent.name, path.name))
    return None


def _write_entry(folder: Path, **entry: Any) -> None:
    """Say in ``folder`` what its files are."""
    text = json.dumps({**entry, "sha256": _digest(entry)})
    (folder / _ENTRY).write_text(text, encoding="utf-8")


def _info(path: Path, entry: Mapping[str, Any]) -> EntryInfo:
    return EntryInfo(
        stage=entry["stage"],
        key=entry["key"],
        inputs=entry["inputs"],
        seconds=entry["seconds"],
        bytes=sum(file["bytes"] for file in entry["files"].values()),
        used=(path / _ENTRY).stat().st_mtime,
    )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _described(path: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def _copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file; its sha256 and size on the way."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as read, target.open("xb") as write:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            write.write(chunk)
            size += len(chunk)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _copy_checked(source: Path, target: Path, expected: Mapping[str, Any]) -> None:
    try:
        found = _copy(source, target)
    except FileNotFoundError as error:
        raise DamagedEntryError from error
    if found != expected:
        raise DamagedEntryError
