"""Where the stage cache lies and how large it may become."""

from __future__ import annotations

import os
import re
from pathlib import Path

from exporter.errors import InputError
from exporter.files.user_cache import user_cache
from exporter.stage_cache.store import StageStore

CACHE_VARIABLE = "REPVGG_EXPORT_CACHE"
LIMIT_VARIABLE = "REPVGG_EXPORT_CACHE_LIMIT"
OFF = "off"
DEFAULT_LIMIT = 10 << 30
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def open_cache() -> StageStore | None:
    """The cache in the folder that ``REPVGG_EXPORT_CACHE`` names, else in the user's.

    None where the variable says ``off``, or where there is no home directory.

    Raises:
        InputError: if ``REPVGG_EXPORT_CACHE_LIMIT`` is no size.
    """
    named = os.environ.get(CACHE_VARIABLE, "")
    if named.lower() == OFF:
        return None
    limit = parse_size(os.environ.get(LIMIT_VARIABLE, "") or str(DEFAULT_LIMIT))
    if named:
        return StageStore(root=Path(named).absolute(), limit=limit)
    try:
        return StageStore(root=user_cache("stages"), limit=limit)
    except RuntimeError:
        return None


def parse_size(text: str) -> int:
    """Bytes from ``500M``, ``10G`` or a number of bytes.

    Raises:
        InputError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"{LIMIT_VARIABLE} is {text!r}, expected a size such as 500M or 10G")
    return int(float(found[1]) * _UNITS[found[2].upper()])
