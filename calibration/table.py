"""The calibration table: which scales INT8 uses, and what they were derived from.

Two texts. ``calibration.json`` is ours: scales, ranges and provenance, read back unchanged.
``calibration.cache`` is TensorRT's, for builders that still take implicit INT8 (DLA on JetPack 6):

    TRT-100300-EntropyCalibration2
    images: 3ca94044
    /stage1/Relu_output_0: 3c8d13a5

One header, then ``name: scale`` a line, the scale as the 8 hex digits of its big-endian IEEE 754
float32. The number in the header is ``NV_TENSORRT_VERSION`` of ``NvInferVersion.h``,

    major * 1000  + minor * 100 + patch    before TensorRT 10   8.6.1  -> 8601
    major * 10000 + minor * 100 + patch    from TensorRT 10     10.3.0 -> 100300

and a builder of another version ignores the file or asks for calibration data, which is why the
version is a parameter and has no default. Only ``EntropyCalibration2`` calibrators read it; the
name is part of the format and says nothing about how our scales were chosen.

Scales are float32 values held as Python floats. JSON writes the shortest decimal that reads back as
the same float64, hence as the same float32: both texts round-trip bit for bit.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(\d{1,3})\.(\d{1,2})\.(\d{1,2})(?:\.\d+)*")
_HEADER = re.compile(r"TRT-\w+-\w+")
# The last colon separates: caches that TensorRT itself wrote have names with colons and spaces.
_LINE = re.compile(r"(.*\S)\s*:\s*([0-9a-fA-F]{1,8})")
_FIELDS = {
    "schema_version", "method", "percentile", "onnx_sha256", "data_sha256", "image_count",
    "preprocess", "tensors",
}  # fmt: skip
_TENSOR_FIELDS = {"scale", "minimum", "maximum", "threshold"}


class CalibrationTableError(ValueError):
    """The table or its text cannot be used; the message names the field and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRange:
    """Smallest and largest observed value and the clip value, in the tensor's units."""

    minimum: float
    maximum: float
    threshold: float

    def __post_init__(self) -> None:
        for field in ("minimum", "maximum", "threshold"):
            object.__setattr__(self, field, _number(getattr(self, field), field))
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
    """

    method: str
    percentile: float | None = None
    activation_scales: Mapping[str, float]
    ranges: Mapping[str, TensorRange]
    onnx_sha256: str
    data_sha256: str
    image_count: int
    preprocess: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or not self.method:
            raise CalibrationTableError(f"method must be a non-empty text, not {self.method!r}")
        if self.percentile is not None:
            object.__setattr__(self, "percentile", _number(self.percentile, "percentile"))
            if not 0 < self.percentile <= 100:
                raise CalibrationTableError(
                    f"percentile must be in (0, 100], not {self.percentile}"
                )
        for field in ("onnx_sha256", "data_sha256"):
            value = getattr(self, field)
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise CalibrationTableError(f"{field} must be 64 hex digits, not {value!r}")
        if type(self.image_count) is not int or self.image_count < 1:
            raise CalibrationTableError(
                f"image_count must be a positive integer, not {self.image_count!r}"
            )
        if self.activation_scales.keys() != self.ranges.keys():
            odd = min(self.activation_scales.keys() ^ self.ranges.keys())
            raise CalibrationTableError(f"tensor {odd!r} needs both a scale and a range")
        scales = {
            name: _scale(self.activation_scales[name], name)
            for name in sorted(self.activation_scales)
        }
        object.__setattr__(self, "activation_scales", scales)
        object.__setattr__(self, "ranges", {name: self.ranges[name] for name in scales})
        object.__setattr__(self, "preprocess", _plain_json(self.preprocess))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_json` reads it back to an equal table."""
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "percentile": self.percentile,
            "onnx_sha256": self.onnx_sha256,
            "data_sha256": self.data_sha256,
            "image_count": self.image_count,
            "preprocess": _plain_json(self.preprocess),
            "tensors": {
                name: {
                    "scale": scale,
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

    def to_cache_text(self, version: str) -> str:
        """TensorRT's calibration cache for that ``major.minor.patch``, tensors sorted by name.

        Raises:
            CalibrationTableError: for a version that is not three numbers; for a tensor name with a
                colon or white space, where not every reader finds its end: TensorRT does, but ONNX
                Runtime's TensorRT provider stops at the first colon and reads the rest as hex.
        """
        lines = [f"TRT-{tensorrt_version_number(version)}-EntropyCalibration2"]
        for name, scale in self.activation_scales.items():
            if not name or not name.isprintable() or ":" in name or " " in name:
                raise CalibrationTableError(
                    f"tensor name {name!r} cannot be written to a calibration cache; "
                    "rename the tensor so that it has no colon and no white space"
                )
            lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
        return "\n".join(lines) + "\n"


def tensorrt_version_number(version: str) -> int:
    """``NV_TENSORRT_VERSION`` of a version text: "8.6.1" -> 8601, "10.3.0" -> 100300.

    A build number as in "10.3.0.26" is ignored, as it is by TensorRT.

    Raises:
        CalibrationTableError: if it does not start with three numbers.
    """
    match = _VERSION.fullmatch(version)
    if match is None:
        raise CalibrationTableError(
            f"TensorRT version {version!r} is not of the form major.minor.patch, such as 10.3.0"
        )
    major, minor, patch = map(int, match.groups())
    return major * (10000 if major >= 10 else 1000) + minor * 100 + patch


def parse_cache_text(text: str) -> dict[str, float]:
    """The scales of a TensorRT calibration cache, of any version and calibrator, by tensor name.

    Raises:
        CalibrationTableError: naming the line, for a missing header, a line that is not
            ``name: hex``, a tensor that occurs twice, or a scale that is not positive and finite.
    """
    header, *lines = text.split("\n")
    if not _HEADER.fullmatch(header.strip()):
        raise CalibrationTableError(
            f"calibration cache starts with {header[:60]!r}, not with TRT-<version>-<calibrator>"
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise CalibrationTableError(
                f"calibration cache line {number} is not 'tensor: hex': {line[:60]!r}"
            )
        name = match[1]
        if name in scales:
            raise CalibrationTableError(f"calibration cache line {number} repeats tensor {name!r}")
        (value,) = struct.unpack(">f", bytes.fromhex(match[2].zfill(8)))
        scales[name] = _scale(value, name)
    return scales


def _number(value: object, what: str) -> float:
    """``value`` as a float; -0.0 becomes 0.0, so that equal numbers give equal text."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise CalibrationTableError(f"{what} must be a finite number, not {value!r}")
    return float(value) + 0.0


def _scale(value: object, name: str) -> float:
    """``value`` if it is a positive finite float32."""
    number = _number(value, f"the scale of tensor {name!r}")
    try:
        exact = struct.unpack(">f", struct.pack(">f", number))[0] == number
    except OverflowError:
        exact = False
    if number <= 0 or not exact:
        raise CalibrationTableError(
            f"the scale of tensor {name!r} must be a positive float32, not {number!r}"
        )
    return number


def _range(entry: Mapping[str, Any], name: str) -> TensorRange:
    fields = {key: entry[key] for key in _TENSOR_FIELDS - {"scale"}}
    try:
        return TensorRange(**fields)
    except CalibrationTableError as error:
        raise CalibrationTableError(f"tensor {name!r}: {error}") from error


def _plain_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy in JSON's own types, so that a table equals what is read back from its text."""
    _require_mapping(value, "preprocess")
    try:
        copied = json.loads(json.dumps(dict(value), sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CalibrationTableError(f"preprocess must be a JSON object: {error}") from error
    return dict(copied)


def _require_mapping(value: object, what: str) -> None:
    if not isinstance(value, Mapping):
        raise CalibrationTableError(f"{what} must be a JSON object, not {type(value).__name__}")


def _require_fields(data: Mapping[str, Any], known: set[str], what: str) -> None:
    if missing := sorted(known - data.keys()):
        raise CalibrationTableError(f"{what} lacks the field {missing[0]!r}")
    if unknown := sorted(set(map(str, data)) - known):
        raise CalibrationTableError(f"{what} has the unknown field {unknown[0]!r}")
