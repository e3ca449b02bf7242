"""Replacing a text file in one step: whoever reads it sees one of both, and that whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from exporter.errors import InputError


def write_whole(path: Path, text: str) -> None:
    """``text`` as the content of ``path``, which is replaced in one step.

    Raises:
        InputError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(staged).chmod(0o644)
            Path(staged).replace(path)
        except BaseException:
            Path(staged).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
