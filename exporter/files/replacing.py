"""One folder put in the place of another, so that every reader finds one of them whole.

Linux swaps two names in one step (``renameat2`` with RENAME_EXCHANGE). Where system or file system
cannot, there are two steps, between which the place is empty; `private_folder` mends what a kill
between them leaves. Several programs may do this to the same place at once: the last one wins.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def put_in_place(new: Path, out: Path, old: Path) -> None:
    """Move the folder ``new`` to ``out``, and make that durable.

    What was at ``out`` is at ``new`` or at ``old`` afterwards. All three are on one file system;
    there is nothing at ``old`` before.

    Raises:
        OSError: if that cannot be done; ``out`` is then as it was, after an interrupt too.
    """
    own = new.stat()
    try:
        _move(new, out, old)
        sync_folder(out.parent)
    except BaseException:
        _undo(own, new, out, old)
        raise


def sync_folder(path: Path) -> None:
    """Have the names in the folder written to the disk, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swap what the two names mean, in one step; false where that cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    failed: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return not failed


def _move(new: Path, out: Path, old: Path) -> None:
    while True:
        if exchange(new, out):
            return
        try:
            # Enough where there is nothing, or an empty folder.
            new.rename(out)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        shutil.rmtree(old, ignore_errors=True)
        # FileNotFoundError: another program is just replacing it, too.
        with contextlib.suppress(FileNotFoundError):
            out.rename(old)


def _undo(own: os.stat_result, new: Path, out: Path, old: Path) -> None:
    """Put back what was at ``out``; what has been done so far is seen from the folders."""
    if out.exists() and os.path.samestat(own, out.stat()):
        if new.exists():
            exchange(new, out)
            return
        out.rename(new)
    if old.exists() and not out.exists():
        old.rename(out)
