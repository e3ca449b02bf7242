"""`inspect` and `convert` as a user runs them: exit codes, JSON, and what is imported."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exporter.bundle.writer import BundleWriter
from models.registry import bundled_weights

A0 = str(bundled_weights("A0").checkpoint)
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt_rtx")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One small file of each kind that needs no torch."""
    folder = tmp_path_factory.mktemp("files")
    plan = bytearray(64)
    plan[:4] = b"vtrt"
    struct.pack_into("<Q", plan, 0x10, len(plan))
    (folder / "model.engine").write_bytes(plan)
    (folder / "calibration.cache").write_text("TRT-100300-EntropyCalibration2\nx: 3ca94044\n")
    with BundleWriter(folder / "bundle") as writer:
        writer.write_text("parity.json", '{"verdict": "pass", "stages": []}')
        writer.publish({"spec": {"precision": "fp16"}})
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["inspect", "convert"])
def test_help_needs_no_heavy_library(name):
    """--help of both commands answers with all of them made unimportable."""
    program = (
        f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
        f"from exporter.cli import main\nmain([{name!r}, '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (0, "") == (done.returncode, done.stderr)


def test_inspect_prints_tables(command):
    """The variant, the outlook of each block, exit 0."""
    process = command("inspect", A0)
    assert (0, "") == (process.returncode, process.stderr)
    footnote = "the outlook is for plain rounding; --recipe full, the default, is made for this"
    for text in ("variant", "A0", "outlook", "stage3.13", "trouble", footnote):
        assert text in process.stdout


def test_inspect_prints_one_json_object(command):
    """With the names of the contract."""
    process = command("inspect", A0, "--json")
    assert 0 == process.returncode, process.stderr
    document = json.loads(process.stdout)
    contract = ("kind", "format", "form", "variant", "num_classes", "nan_count")
    assert ["checkpoint", "official", "train", "A0", 10, 0] == [document[key] for key in contract]
    assert 22 == len(document["layers"])


def test_an_unknown_network_exits_0(command, tmp_path):
    """It is described as far as it goes."""
    torch.save({"conv1.weight": torch.ones(2, 2)}, tmp_path / "w.pth")
    process = command("inspect", str(tmp_path / "w.pth"), "--json")
    assert 0 == process.returncode, process.stderr
    document = json.loads(process.stdout)
    assert ("checkpoint", "unknown", None) == (
        document["kind"],
        document["format"],
        document["variant"],
    )
    assert "fits no RepVGG variant" in document["notes"][0]


@pytest.mark.parametrize("content", [b"", b"these are not weights\n" * 9, b"vtrt"])
def test_an_unreadable_file_exits_2_with_one_line(command, tmp_path, content):
    """The file is named, nothing is printed to standard output."""
    (tmp_path / "file").write_bytes(content)
    process = command("inspect", str(tmp_path / "file"))
    assert (2, "", 1) == (process.returncode, process.stdout, process.stderr.count("\n"))
    assert str(tmp_path / "file") in process.stderr


@pytest.mark.parametrize("name", ["model.engine", "calibration.cache", "bundle"])
def test_engines_caches_and_bundles_need_no_heavy_library(files, name):
    """Inspecting them works with torch, onnx and the rest made unimportable."""
    program = (
        f"import sys\nfor name in {HEAVY}: sys.modules[name] = None\n"
        "from exporter.cli import main\n"
        f"sys.exit(main(['inspect', {str(files[name])!r}, '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, done.stderr
    assert json.loads(done.stdout)["kind"] in ("engine", "calibration cache", "bundle")


def test_a_checkpoint_without_torch_exits_3(tmp_path):
    """What has to be installed is said."""
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom exporter.cli import main\n"
        f"sys.exit(main(['inspect', {A0!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert 3 == done.returncode, done.stderr
    assert "not installed: torch; pip install 'repvgg-exporter[export]'" in done.stderr


def test_convert_writes_the_other_names_and_goes_one_way(command, tmp_path):
    """Exit 0 and one line; from deploy to train form exit 2, one line and no file."""
    deploy, train = tmp_path / "deploy.safetensors", tmp_path / "train.safetensors"
    process = command("convert", A0, str(deploy), "--to", "timm", "--form", "deploy")
    assert (0, "") == (process.returncode, process.stderr)
    line = f"{deploy}: RepVGG-A0, 46 tensors, official train -> timm deploy\n"
    assert line == process.stdout
    process = command("convert", str(deploy), str(train), "--form", "train", "--json")
    assert (2, 1) == (process.returncode, process.stderr.count("\n"))
    assert "cannot be taken apart" in json.loads(process.stdout)["error"]
    assert [deploy] == list(tmp_path.iterdir())
