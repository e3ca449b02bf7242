"""Runs that take longer than a coffee sip; `make test-slow`, and CI, run them."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models import VARIANTS
from models.registry import WEIGHTS_FOLDER

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("model", "precision"),
    [(name, "fp16") for name in VARIANTS] + [(name, "int8") for name in ("A0", "B1g4", "D2se")],
)
def test_every_variant_reaches_an_engine(command, tmp_path, model, precision):
    """Random weights go the whole road, every 3x3 convolution in the precision asked for."""
    out = tmp_path / "bundle"
    process = command(
        "engine", model, "--precision", precision, "--weights", "random", "--target", "sm86",
        "--image-size", "64", "--evaluation-images", "8", "--calib-images", "16",
        "--out", str(out), "--json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    counts = result["engine"]["convolutions"]
    assert len(VARIANTS[model].layers) <= counts["half" if precision == "fp16" else "int8"]
    assert any("RANDOM WEIGHTS" in note for note in result["notes"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert "random" == manifest["weights"]["source"]
    assert "RANDOM WEIGHTS" in (out / "report.html").read_text()
    shutil.rmtree(out)


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
