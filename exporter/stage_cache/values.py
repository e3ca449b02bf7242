"""Values as JSON files, and back: what an entry holds beside the files of a bundle.

By the types of their fields (cattrs), never by pickling: an entry is read as data, not run.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypeVar

import cattrs

T = TypeVar("T")


def write_value(path: Path, value: Any) -> Path:
    """Write a dataclass of dataclasses, numbers, texts, tuples and mappings; its path."""
    # Infinite decibels are Python's "Infinity" here: nobody else reads these files.
    path.write_text(json.dumps(to_json(value)), encoding="utf-8")
    return path


def read_value(path: Path, kind: type[T]) -> T:
    """The value that :func:`write_value` wrote."""
    return from_json(json.loads(path.read_text("utf-8")), kind)


def to_json(value: Any) -> Any:
    """The dicts, lists and numbers that a value consists of."""
    return _converter().unstructure(value)


def from_json(content: Any, kind: type[T]) -> T:
    """The value of which :func:`to_json` made ``content``.

    Raises:
        ValueError: if it is something else.
    """
    try:
        return _converter().structure(content, kind)
    except cattrs.BaseValidationError as error:
        raise ValueError(f"this is no {kind.__name__}") from error


@functools.cache
def _converter() -> cattrs.Converter:
    converter = cattrs.Converter()
    converter.register_structure_hook(int | str, lambda value, _: value)
    return converter
