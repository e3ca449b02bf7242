"""Names of files that native libraries take.

Linux names are bytes. Python keeps what is no text in its locale's encoding as lone surrogates,
which libraries in C++ and Rust refuse. What has such a name is read by Python and handed over.
"""

from __future__ import annotations

from pathlib import Path


def is_text(path: Path) -> bool:
    """Whether the whole name can be written in UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
