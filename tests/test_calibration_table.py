"""The calibration table: exact round trips, deterministic bytes, refusals in one sentence."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.cache_text import (
    CalibrationTableError,
    parse_cache_text,
    tensorrt_version_number,
)
from calibration.table import CalibrationTable, TensorRange

SCALES = st.floats(2.0**-126, float(np.finfo(np.float32).max), width=32)
FINITE = st.floats(-1e30, 1e30)
NAMES = st.text(min_size=1, max_size=12)
CACHE_NAMES = st.text("abcXYZ019/._-[]()*é", min_size=1, max_size=12)


def table(scales: dict[str, float], **changes: Any) -> CalibrationTable:
    fields: dict[str, Any] = {
        "method": "percentile",
        "percentile": 99.99,
        "activation_scales": scales,
        "ranges": {
            name: TensorRange(minimum=-0.5, maximum=127 * s, threshold=127 * s)
            for name, s in scales.items()
        },
        "onnx_sha256": "ab" * 32,
        "data_sha256": "01" * 32,
        "image_count": 64,
        "preprocess": {"image_size": [32, 32], "interpolation": "bilinear"},
    }
    return CalibrationTable(**(fields | changes))


def golden() -> CalibrationTable:
    return table({"relu": float(np.float32(1 / 127)), "images": 0.5})


def test_a_table_is_renamed_for_another_graph() -> None:
    """Scales, ranges and signs go with the names; everything else stays, the table too."""
    before = table({"images": 0.5, "relu": 0.25}, unsigned=frozenset({"relu"}))
    found = before.renamed({"images": "x", "relu": "y"})
    assert {"x": 0.5, "y": 0.25} == found.activation_scales
    assert {"x": before.ranges["images"], "y": before.ranges["relu"]} == found.ranges
    assert frozenset({"y"}) == found.unsigned
    assert found.renamed({"x": "images", "y": "relu"}) == before
    assert before.renamed({"absent": "x"}) == before


@st.composite
def tables(draw: st.DrawFn) -> CalibrationTable:
    scales = draw(st.dictionaries(NAMES, SCALES, max_size=4))
    low, high = sorted([draw(FINITE), draw(FINITE)])
    clip = draw(st.floats(1e-40, 1e30))
    return table(
        scales,
        method=draw(NAMES),
        percentile=draw(st.none() | st.floats(0.1, 100) | st.integers(1, 100)),
        ranges={n: TensorRange(minimum=low, maximum=high, threshold=clip) for n in scales},
        image_count=draw(st.integers(1, 10**9)),
        preprocess=draw(st.dictionaries(NAMES, st.booleans() | FINITE | NAMES, max_size=3)),
        options=draw(st.dictionaries(NAMES, st.booleans() | st.lists(NAMES), max_size=3)),
        source_sha256=draw(st.none() | st.just("cd" * 32)),
        channel_scales=draw(
            st.dictionaries(NAMES, st.lists(st.floats(1e-30, 1e30), max_size=3).map(tuple))
        ),
    )


@given(tables())
def test_json_round_trip_is_exact(original: CalibrationTable) -> None:
    """A table read back from its text equals the original, and its text is the same bytes."""
    again = CalibrationTable.loads(original.dumps())
    assert original == again
    assert original.dumps() == again.dumps()
    assert original == CalibrationTable.from_json(original.to_json())


@given(st.dictionaries(CACHE_NAMES, SCALES, max_size=6))
def test_cache_round_trip_is_exact(scales: dict[str, float]) -> None:
    """Scales survive the TensorRT cache bit for bit."""
    assert scales == parse_cache_text(table(scales).to_cache_text("10.3.0"))


def test_cache_text_is_golden() -> None:
    """The cache is a version header and the big-endian hex of each float32 scale."""
    expected = "TRT-100300-EntropyCalibration2\nimages: 3f000000\nrelu: 3c010204\n"
    assert expected == golden().to_cache_text("10.3.0")


def test_json_text_is_golden() -> None:
    """The JSON has sorted keys, one entry a tensor and the shortest exact decimals."""
    text = golden().dumps()
    assert list(json.loads(text)) == [
        "channel_scales", "data_sha256", "image_count", "method", "onnx_sha256", "options",
        "percentile", "preprocess", "schema_version", "source_sha256", "tensors",
    ]  # fmt: skip
    assert '"scale": 0.007874015718698502,' in text
    assert text.isascii()
    assert text.endswith("}\n")


def test_the_order_of_tensors_does_not_matter() -> None:
    """Tables made in another order have equal JSON and cache bytes."""
    scales = {"b": 0.5, "a": 0.25, "c": 2.0}
    one, other = table(scales), table(dict(reversed(scales.items())))
    assert one == other
    assert one.dumps() == other.dumps()
    assert one.to_cache_text("8.6.1") == other.to_cache_text("8.6.1")


def test_a_table_does_not_follow_the_callers_dictionary() -> None:
    """Later changes to the mappings passed in do not reach the table."""
    scales = {"a": 0.5}
    made = table(scales)
    scales["a"] = -1.0
    assert made.activation_scales == {"a": 0.5}


def test_negative_zero_has_one_text() -> None:
    """Equal ranges give equal bytes, whichever zero they were made from."""
    texts = {
        table({"a": 1.0}, ranges={"a": TensorRange(minimum=z, maximum=1, threshold=1)}).dumps()
        for z in (0.0, -0.0, 0)
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("version", "number"),
    [("8.6.1", 8601), ("8.5.2.2", 8502), ("7.2.2", 7202), ("10.3.0", 100300), ("10.16.1", 101601)],
)
def test_version_numbers(version: str, number: int) -> None:
    """The header number is TensorRT's own, with another rule from version 10 on."""
    assert number == tensorrt_version_number(version)


