"""The right files that `fuzz` makes wrong: small, and of every kind that a command reads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from exporter import export
from exporter.bundle import CHECKSUMS, MANIFEST, checksums_text, file_sha256
from models.registry import BundledWeights, bundled_weights
from models.repvgg import RepVGG
from models.variants import Variant

TINY = Variant(
    name="tiny", num_blocks=(1, 1, 2, 1), width_multiplier=(0.125, 0.125, 0.0625, 0.03125)
)
CLASSES = ("0", "1", "2")
QUICK = (
    "--precision", "fp32", "--target", "sm90", "--image-size", "32", "--evaluation-images", "8",
)  # fmt: skip
"""Of `engine A0`: nothing is built here, so that an export takes seconds."""
_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeds:
    """A folder with the files below, in folders named after their kind."""

    root: Path

    def of(self, kind: str) -> list[Path]:
        """The files, or the bundle folders, of ``kind``."""
        return sorted((self.root / kind).iterdir())

    @property
    def bundle(self) -> Path:
        """A bundle in order."""
        return self.root / "bundle" / "int8"


def tiny_network() -> RepVGG:
    """A RepVGG of 6 blocks with statistics that are not the initial ones; 3 classes."""
    torch.manual_seed(0)
    network = RepVGG(TINY, num_classes=len(CLASSES))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
            torch.nn.init.normal_(module.running_mean, std=0.1)
    return network.eval()


def make_file_seeds(root: Path) -> None:
    """The kinds for which nothing has to be exported."""
    state = {name: tensor.clone() for name, tensor in tiny_network().state_dict().items()}
    _weights(root / "checkpoint", state)
    _pictures(root / "picture", sorted(_bundled().test_images.rglob("*.png"))[0])
    (root / "plan").mkdir()
    (root / "plan/model.engine").write_bytes(_plan())
    _json(root / "preprocess/preprocess.json", {"image_size": [32, 32],
        "crop_fraction": 1.0, "interpolation": "bicubic", "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25]})  # fmt: skip


def make_small_seeds(root: Path) -> Seeds:
    """Every kind but those that need the real A0: under a megabyte, in about ten seconds."""
    make_file_seeds(root)
    network = tiny_network()
    for precision in ("int8", "fp32", "bf16"):
        folder = root / "bundle" / precision
        images = np.random.default_rng(0).standard_normal((24, 3, _SIZE, _SIZE)).astype(np.float32)
        export(
            network, example_input=torch.zeros(1, 3, _SIZE, _SIZE), precision=precision,
            calibration=images, targets="sm90", out=folder, batch="1:2:4", recipe="minmax"
            if precision == "int8" else None,
        )  # fmt: skip
        _as_from_images(folder)
    made = root / "bundle"
    _copies(root / "graph", made / "int8/model.int8.onnx", made / "fp32/model.onnx")
    _copies(root / "table", made / "int8/calibration.json")
    _copies(root / "cache", made / "int8/calibration.cache")
    return Seeds(root=root)


def make_seeds(root: Path) -> Seeds:
    """All of them; one minute, most of it the exports of the real A0."""
    seeds = make_small_seeds(root)
    bundled = _bundled()
    state = load_file(bundled.checkpoint)
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    _weights(root / "a0", half)
    out = root / "made"
    _command("engine", "A0", "--precision", "int8", "--recipe", "minmax", "--target", "sm90",
        "--calib-images", "16", "--evaluation-images", "16", "--out", str(out))  # fmt: skip
    _copies(root / "a0_graph", out / "model.int8.onnx")
    _copies(root / "a0_table", out / "calibration.json")
    shutil.rmtree(out)
    for number, path in enumerate(sorted(bundled.test_images.rglob("*.png"))[::30]):
        _copies(root / "folder/images" / CLASSES[number % len(CLASSES)], path)
    evaluation = _command("evaluate", str(seeds.bundle), "--data", str(images_of(seeds)), "--json")
    (root / "evaluation").mkdir()
    (root / "evaluation/shard.json").write_text(evaluation, "utf-8")
    config = root / "config/parity.toml"
    config.parent.mkdir()
    config.write_text(_CONFIG, "utf-8")
    baseline = root / "baseline/baseline.json"
    _command("parity", str(config), "--baseline", str(baseline), "--update-baseline",
        "--results", str(root / "results"))  # fmt: skip
    shutil.rmtree(root / "results")
    return seeds


_CONFIG = """[defaults]
model = "A0"
target = "sm90"
image_size = "32"

[margins]
sqnr_db = 1.0
top1 = 0.01

[[case]]
name = "A0-fp32"
precision = "fp32"
evaluation_images = 8
min_agreement = 0.5
margins = { sqnr_db = 0.5 }
"""


def images_of(seeds: Seeds) -> Path:
    """Some images in folders named after the bundle's classes."""
    return seeds.root / "folder" / "images"


def _as_from_images(folder: Path) -> None:
    """A bundle from arrays records no preprocessing and no class names; `evaluate` wants both."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["preprocess"] = {"image_size": [_SIZE, _SIZE], "crop_fraction": 1.0}
    manifest["class_names"] = list(CLASSES)
    path.write_text(json.dumps(manifest, indent=2), "utf-8")
    adapt_checksums(folder)


def _weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(state, folder / "weights.safetensors")
    torch.save({"state_dict": state}, folder / "weights.pth")
    torch.save(state, folder / "old.pth", _use_new_zipfile_serialization=False)


def _pictures(folder: Path, source: Path) -> None:
    folder.mkdir()
    with Image.open(source) as image:
        rgb = image.convert("RGB").resize((40, 40))
    for suffix in ("png", "jpg", "ppm", "bmp", "webp", "tif"):
        rgb.save(folder / f"picture.{suffix}")


def _plan() -> bytes:
    """The header that `inspect` reads, of a plan of this length."""
    plan = bytearray(b"vtrt".ljust(0x400, b"\0"))
    plan[0x10:0x18] = len(plan).to_bytes(8, "little")
    plan[0x18:0x1B] = bytes((1, 7, 1))
    plan[0x20:0x28] = (4).to_bytes(8, "little")
    return bytes(plan)


def _copies(folder: Path, *paths: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        shutil.copyfile(path, folder / path.name)


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(content), "utf-8")


def _bundled() -> BundledWeights:
    bundled = bundled_weights("A0")
    if bundled is None:
        raise SystemExit("this installation has no bundled A0")
    return bundled


def _command(*arguments: str) -> str:
    command = [sys.executable, "-m", "exporter", *arguments, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{arguments[0]} of a file in order failed: {done.stderr}")
    return done.stdout


def adapt_checksums(folder: Path) -> None:
    """Have SHA256SUMS say what the files are: a bundle made wrong by somebody who knows bundles."""
    sums = folder / CHECKSUMS
    sums.unlink(missing_ok=True)
    files = {
        path.name: {"sha256": file_sha256(path)} for path in folder.iterdir() if path.is_file()
    }
    manifest = files.pop(MANIFEST, {"sha256": ""})["sha256"]
    sums.write_text(checksums_text(files, manifest), "utf-8")
