"""A TOML file as tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.cases.complaints import Complaints
from exporter.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""What can be the name of a folder anywhere."""


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        InputError: if it cannot be read or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"configuration {path} is no TOML: {error}") from error


def table_of(content: Mapping[str, Any], name: str, complaints: Complaints) -> dict[str, Any]:
    """The table ``[name]``, empty where there is none."""
    table = content.get(name, {})
    if isinstance(table, dict):
        return table
    complaints.add("the file", name, f"must be a table, headed [{name}]")
    return {}
