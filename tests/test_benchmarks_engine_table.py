"""The engine table: its page is what was measured, and its rows come from real engines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def table() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        yield import_module("engine_table")


def test_the_page_is_the_committed_result(table):
    """docs/engines.md says exactly what benchmarks/results/engines.json holds."""
    result = json.loads(table.RESULT.read_text("utf-8"))
    assert table.page(result) == table.PAGE.read_text("utf-8")


def test_the_result_covers_every_model_precision_and_target(table):
    """One row for each, the portable plan included, and nothing of another precision in it."""
    result = json.loads(table.RESULT.read_text("utf-8"))
    found = {(row["model"], row["precision"], row["target"]) for row in result["engines"]}
    ada = {"sm89", "sm120", "sm121", table.PORTABLE}
    ampere = ada | {"sm80", "sm86"}
    wanted = {"fp16": ampere | {"sm75"}, "bf16": ampere, "int8": ampere, "fp8": ada}
    assert {
        (model, precision, target)
        for model in ("A0", "B1g4")
        for precision, targets in wanted.items()
        for target in targets
    } == found
    kinds = {"fp16": "half"}
    for row in result["engines"]:
        counts = row["convolutions"]
        assert counts["total"] == counts[kinds.get(row["precision"], row["precision"])] > 0


@pytest.mark.slow
def test_a_row_is_a_real_engine(table, tmp_path, monkeypatch):
    """Rows of one model and precision, made by the command's own functions."""
    monkeypatch.setattr(table, "MODELS", {"A0": ("--image-size", "64")})
    monkeypatch.setattr(table, "PRECISIONS", table.PRECISIONS[:1])
    found = list(table.rows(tmp_path))
    assert ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121", "portable"] == [
        row["target"] for row in found
    ]
    for row in found:
        assert row["convolutions"]["half"] == row["epilogue_fused"] == 22
        assert row["plan_bytes"] > 1_000_000
        assert row["build_seconds"] > 0
    assert len(found[-1]["targets"]) == 6
