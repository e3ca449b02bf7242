"""Replacing a file in one step: whoever reads it sees one of both, and that whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from exporter.errors import InputError


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """What is written becomes the content of ``path``, which stays as it is if the body fails.

    Everybody may read the file, unless it is ``private``.

    Raises:
        OSError: if it cannot be written.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    staged = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        if not private:
            staged.chmod(0o644)
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise


def write_whole(path: Path, text: str) -> None:
    """``text`` as the content of ``path``, whose folder is made where there is none.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
