"""INT8 where the builder computes it in half: what is built, what is said, what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from exporter.bundle import Bundle
from exporter.cli import main
from exporter.running.onnx_runner import OnnxRunner

FAST = (
    "--weights", "random", "--image-size", "32", "--calib-images", "16", "--evaluation-images", "8",
    "--quiet",
)  # fmt: skip
ALONE = (
    "repvgg-export: sm75 computes int8 in half and needs a graph and a plan of its own, without "
    "{}: export sm75 to another bundle (--out)\n"
)


@pytest.fixture(scope="module")
def emulated(command, tmp_path_factory):
    """A0 for a Tesla T4, with one layer that stays float in INT8."""
    out = tmp_path_factory.mktemp("emulated") / "bundle"
    process = command(
        "engine", "A0", *FAST, "--target", "t4", "--allow-emulated", "--keep-float", "stage0.conv",
        "--out", str(out),
    )  # fmt: skip
    assert 0 == process.returncode, process.stderr
    return out, process


def test_the_engine_is_half_and_says_so(emulated):
    """engine.json counts what runs, not what was asked for; the warning is on the screen too."""
    out, process = emulated
    engine = json.loads((out / "engine.json").read_text())
    counts = {"total": 22, "int8": 0, "half": 22, "float": 0, "bf16": 0, "fp8": 0}
    assert counts == engine["convolutions"]
    assert ["sm75"] == engine["targets"]
    sentence = (
        "21 of 21 quantized convolutions do not run in INT8, so INT8 saves no time in them: "
        "measure on the device whether fp16 is faster"
    )
    assert sentence in engine["warnings"]
    assert f"warning: {sentence}" in process.stdout.replace("\n", " ")


def test_the_published_graph_is_the_one_that_was_built(emulated):
    """Half scales on every quantizer, scalar for activations; the manifest says it."""
    out, _ = emulated
    graph = onnx.load(out / "model.int8.onnx").graph
    types = {t.name: (t.data_type, len(t.dims)) for t in graph.initializer}
    quantizers = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert {(TensorProto.FLOAT16, 0)} == {types[node.input[1]] for node in quantizers}
    assert 21 == len(quantizers)
    assert TensorProto.FLOAT not in {kind for kind, _ in types.values()}
    assert Bundle.load(out).has_half_scales


def test_the_ledger_judges_the_half_graph_without_optimizations(emulated):
    """Its row is what that graph computes; `run` of the bundle computes the same."""
    out, _ = emulated
    bundle = Bundle.load(out)
    images, _ = bundle.reference()
    np.testing.assert_array_equal(
        OnnxRunner(bundle.graph_path, optimize=False)(images), bundle.run(images)
    )
    rows = [row["stage"] for row in bundle.parity["stages"]]
    assert ["reparameterized", "onnx", "simplified", "int8", "engine"] == rows
    assert "pass" == bundle.parity["stages"][3]["status"]


def test_the_bundle_verifies_plans_and_builds_again(emulated, tmp_path, capsys):
    """`verify`, `plan` and `build --target sm75` know what graph they have."""
    out = shutil.copytree(emulated[0], tmp_path / "bundle")
    assert 0 == main(["verify", str(out), "--quiet"])
    assert 0 == main(["plan", str(out), "--json"])
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ["sm75"] == plan["engine"]["build_here"]
    assert 0 == main(["build", str(out), "--target", "sm75", "--quiet", "--json"])
    assert 22 == json.loads(capsys.readouterr().out)["engine"]["convolutions"]["half"]


@pytest.mark.parametrize(
    ("target", "others"),
    [("sm75,sm86", "sm86"), ("t4,rtx5090,rtx3060", "sm86, sm120"), ("t4,orin", "sm87")],
)
def test_turing_is_not_mixed_with_others(tmp_path, capsys, target, others):
    """One plan would cost them their INT8; exit code 2 for `engine` and `plan`, nothing made."""
    out = tmp_path / "bundle"
    given = ("A0", "--target", target, "--allow-emulated", "--out", str(out))
    for name in ("engine", "plan"):
        assert 2 == main([name, *given, "--quiet"])
        assert ALONE.format(others) == capsys.readouterr().err
    assert [] == list(tmp_path.iterdir())


def test_a_bundle_with_float_scales_is_not_built_for_turing(emulated, tmp_path, capsys):
    """The device half writes no graphs; the sentence says how to get one; `plan` says it too."""
    out = tmp_path / "bundle"
    shutil.copytree(emulated[0], out)
    manifest = json.loads((out / "manifest.json").read_text())
    # What the manifest of an export for another target says.
    (out / "manifest.json").write_text(json.dumps({**manifest, "half_scales": False}))
    sentence = (
        "repvgg-export: sm75 computes int8 in half, which needs a graph with half scales, and "
        f"bundle {out} has float ones: export again with --target sm75 --allow-emulated\n"
    )
    for words in (["build", str(out), "--allow-emulated", "--quiet"], ["plan", str(out)]):
        assert 2 == main([*words, "--target", "sm75"])
        assert sentence == capsys.readouterr().err


def test_a_plan_of_turing_foretells_the_bundle(emulated, capsys):
    """Stages, files and sizes; the lines of TensorRT that reads opset 19."""
    out, _ = emulated
    given = ("--image-size", "32", "--classes", "1000", "--weights", "random")
    assert 0 == main(["plan", "A0", "--target", "t4", "--allow-emulated", *given, "--json"])
    plan = json.loads(capsys.readouterr().out)
    stages = [row["stage"] for row in plan["stages"]]
    assert ["quantize", "half", "evidence", "engine"] == stages[5:9]
    for file in plan["files"]:
        if file["bytes"] and file["name"] != "reference.npz":
            tolerance = 0.2 if file["name"] == "model.engine" else 0.02
            actual = (out / file["name"]).stat().st_size
            assert actual == pytest.approx(file["bytes"], rel=tolerance), file["name"]
    libraries = [command["library"] for command in plan["commands"]]
    assert ["TensorRT-RTX", "TensorRT 11.4", "TensorRT 10.13"] == libraries
    assert [w for w in plan["warnings"] if w.startswith("t4 (sm75) at int8: TensorRT-RTX runs")]
