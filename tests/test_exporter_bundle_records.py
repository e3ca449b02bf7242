"""A bundle's records are what its readers expect, or the first field that is not is named."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest

from exporter.bundle.records import GATE_FIELDS, are_files, manifest_fault, parity_fault
from exporter.parity import Gate

MANIFEST: dict[str, Any] = {
    "files": {"model.onnx": {"sha256": "ab", "bytes": 3}},
    "spec": {"precision": "int8", "batch": "1:8:32", "build": {"dla": 0, "gpu_fallback": False}},
    "model": {"num_classes": 10},
    "inputs": [{"name": "images", "shape": ["batch", 3, 8, 8], "dtype": "uint8", "layout": "nhwc"}],
    "outputs": [{"name": "logits", "shape": ["batch", 10]}],
    "class_names": ["Ä", "b c"],
}
STAGE = {"stage": "int8", "status": "pass", "reference": "original", "reason": None,
         "tolerance": {"min_sqnr_db": 25.0}}  # fmt: skip


def with_value(record: Any, place: tuple[Any, ...], value: Any) -> Any:
    record = copy.deepcopy(record)
    *path, last = place
    inner = record
    for key in path:
        inner = inner[key]
    inner[last] = value
    return record


def test_right_records_have_no_fault():
    """With what is optional and without; unknown fields are left alone."""
    assert manifest_fault(MANIFEST) is None
    assert manifest_fault({**MANIFEST, "more": 1, "notes": [], "targets": ["sm86"]}) is None
    assert parity_fault({"stages": [STAGE, {**STAGE, "more": 1}]}) is None


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (("spec",), [], "spec is no object"),
        (("spec", "precision"), "int4", "spec.precision is 'int4'"),
        (("spec", "precision"), ["int8"], "spec.precision is ['int8']"),
        (("spec", "batch"), "8:1:2", "spec.batch is '8:1:2'"),
        (("spec", "build", "dla"), True, "spec.build.dla is True"),
        (("model", "num_classes"), 0, "model.num_classes is 0"),
        (("inputs",), [], "inputs is []"),
        (("inputs", 0, "shape", 1), -1, "inputs is [{'name': 'images', 'shape': ['batch', -1"),
        (("inputs", 0, "shape", 1), 2**40, "inputs is"),
        (("inputs", 0), "images", "inputs is ['images']"),
        (("outputs", 0, "name"), "a\nb", "outputs is"),
        (("class_names",), "abc", "class_names is 'abc'"),
        (("half_scales",), "no", "half_scales is 'no'"),
    ],
)
def test_a_wrong_field_of_the_manifest_is_named(place, value, fault):
    """The place, and what stands there, no longer than a line."""
    found = manifest_fault(with_value(MANIFEST, place, value))
    assert found is not None
    assert found.startswith(fault)
    assert len(found) < 100


def test_a_missing_field_is_named():
    """Only those without which nobody can do anything."""
    assert "spec is missing" == manifest_fault({"files": {}})
    assert "spec.precision is missing" == manifest_fault({"files": {}, "spec": {}})
    assert "model is missing" == manifest_fault({"files": {}, "spec": MANIFEST["spec"]})
    assert "stages is missing" == parity_fault({})


@pytest.mark.parametrize("name", ["../a", "/dev/zero", "a/b", "..", "", "a\nb"])
def test_a_bundle_names_no_file_outside_its_folder(name):
    """Nothing elsewhere is read, hashed or linked because a manifest says so."""
    assert are_files({"model.onnx": {"sha256": "ab"}})
    assert not are_files({name: {"sha256": "ab"}})


@pytest.mark.parametrize(
    ("key", "value"),
    [("status", "good"), ("stage", 3), ("tolerance", {"min_sqnr_db": "25"}), ("reason", []),
     ("tolerance", {"unknown": 1}), ("tolerance", {"min_sqnr_db": float("nan")})],
)  # fmt: skip
def test_a_wrong_row_of_the_ledger_is_named(key, value):
    """By its number."""
    found = parity_fault({"stages": [STAGE, {**STAGE, key: value}]})
    assert found is not None
    assert found.startswith(f"stages[1].{key} is ")


def test_the_fields_of_a_gate_are_those_of_parity():
    """The list stands twice because of the floors; it is one list."""
    assert GATE_FIELDS == tuple(field.name for field in fields(Gate))