@pytest.mark.parametrize("version", ["10", "10.3", "", "ten.3.0", "10.3.0rc1", "10.3.-1"])
def test_other_version_texts_are_refused(version: str) -> None:
    """A version that is not three numbers is an error that shows the form."""
    with pytest.raises(CalibrationTableError, match=r"not of the form major.minor.patch, such as"):
        golden().to_cache_text(version)


@pytest.mark.parametrize("name", ["input:0", "a b", "a\n", "a\tb", "", "a\u00a0b", " a", "\ud800"])
def test_names_that_break_the_cache_are_refused(name: str) -> None:
    """A colon or white space in a name is refused for the cache, but kept in the JSON."""
    made = table({name: 0.5})
    assert made == CalibrationTable.loads(made.dumps())
    with pytest.raises(CalibrationTableError, match="cannot be written to a calibration cache"):
        made.to_cache_text("8.6.1")


def test_caches_that_tensorrt_wrote_are_read() -> None:
    """Names with colons and spaces, short hex and Windows line ends are understood."""
    text = (
        "TRT-7202-EntropyCalibration2\r\ninput_1:0: 3c010a14\r\n"
        "(Unnamed Layer* 4) [Fully Connected]_output: 3d65992f\r\n\r\ntiny: 800000\r\n"
    )
    found = parse_cache_text(text)
    (first,) = struct.unpack(">f", bytes.fromhex("3c010a14"))
    assert found["input_1:0"] == first
    assert list(found) == ["input_1:0", "(Unnamed Layer* 4) [Fully Connected]_output", "tiny"]
    assert found["tiny"] == 2.0**-126


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^calibration cache starts with '', not with TRT-<version>-<calibrator>$"),
        ("hello\na: 3f000000\n", r"starts with 'hello'"),
        ("TRT-8601-X\na 3f000000\n", r"^calibration cache line 2 is not 'tensor: hex': 'a 3f0"),
        ("TRT-8601-X\n\na: xyz\n", r"line 3 is not 'tensor: hex'"),
        ("TRT-8601-X\n: 3f000000\n", r"line 2 is not 'tensor: hex'"),
        ("TRT-8601-X\na: 3f0000000\n", r"line 2 is not"),
        ("TRT-8601-X\na: 3f000000\na: 3f000000\n", r"^calibration cache line 3 repeats tensor 'a'"),
        ("TRT-8601-X\na: 7f800000\n", r"^the scale of tensor 'a' must be a finite number, not inf"),
        ("TRT-8601-X\na: bf000000\n", r"^the scale of tensor 'a' must be a positive float32"),
        ("TRT-8601-X\na: 00000000\n", r"^the scale of tensor 'a' must be a positive float32"),
    ],
)
def test_broken_caches_are_refused(text: str, message: str) -> None:
    """A cache that is not one is an error that names the line or the tensor."""
    with pytest.raises(CalibrationTableError, match=message):
        parse_cache_text(text)


def changed(path: tuple[str, ...], value: object) -> dict[str, Any]:
    data = json.loads(golden().dumps())
    *parents, last = path
    target = data
    for key in parents:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return data


RELU = ("tensors", "relu")


