"""The keys of a case are the fields of an export request; here TOML values become theirs.

Whose fault a complaint of `validate` is: that of every key without which it would not be made. Each
key is left out in turn (the model is replaced by one whose weights are bundled) and the request
judged again, so a rule that is written tomorrow finds its keys too.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from exporter.build_options import BuildOptions
from exporter.cases.complaints import Complaints
from exporter.devices import resolve_targets
from exporter.errors import InputError, InvalidRequestError
from exporter.request import ExportRequest, validate
from exporter.spec import HUB, RANDOM, ExportSpec

KEYS = tuple(item.name for item in fields(ExportRequest) if item.name != "out")
_LISTS = ("target", "keep_float")
_NUMBERS_AS_TEXT = ("image_size", "batch")
_WRITTEN = ("timing_cache",)
"""Files that need not exist yet."""

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_BUNDLED = "A0"
_NOT_PATHS = {"weights": (HUB, RANDOM), "preprocess": ("imagenet",)}


@cache
def path_keys() -> frozenset[str]:
    """Keys whose text is a path: those that are one in the validated spec, and two more."""
    hints = {**typing.get_type_hints(ExportSpec), **typing.get_type_hints(BuildOptions)}
    found = {name for name, hint in hints.items() if Path in (hint, *typing.get_args(hint))}
    return frozenset((found | set(_NOT_PATHS)) & set(KEYS))


@cache
def _kinds() -> Mapping[str, type]:
    """The type of each key's value, None aside."""
    found = {}
    for name, hint in typing.get_type_hints(ExportRequest).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (found[name],) = (kind for kind in options if kind is not types.NoneType)
    return found


def read_values(
    table: Mapping[str, Any],
    place: str,
    folder: Path,
    complaints: Complaints,
    *,
    apart: tuple[str, ...],
) -> dict[str, Any]:
    """The values of the request's keys; keys in ``apart`` are somebody else's."""
    found = {}
    for key, raw in table.items():
        if key in apart:
            continue
        if key not in KEYS:
            complaints.add_unknown(place, key, (*KEYS, *apart))
            continue
        value = _converted(key, raw)
        if value is None:
            complaints.add(place, key, f"must be {_WORDS[_kinds()[key]]}, not {raw!r}")
            continue
        if key in path_keys():
            value = _located(key, value, folder)
            if key not in _WRITTEN and key != "weights" and not _is_there(key, value):
                complaints.add(place, key, f"{value} does not exist")
        found[key] = value
    return found


def _converted(key: str, raw: Any) -> Any:
    """``raw`` as the request wants it, None if it cannot be."""
    kind = _kinds()[key]
    if kind is str and key in _LISTS and isinstance(raw, list):
        return ",".join(raw) if all(isinstance(entry, str) for entry in raw) else None
    if kind is str and key in _NUMBERS_AS_TEXT and type(raw) is int:
        return str(raw)
    if kind is float and type(raw) is int:
        return float(raw)
    return raw if type(raw) is kind else None


def _is_word(key: str, value: str) -> bool:
    return value.partition("@")[0] in _NOT_PATHS.get(key, ())


def _located(key: str, value: str, folder: Path) -> str:
    return value if _is_word(key, value) else str(folder / value)


def _is_there(key: str, value: str) -> bool:
    return _is_word(key, value) or Path(value).exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """A case's own values over the defaults; ``place`` is what its table is called."""

    defaults: Mapping[str, Any]
    own: Mapping[str, Any]
    place: str

    @property
    def values(self) -> dict[str, Any]:
        """Those of the request."""
        return {**self.defaults, **self.own}

    def judge(self, complaints: Complaints) -> None:
        """Add everything that is wrong with the request, each with the keys it depends on."""
        values = self.values
        without = {key: set(_complaints(_left_out(values, key))) for key in values}
        for sentence in _complaints(values):
            keys = [key for key in values if sentence not in without[key]] or ["model"]
            keys.sort(key=lambda key: key not in self.own)
            complaints.add_at([f"{self._table(key)}, {key}" for key in keys], sentence)

    def _table(self, key: str) -> str:
        return self.place if key in self.own else "[defaults]"


def _left_out(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {**{k: v for k, v in values.items() if k != key}, "model": values["model"]} | (
        {"model": _BUNDLED} if key == "model" else {}
    )


def _complaints(values: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    try:
        validate(ExportRequest(**values))
    except InvalidRequestError as error:
        found += error.complaints
    try:
        resolve_targets(values.get("target"))
    except InputError as error:
        found.append(str(error))
    return found
