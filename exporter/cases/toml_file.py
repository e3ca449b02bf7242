"""A TOML file as tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.cases.complaints import Complaints
from exporter.errors import InputError
from exporter.files.text_file import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MOST_LEVELS = 10
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""What can be the name of a folder anywhere."""


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        InputError: if it cannot be read or is no TOML.
    """
    try:
        content = tomllib.loads(read_text(path))
        if _is_deeper(content, _MOST_LEVELS):
            raise ValueError(f"it is nested deeper than {_MOST_LEVELS} levels")
        return content
    except OSError as error:
        raise InputError(f"configuration {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"configuration {path} is no TOML: {error}") from error


def _is_deeper(value: object, levels: int) -> bool:
    """A dotted key can nest thousands of tables, which no complaint could print."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in inner)


def table_of(content: Mapping[str, Any], name: str, complaints: Complaints) -> dict[str, Any]:
    """The table ``[name]``, empty where there is none."""
    table = content.get(name, {})
    if isinstance(table, dict):
        return table
    complaints.add("the file", name, f"must be a table, headed [{name}]")
    return {}


def tables_of(
    content: Mapping[str, Any], name: str, complaints: Complaints
) -> list[dict[str, Any]]:
    """The tables ``[[name]]`` in their order."""
    tables = content.get(name, [])
    if isinstance(tables, list) and all(isinstance(table, dict) for table in tables):
        return tables
    complaints.add("the file", name, f"must be tables, each headed [[{name}]]")
    return []
