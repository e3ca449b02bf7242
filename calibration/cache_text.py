"""TensorRT's calibration cache, for builders that still take implicit INT8 (DLA on JetPack 6).

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
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

_VERSION = re.compile(r"(\d{1,3})\.(\d{1,2})\.(\d{1,2})(?:\.\d+)*")
_HEADER = re.compile(r"TRT-\w+-\w+")
# The last colon separates: caches that TensorRT itself wrote have names with colons and spaces.
_LINE = re.compile(r"(.*\S)\s*:\s*([0-9a-fA-F]{1,8})")


class CalibrationTableError(ValueError):
    """The table or its text cannot be used; the message names the field and the reason."""


def cache_text(scales: Mapping[str, float], version: str) -> str:
    """TensorRT's calibration cache for that ``major.minor.patch``, tensors in the order given.

    Raises:
        CalibrationTableError: for a version that is not three numbers; for a tensor name with a
            colon or white space, where not every reader finds its end: TensorRT does, but ONNX
            Runtime's TensorRT provider stops at the first colon and reads the rest as hex.
    """
    lines = [f"TRT-{tensorrt_version_number(version)}-EntropyCalibration2"]
    for name, scale in scales.items():
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
        scales[name] = float32_scale(value, name)
    return scales


def finite_number(value: object, what: str) -> float:
    """``value`` as a float; -0.0 becomes 0.0, so that equal numbers give equal text."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise CalibrationTableError(f"{what} must be a finite number, not {value!r}")
    return float(value) + 0.0


def float32_scale(value: object, name: str) -> float:
    """``value`` if it is a positive finite float32."""
    number = finite_number(value, f"the scale of tensor {name!r}")
    try:
        exact = struct.unpack(">f", struct.pack(">f", number))[0] == number
    except OverflowError:
        exact = False
    if number <= 0 or not exact:
        raise CalibrationTableError(
            f"the scale of tensor {name!r} must be a positive float32, not {number!r}"
        )
    return number
