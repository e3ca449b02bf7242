"""Temporary folders that a killed run leaves for the next one to remove.

A run works in ``.NAME.RANDOM.staging`` beside its destination NAME and holds a lock on that folder.
The kernel drops the lock with the process, however that ends: a folder whose lock can be taken
belongs to nobody, and the next run for the same NAME removes it. No clock decides it and no process
number, which may belong to somebody else by then. Where the file system has no locks nothing is
known of the others, and their folders stay.

In the folder are ``new``, what is to become NAME; ``old``, what was NAME, while it is replaced in
two steps; and ``scratch``, the folders of other programs that the run starts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, quota exceeded, file larger than allowed. A program of ours that cannot write its
result into its scratch folder ends with such a number as its exit code: where the disk is full no
words can be left either."""
NEW = "new"
OLD = "old"
_SCRATCH = "scratch"
_SUFFIX = ".staging"

_OPENED: ContextVar[Path | None] = ContextVar("private folder", default=None)


@contextmanager
def private_folder(destination: Path) -> Iterator[Path]:
    """An empty folder beside ``destination``, readable by this user alone; gone on leaving.

    What dead runs left for the same destination is removed first. Within the block
    :func:`scratch_folder` is below it.

    Raises:
        OSError: if it cannot be made.
    """
    remove_dead(destination)
    path, descriptor = _create_locked(destination)
    token = _OPENED.set(path)
    try:
        yield path
    finally:
        _OPENED.reset(token)
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def scratch_folder(purpose: str) -> Iterator[Path]:
    """An empty folder for a program that is started; gone on leaving.

    It is below the private folder that is open in this thread, so that a kill leaves one folder
    and not two; elsewhere in the system's temporary folder, where the next one for the same
    ``purpose`` removes what a dead run left.
    """
    opened = _OPENED.get()
    if opened is None or not opened.is_dir():
        with private_folder(Path(tempfile.gettempdir(), f"repvgg-{purpose}")) as folder:
            yield folder
        return
    parent = opened / _SCRATCH
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{purpose}-", dir=parent) as name:
        yield Path(name)


def require_space(exit_code: int, folder: Path) -> None:
    """Return unless the program that worked in ``folder`` ended with a number of `FULL`.

    Raises:
        OSError: with that number.
    """
    if exit_code in FULL:
        raise OSError(exit_code, os.strerror(exit_code), str(folder))


def remove_dead(destination: Path) -> None:
    """Remove the folders of dead runs for ``destination``.

    A run that was killed in the middle of a replacement has taken the old content away and not yet
    brought the new one: the old one is put back.
    """
    # RANDOM has a fixed length: the folders of a destination "a.b" are none of "a".
    pattern = re.compile(rf"\.{re.escape(destination.name)}\.[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")
    try:
        found = [path for path in destination.parent.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError), _opened(path) as descriptor:
            if _lock(descriptor, wait=False) and _is_at(descriptor, path):
                _restore(path, destination)
                shutil.rmtree(path, ignore_errors=True)


def _restore(path: Path, destination: Path) -> None:
    interrupted = (path / OLD).is_dir() and (path / NEW).is_dir()
    if interrupted and not destination.exists():
        (path / OLD).rename(destination)


def _create_locked(destination: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that locks it until it is closed."""
    while True:
        name = tempfile.mkdtemp(
            prefix=f".{destination.name}.", suffix=_SUFFIX, dir=destination.parent
        )
        path = Path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            # Another run found it before it was locked, and removed it as a dead one's.
            continue
        except BaseException:
            path.rmdir()
            raise
        try:
            _lock(descriptor, wait=True)
            if _is_at(descriptor, path):
                return path, descriptor
        except BaseException:
            os.close(descriptor)
            path.rmdir()
            raise
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock is held now; false if another has it, or there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        # Busy, or ENOLCK, ENOSYS and the like of network file systems.
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the opened folder is still there under its name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
