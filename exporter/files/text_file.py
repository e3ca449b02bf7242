"""Text and JSON from files that anybody may have written.

Whatever is wrong is an OSError or a ValueError, the two that every reader translates already: a
folder, a pipe or a device in the place of a file, one too large to be what is meant, text that is
no UTF-8, JSON nested deeper than Python reads.
"""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""No table, manifest or configuration comes near it; JSON takes ten times its size in memory."""


def read_text(path: Path) -> str:
    """The content of ``path``.

    Raises:
        OSError: if it cannot be read, is no regular file, or is larger than ``MOST_BYTES``.
        ValueError: if it is not UTF-8.
    """
    if path.exists() and not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a regular file"
        raise OSError(errno.EINVAL, what, str(path))
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"is larger than {MOST_BYTES >> 20} MB", str(path))
    return data.decode("utf-8")


def read_json(path: Path) -> Any:
    """The JSON document in ``path``.

    Raises:
        OSError, ValueError: as :func:`read_text`; ValueError also if it is not JSON.
    """
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """The JSON document ``text``.

    Raises:
        ValueError: if it is none, nested too deeply, or holds a number that is not finite.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _finite(text: str) -> float:
    """Python reads NaN and Infinity, which JSON does not have, and 1e999 as infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number
