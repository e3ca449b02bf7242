"""Networks that come with INT8 scales: what the command makes of them, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from exporter.cli import main
from models.checkpoint import load_checkpoint
from models.fusion import reparameterize
from models.registry import bundled_weights


@pytest.fixture(scope="module")
def graph(bundles) -> Path:
    """A Q/DQ graph of the bundled A0, 22 convolutions with scales, the classifier float."""
    return bundles("int8")[0] / "model.int8.onnx"


def integers(path: Path) -> dict[str, np.ndarray]:
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    return {name: values for name, values in found.items() if values.dtype == np.int8}


def test_a_graph_keeps_its_integers_and_scales(command, graph, tmp_path):
    """Imported and exported again: integers, scales and the function are the same bit for bit."""
    out = tmp_path / "b"
    process = command(
        "engine", "A0", "--weights", str(graph), "--target", "sm86", "--image-size", "64",
        "--preprocess", str(graph.parent / "manifest.json"), "--out", str(out), "--json",
        "--evaluation", str(bundled_weights("A0").test_images), "--evaluation-images", "64",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    rows = {row["stage"]: row for row in result["parity"]["stages"]}
    assert 200 == rows["int8"]["sqnr_db"]
    assert "original without its quantizers" == rows["simplified"]["reference"]
    assert "not_run" == rows["reparameterized"]["status"]
    assert 22 == result["engine"]["convolutions"]["int8"]
    before, after = integers(graph), integers(out / "model.int8.onnx")
    weights = [name for name in before if name.endswith(".weight.int8")]
    assert 22 == len(weights)
    assert all(np.array_equal(before[name], after[name]) for name in weights)
    table = json.loads((out / "calibration.json").read_text())
    given = json.loads((graph.parent / "calibration.json").read_text())
    assert ("imported", 0) == (table["method"], table["image_count"])
    scales = [
        sorted(entry["scale"] for entry in found["tensors"].values()) for found in (table, given)
    ]
    assert scales[0] == scales[1]
    assert 0 == main(["verify", str(out), "--quiet"])


def test_a_checkpoint_with_ranges_brings_its_scales(command, tmp_path):
    """`_amax` beside each weight, as quantizers of training store it: scale = amax / 127."""
    bundled = bundled_weights("A0")
    fused = reparameterize(load_checkpoint(bundled.checkpoint).module)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in fused.state_dict().items():
        key = name.replace(".conv.", ".rbr_reparam.")
        state[key] = tensor.clone()
        if key.endswith("rbr_reparam.weight"):
            layer = key.removesuffix("weight")
            state[f"{layer}_weight_quantizer._amax"] = tensor.abs().amax((1, 2, 3), keepdim=True)
            state[f"{layer}_input_quantizer._amax"] = torch.tensor(4.0)
    save_file(state, tmp_path / "qat.safetensors")
    out = tmp_path / "b"
    process = command(
        "engine", "A0", "--weights", str(tmp_path / "qat.safetensors"), "--target", "sm86",
        "--preprocess", str(_preprocess(tmp_path)), "--out", str(out), "--json",
        "--evaluation", str(bundled.test_images), "--evaluation-images", "64",
        "--min-sqnr", "5", "--min-agreement", "0",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    table = json.loads((out / "calibration.json").read_text())
    scales = {entry["scale"] for entry in table["tensors"].values()}
    assert {float(np.float32(4.0) / np.float32(127))} == scales
    assert 22 == json.loads(process.stdout)["engine"]["convolutions"]["int8"]


def _preprocess(folder: Path) -> Path:
    path = folder / "preprocess.json"
    path.write_text(json.dumps(dict(bundled_weights("A0").preprocess)))
    return path


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--precision", "fp16"), "is a graph with INT8 scales: use --precision int8"),
        (("--recipe", "full"), "carries its scales, which are respected: leave --recipe"),
        (("--image-size", "96"), "was exported for images of"),
    ],
)
def test_what_contradicts_the_scales_is_refused(capsys, graph, tmp_path, options, sentence):
    """Exit 2, one sentence, nothing under OUT."""
    given = ("engine", "A0", "--weights", str(graph), "--out", str(tmp_path / "b"), "--quiet")
    assert 2 == main([*given, *options])
    refusal = capsys.readouterr().err
    assert sentence in refusal
    assert 1 == refusal.count("\n")
    assert not (tmp_path / "b").exists()


def test_a_float_graph_is_refused(command, bundles, tmp_path):
    """There are no scales to respect; the sentence says what to pass instead."""
    model = bundles("int8")[0] / "model.onnx"
    process = command("engine", "A0", "--weights", str(model), "--out", str(tmp_path / "b"))
    assert 2 == process.returncode
    assert "this ONNX carries no scales; pass the checkpoint instead" in process.stderr
    assert not (tmp_path / "b").exists()
