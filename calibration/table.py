"""The calibration table: which scales INT8 uses, and what they were derived from.

``calibration.json`` is ours: scales, ranges and provenance, read back unchanged.
``calibration.cache`` is TensorRT's (:mod:`calibration.cache_text`).

Scales are float32 values held as Python floats. JSON writes the shortest decimal that reads back as
the same float64, hence as the same float32: both texts round-trip bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from calibration.cache_text import (
    CalibrationTableError,
    cache_text,
    finite_number,
    float32_scale,
)
from calibration.threshold import LEVELS

SCHEMA_VERSION = 2
IMPORTED = "imported"
"""The method of scales that came with the weights: no image decided them.

``data_sha256`` is then the file's that carried them, and ``image_count`` how many images the ranges
were observed on, which may be none."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {
    "schema_version", "method", "percentile", "options", "source_sha256", "onnx_sha256",
    "data_sha256", "image_count", "preprocess", "tensors", "channel_scales",
}  # fmt: skip
_TENSOR_FIELDS = {"scale", "unsigned", "minimum", "maximum", "threshold"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """Smallest and largest observed value and the clip value, in the tensor's units."""

    minimum: float
    maximum: float
    threshold: float

    def __post_init__(self) -> None:
        for name in ("minimum", "maximum", "threshold"):
            object.__setattr__(self, name, finite_number(getattr(self, name), name))
        if self.minimum > self.maximum:
            raise CalibrationTableError(f"minimum {self.minimum} exceeds maximum {self.maximum}")
        if self.threshold <= 0:
            raise CalibrationTableError(f"threshold must be positive, not {self.threshold}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTable:
    """Activation scales by tensor name, and their provenance.

    Every instance is valid: scales are positive, finite float32 values, ``ranges`` names the same
    tensors, hashes are 64 lower-case hex digits, ``preprocess`` is plain JSON. The mappings are
    copies, sorted by name. Anything else raises :class:`CalibrationTableError`.

    ``source_sha256`` is the float graph that was calibrated, ``onnx_sha256`` the one whose tensors
    the scales belong to: they differ by equalization, whose divisors per stage and channel are
    ``channel_scales``. Scales of ``unsigned`` tensors are steps of 0 to 255, of all others steps of
    -128 to 127. ``options`` is what else the user chose, as JSON. Together with data and
    preprocessing this is the *binding*: the same of all gives the same integers again.
    """

    method: str
    percentile: float | None = None
    activation_scales: Mapping[str, float]
    ranges: Mapping[str, TensorRange]
    onnx_sha256: str
    data_sha256: str
    image_count: int
    preprocess: Mapping[str, Any]
    source_sha256: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    unsigned: frozenset[str] = frozenset()
    channel_scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise CalibrationTableError(f"method must be a non-empty text, not {self.method!r}")
        if self.percentile is not None:
            object.__setattr__(self, "percentile", finite_number(self.percentile, "percentile"))
            if not 0 < self.percentile <= 100:
                raise CalibrationTableError(
                    f"percentile must be in (0, 100], not {self.percentile}"
                )
        if self.source_sha256 is None:
            object.__setattr__(self, "source_sha256", self.onnx_sha256)
        for name in ("source_sha256", "onnx_sha256", "data_sha256"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise CalibrationTableError(f"{name} must be 64 hex digits, not {value!r}")
        fewest = 0 if self.method == IMPORTED else 1
        if type(self.image_count) is not int or self.image_count < fewest:
            wanted = "an integer of at least 0" if fewest == 0 else "a positive integer"
            raise CalibrationTableError(f"image_count must be {wanted}, not {self.image_count!r}")
        if self.activation_scales.keys() != self.ranges.keys():
            odd = min(self.activation_scales.keys() ^ self.ranges.keys())
            raise CalibrationTableError(f"tensor {odd!r} needs both a scale and a range")
        if unknown := sorted(self.unsigned - self.activation_scales.keys()):
            raise CalibrationTableError(f"unsigned names {unknown[0]!r}, which has no scale")
        scales = {
            name: float32_scale(self.activation_scales[name], name)
            for name in sorted(self.activation_scales)
        }
        object.__setattr__(self, "activation_scales", scales)
        object.__setattr__(self, "ranges", {name: self.ranges[name] for name in scales})
        object.__setattr__(self, "preprocess", _plain_json(self.preprocess, "preprocess"))
        object.__setattr__(self, "options", _plain_json(self.options, "options"))
        object.__setattr__(self, "channel_scales", _channel_scales(self.channel_scales))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_json` reads it back to an equal table."""
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "percentile": self.percentile,
            "options": _plain_json(self.options, "options"),
            "source_sha256": self.source_sha256,
            "onnx_sha256": self.onnx_sha256,
            "data_sha256": self.data_sha256,
            "image_count": self.image_count,
            "preprocess": _plain_json(self.preprocess, "preprocess"),
            "channel_scales": {name: list(found) for name, found in self.channel_scales.items()},
            "tensors": {
                name: {
                    "scale": scale,
                    "unsigned": name in self.unsigned,
                    "minimum": self.ranges[name].minimum,
                    "maximum": self.ranges[name].maximum,
                    "threshold": self.ranges[name].threshold,
                }
                for name, scale in self.activation_scales.items()
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CalibrationTable:
        """Build from :meth:`to_json`'s dictionary.

        Raises:
            CalibrationTableError: another schema version; a missing or unknown field; a value of
                the wrong type or out of range. One sentence that names the field.
        """
        _require_mapping(data, "a calibration table")
        version = data.get("schema_version")
        if type(version) is not int or version != SCHEMA_VERSION:
            raise CalibrationTableError(
                f"calibration table has schema version {version!r}, but only {SCHEMA_VERSION} is "
                "supported; calibrate again with this release"
            )
        _require_fields(data, _FIELDS, "calibration table")
        _require_mapping(data["tensors"], "tensors")
        for name, entry in data["tensors"].items():
            _require_mapping(entry, f"tensor {name!r}")
            _require_fields(entry, _TENSOR_FIELDS, f"tensor {name!r}")
        tensors: Mapping[str, Mapping[str, Any]] = data["tensors"]
        return cls(
            activation_scales={name: entry["scale"] for name, entry in tensors.items()},
            ranges={name: _range(entry, name) for name, entry in tensors.items()},
            unsigned=frozenset(
                name for name, entry in tensors.items() if _flag(entry["unsigned"], name)
            ),
            **{key: data[key] for key in _FIELDS - {"schema_version", "tensors"}},
        )

    def dumps(self) -> str:
        """JSON text with sorted keys: equal tables give equal bytes, pure ASCII."""
        return json.dumps(self.to_json(), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def loads(cls, text: str) -> CalibrationTable:
        """Read :meth:`dumps`'s text.

        Raises:
            CalibrationTableError: if it is not JSON, or as :meth:`from_json`.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CalibrationTableError(f"calibration table is not JSON: {error}") from error
        return cls.from_json(data)

    def renamed(self, names: Mapping[str, str]) -> CalibrationTable:
        """The same scales for a graph in which these tensors have other names; old to new."""
        return replace(
            self,
            activation_scales={
                names.get(name, name): scale for name, scale in self.activation_scales.items()
            },
            ranges={names.get(name, name): found for name, found in self.ranges.items()},
            unsigned=frozenset(names.get(name, name) for name in self.unsigned),
        )

    def to_cache_text(self, version: str) -> str:
        """TensorRT's calibration cache, tensors sorted by name; see :func:`cache_text`.

        It knows symmetric scales only: an unsigned tensor has there the one that reaches as far.
        """
        symmetric = {
            name: float(np.float32(self.ranges[name].threshold / LEVELS))
            if name in self.unsigned
            else scale
            for name, scale in self.activation_scales.items()
        }
        return cache_text(symmetric, version)


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise CalibrationTableError(f"unsigned of tensor {name!r} must be true or false")
    return value


def _range(entry: Mapping[str, Any], name: str) -> TensorRange:
    fields = {key: entry[key] for key in _TENSOR_FIELDS - {"scale", "unsigned"}}
    try:
        return TensorRange(**fields)
    except CalibrationTableError as error:
        raise CalibrationTableError(f"tensor {name!r}: {error}") from error


def _channel_scales(value: object) -> dict[str, tuple[float, ...]]:
    _require_mapping(value, "channel_scales")
    assert isinstance(value, Mapping)
    found = {}
    for name in sorted(value):
        if not isinstance(value[name], Sequence) or isinstance(value[name], str):
            raise CalibrationTableError(f"channel_scales of {name!r} must be a list of numbers")
        what = f"a channel scale of {name!r}"
        found[name] = tuple(finite_number(scale, what) for scale in value[name])
        if not all(scale > 0 for scale in found[name]):
            raise CalibrationTableError(f"{what} must be positive")
    return found


def _plain_json(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A deep copy in JSON's own types, so that a table equals what is read back from its text."""
    _require_mapping(value, what)
    try:
        copied = json.loads(json.dumps(dict(value), sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CalibrationTableError(f"{what} must be a JSON object: {error}") from error
    return dict(copied)


def _require_mapping(value: object, what: str) -> None:
    if not isinstance(value, Mapping):
        raise CalibrationTableError(f"{what} must be a JSON object, not {type(value).__name__}")


def _require_fields(data: Mapping[str, Any], known: set[str], what: str) -> None:
    if missing := sorted(known - data.keys()):
        raise CalibrationTableError(f"{what} lacks the field {missing[0]!r}")
    if unknown := sorted(set(map(str, data)) - known):
        raise CalibrationTableError(f"{what} has the unknown field {unknown[0]!r}")