def test_imported_scales_need_no_images() -> None:
    """No image decided scales that came with the weights."""
    imported = table({"relu": 0.5}, method="imported", image_count=0)
    assert imported == CalibrationTable.loads(imported.dumps())
    with pytest.raises(
        CalibrationTableError, match=r"^image_count must be an integer of at least 0"
    ):
        table({"relu": 0.5}, method="imported", image_count=-1)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 1, r"^calibration table has schema version 1, but only 2 is supp"),
        (("schema_version",), True, r"schema version True"),
        (("schema_version",), ..., r"schema version None"),
        (("method",), ..., r"^calibration table lacks the field 'method'$"),
        (("extra",), 1, r"^calibration table has the unknown field 'extra'$"),
        (("method",), 3, r"^method must be a non-empty text, not 3$"),
        (("percentile",), "99", r"^percentile must be a finite number, not '99'$"),
        (("percentile",), 0, r"^percentile must be in \(0, 100\], not 0.0$"),
        (("onnx_sha256",), "AB" * 32, r"^onnx_sha256 must be 64 hex digits, not 'AB"),
        (("data_sha256",), None, r"^data_sha256 must be 64 hex digits, not None$"),
        (("image_count",), True, r"^image_count must be a positive integer, not True$"),
        (("image_count",), 0, r"^image_count must be a positive integer, not 0$"),
        (("image_count",), 2.0, r"^image_count must be a positive integer, not 2.0$"),
        (("preprocess",), [["a", 1]], r"^preprocess must be a JSON object, not list$"),
        (("preprocess",), {"a": float("nan")}, r"^preprocess must be a JSON object: "),
        (("options",), 3, r"^options must be a JSON object, not int$"),
        (("source_sha256",), "x", r"^source_sha256 must be 64 hex digits, not 'x'$"),
        (("channel_scales",), [], r"^channel_scales must be a JSON object, not list$"),
        (("channel_scales",), {"a": "12"}, r"^channel_scales of 'a' must be a list of numbers$"),
        (("channel_scales",), {"a": [1.0, 0.0]}, r"^a channel scale of 'a' must be positive$"),
        (("tensors",), [], r"^tensors must be a JSON object, not list$"),
        (RELU, 0.5, r"^tensor 'relu' must be a JSON object, not float$"),
        ((*RELU, "scale"), ..., r"^tensor 'relu' lacks the field 'scale'$"),
        ((*RELU, "zero"), 0, r"^tensor 'relu' has the unknown field 'zero'$"),
        ((*RELU, "scale"), 0.1, r"^the scale of tensor 'relu' must be a positive float32, not 0.1"),
        ((*RELU, "scale"), 1e200, r"must be a positive float32, not 1e\+200$"),
        ((*RELU, "scale"), -0.5, r"must be a positive float32, not -0.5$"),
        ((*RELU, "scale"), True, r"must be a finite number, not True$"),
        ((*RELU, "scale"), 10**400, r"must be a finite number, not 1000"),
        ((*RELU, "scale"), float("inf"), r"^the scale of tensor 'relu' must be a finite number"),
        ((*RELU, "minimum"), 9.0, r"^tensor 'relu': minimum 9.0 exceeds maximum "),
        ((*RELU, "threshold"), 0, r"^tensor 'relu': threshold must be positive, not 0.0$"),
        ((*RELU, "maximum"), None, r"^tensor 'relu': maximum must be a finite number, not None$"),
    ],
)
def test_bad_tables_are_refused(path: tuple[str, ...], value: object, message: str) -> None:
    """Every wrong field is one sentence that names it."""
    with pytest.raises(CalibrationTableError, match=message) as caught:
        CalibrationTable.from_json(changed(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "nonsense"])
def test_text_that_is_not_json_is_refused(text: str) -> None:
    """Text that does not parse is an error of ours."""
    with pytest.raises(CalibrationTableError, match=r"^calibration table is not JSON: "):
        CalibrationTable.loads(text)


def test_json_of_another_kind_is_refused() -> None:
    """A JSON list is not a table."""
    with pytest.raises(CalibrationTableError, match=r"^a calibration table must be a JSON object"):
        CalibrationTable.loads("[]")


def test_scales_and_ranges_name_the_same_tensors() -> None:
    """A tensor with a scale but no range is refused by name."""
    with pytest.raises(CalibrationTableError, match=r"^tensor 'a' needs both a scale and a range$"):
        table({"a": 1.0}, ranges={})
