"""Runs that take longer than a coffee sip; `make test-slow`, and CI, run them."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.registry import WEIGHTS_FOLDER

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("model", "precision", "convolutions"),
    [("A2", "fp16", 22), ("B1g4", "fp16", 28), ("B1g4", "int8", 28)],
)
def test_larger_and_grouped_variants_reach_an_engine(
    command, tmp_path, model, precision, convolutions
):
    """Random weights go the whole road at 224 pixels, every convolution in its precision."""
    out = tmp_path / "bundle"
    process = command(
        "engine", model, "--precision", precision, "--weights", "random", "--target", "sm86",
        "--evaluation-images", "24", "--calib-images", "24", "--out", str(out), "--json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    kind = "half" if precision == "fp16" else "int8"
    counts = result["engine"]["convolutions"]
    assert (convolutions, convolutions) == (counts["total"], counts[kind])
    assert any("RANDOM WEIGHTS" in note for note in result["notes"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert "random" == manifest["weights"]["source"]
    assert "RANDOM WEIGHTS" in (out / "report.html").read_text()


def test_the_training_example_writes_the_images_that_ship(tmp_path):
    """One epoch of the script gives the very test and calibration images of the package."""
    subprocess.run(
        [sys.executable, "examples/train_digits_a0.py", "--out", str(tmp_path), "--epochs", "1"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    shipped = sorted(
        path.relative_to(WEIGHTS_FOLDER) for path in WEIGHTS_FOLDER.rglob("digits/**/*.png")
    )
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert shipped == made
    assert all(
        filecmp.cmp(WEIGHTS_FOLDER / name, tmp_path / name, shallow=False) for name in shipped
    )
    assert (tmp_path / "a0_digits.safetensors").stat().st_size < 17_000_000
