"""Where this project keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder ``name`` in this project's own of ``$XDG_CACHE_HOME``, by default ``~/.cache``.

    Raises:
        RuntimeError: if there is neither the variable nor a home directory.
    """
    # The specification has relative paths ignored.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = given if given.is_absolute() else Path.home() / ".cache"
    return base / "repvgg-exporter" / name
