"""`--with-preprocess` as a user meets it: the bundled A0 on pixels, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.images import Preprocess
from exporter import Bundle
from models.registry import bundled_weights

OPERATORS = ["Cast", "Sub", "Mul", "Transpose"]


def made(command, out: Path, *options: str) -> Bundle:
    """A small export of the bundled A0."""
    process = command(
        "engine", "A0", "--evaluation-images", "64", "--calib-images", "64", "--target", "sm86",
        "--min-agreement", "0.9", "--out", str(out), *options,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return Bundle.load(out)


@pytest.fixture(scope="module")
def plain(command, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """``plain("int8")`` -> the bundle without a prologue."""
    folder = tmp_path_factory.mktemp("plain")
    found: dict[str, Bundle] = {}

    def bundle(precision: str) -> Bundle:
        if precision not in found:
            options = ("--image-size", "32", "--precision", precision)
            found[precision] = made(command, folder / precision, *options)
        return found[precision]

    return bundle


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize("words", [[], ["nchw"]], ids=["nhwc", "nchw"])
def test_a0_takes_pixels_in_both_layouts(command, tmp_path, plain, precision, words):
    """Both graphs pass on uint8, the engine has the kernels that it has without, and it is used."""
    options = ("--image-size", "32", "--precision", precision, "--with-preprocess", *words)
    bundle, without = made(command, tmp_path / "b", *options), plain(precision)
    layout = words[0] if words else "nhwc"
    (port,) = bundle.manifest["inputs"]
    assert ("uint8", layout) == (port["dtype"], port["layout"])
    assert (OPERATORS if layout == "nhwc" else OPERATORS[:-1]) == (
        bundle.manifest["contract"]["prologue"]
    )
    rows = {row["stage"]: row for row in bundle.parity["stages"]}
    before = {row["stage"]: row for row in without.parity["stages"]}
    for stage in ("simplified", precision):
        assert ("pass", before[stage]["tolerance"]) == (
            rows[stage]["status"], rows[stage]["tolerance"],
        )  # fmt: skip
    found, expected = (
        json.loads((which.path / "engine.json").read_text()) for which in (bundle, without)
    )
    assert expected["per_target"] == found["per_target"]
    assert 22 == found["convolutions"]["int8" if precision == "int8" else "half"]
    assert (22 if precision == "fp16" else 0) == found["epilogue_fused"]
    used_on_the_device(command, bundle, tmp_path / "data")


def used_on_the_device(command, bundle: Bundle, data: Path) -> None:
    """verify, evaluate, benchmark and plan of the published bundle."""
    process = command("verify", str(bundle.path), "--json")
    assert process.returncode == 0, process.stderr
    pixels, logits = bundle.reference()
    assert np.uint8 == pixels.dtype
    channels_last = np.moveaxis(pixels, 1, 3) if pixels.shape[1] == 3 else pixels
    for number, answer in enumerate(logits.argmax(axis=1)):
        folder = data / bundle.manifest["class_names"][answer]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(channels_last[number]).save(folder / f"{number}.png")
    process = command("evaluate", str(bundle.path), "--data", str(data), "--json")
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    # Resized and cropped once more they are other pictures, mostly of the same digits.
    assert (8, True) == (result["images"], result["top1"] >= 0.5)
    process = command("benchmark", str(bundle.path), "--batch", "1,2", "--seconds", "0", "--json")
    assert process.returncode == 0, process.stderr
    process = command("plan", str(bundle.path), "--json")
    assert process.returncode == 0, process.stderr
    (entry,) = json.loads(process.stdout)["inputs"]
    assert ("uint8", list(pixels.shape[1:])) == (entry["dtype"], entry["shape"][1:])


@pytest.mark.slow
def test_open_sizes_are_built_for_pixels(command, tmp_path):
    """Batch, height and width of [N, H, W, 3] have their profile in the engine."""
    options = ("--dynamic-size", "64:96:128", "--precision", "int8", "--with-preprocess")
    bundle = made(command, tmp_path / "b", *options)
    assert ["batch", "height", "width", 3] == bundle.manifest["inputs"][0]["shape"]
    engine = json.loads((bundle.path / "engine.json").read_text())
    counts = engine["convolutions"]
    assert 22 == counts["total"] == counts["int8"]
    assert bundle.run(np.zeros((1, 72, 65, 3), np.uint8)).shape == (1, 10)


@pytest.mark.slow
def test_the_bundles_preprocessing_gives_its_pixels(command, tmp_path):
    """What reference.npz holds is what Preprocess.pixels makes of the image files."""
    options = ("--image-size", "32", "--precision", "fp32", "--with-preprocess")
    bundle = made(command, tmp_path / "b", *options)
    preprocess = Preprocess.from_json(bundle.manifest["preprocess"])
    files = sorted(bundled_weights("A0").test_images.rglob("*.png"))
    known = {preprocess.pixels(Image.open(path)).tobytes() for path in files}
    stored, _ = bundle.reference()
    assert {image.tobytes() for image in stored} <= known


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--with-preprocess", "hwc"),
            "unknown layout 'hwc' (nearest: nhwc; known: nhwc, nchw)",
        ),
        (
            ("--with-preprocess", "--dla", "0", "--no-gpu-fallback"),
            "--with-preprocess normalizes in float32, which no DLA does: leave --no-gpu-fallback "
            "away",
        ),
    ],
)
def test_bad_usage_is_one_sentence(command, tmp_path, options, sentence):
    """Exit code 2, nothing is written."""
    process = command("engine", "A0", *options, "--out", str(tmp_path / "b"))
    assert (2, f"repvgg-export: {sentence}\n") == (process.returncode, process.stderr)
    assert not list(tmp_path.iterdir())
