"""INT8 as a user meets it: the ladder, layers in half, and what is said when it is not enough."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from exporter import Bundle, export
from exporter.errors import GateFailedError, InputError
from models import RepVGG, Variant

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Variant(name="tiny", num_blocks=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))
RUNGS = ["minmax", "percentile", "mse", "entropy", "equalize", "full", "wide"]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(96, 3, 32, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def network(images: np.ndarray) -> RepVGG:
    """A small network whose BatchNorms have seen the images."""
    torch.manual_seed(0)
    module = RepVGG(TINY, num_classes=6)
    with torch.no_grad():
        for _ in range(20):
            module.train()(torch.from_numpy(images[:32]))
    return module.eval()


@pytest.fixture
def exported(network, images, tmp_path):
    """``exported(recipe="auto")`` -> the INT8 bundle of the small network.

    Its engine is left to the device, unless ``targets`` say otherwise.
    """

    def run(**options: object) -> Bundle:
        return export(
            network,
            example_input=torch.zeros(1, 3, 32, 32),
            out=tmp_path / "bundle",
            **{"calibration": images, "min_agreement": 0.0, "targets": "orin", **options},
        )

    return run


def stage(parity: dict, name: str) -> dict:
    return next(row for row in parity["stages"] if row["stage"] == name)


def test_auto_climbs_every_rung_and_publishes_the_best(exported):
    """parity.json has each score; the row of the ledger is that of the chosen rung."""
    bundle = exported(recipe="auto")
    ladder = bundle.parity["ladder"]
    assert RUNGS == [rung["recipe"] for rung in ladder]
    for rung in ladder:
        assert all(rung[key] is not None for key in ("sqnr_db", "cosine", "kl_nats", "seconds"))
    (chosen,) = (rung for rung in ladder if rung["chosen"])
    assert max(rung["sqnr_db"] for rung in ladder) == chosen["sqnr_db"]
    assert chosen["sqnr_db"] == stage(bundle.parity, "int8")["sqnr_db"]
    assert chosen["recipe"] == bundle.manifest["calibration"]["recipe"]
    assert "INT8 recipes, from plain to full" in (bundle.path / "report.html").read_text()


def test_one_recipe_is_a_ladder_of_one_rung(exported):
    """What was picked is what was scored; the Pareto list of its layers is there too."""
    parity = exported(recipe="equalize").parity
    assert ["equalize"] == [rung["recipe"] for rung in parity["ladder"]]
    curve = parity["mixed_precision"]["curve"]
    assert list(range(len(curve))) == [point["kept"] for point in curve]
    assert (1.0, 0.0) == (curve[0]["int8_share"], curve[-1]["int8_share"])
    assert [] == parity["mixed_precision"]["kept"]


def test_min_sqnr_keeps_just_enough_layers_in_half(exported):
    """The published graph passes the gate, and one layer fewer was predicted not to be enough."""
    plain = stage(exported().parity, "int8")["sqnr_db"]
    bundle = exported(min_sqnr_db=plain + 3, targets="sm86")
    mixed = bundle.parity["mixed_precision"]
    assert stage(bundle.parity, "int8")["sqnr_db"] >= plain + 3
    assert 0 < len(mixed["kept"]) < len(mixed["curve"]) - 1
    measured = {point["kept"]: point["sqnr_db"] for point in mixed["curve"] if point["status"]}
    assert all(value < plain + 3 for count, value in measured.items() if count < len(mixed["kept"]))
    stored = {
        tensor.name: tensor.data_type
        for tensor in onnx.load(bundle.path / "model.int8.onnx").graph.initializer
    }
    halves = [name for name, kind in stored.items() if kind == TensorProto.FLOAT16]
    assert len(mixed["kept"]) == sum(name.endswith(".weight.half") for name in halves)
    engine = json.loads((bundle.path / "engine.json").read_text())["convolutions"]
    assert len(mixed["kept"]) == engine["half"]
    assert engine["total"] == engine["half"] + engine["int8"]


def test_a_demand_that_int8_cannot_meet_fails_and_shows_the_curve(exported, tmp_path):
    """Nothing is published; the error carries the ledger with the measured points."""
    with pytest.raises(GateFailedError, match="no choice of layers in half passes") as caught:
        exported(recipe="minmax", min_sqnr_db=150.0)
    evidence = caught.value.evidence
    assert evidence is not None
    assert "fail" == stage(evidence, "int8")["status"]
    points = evidence["mixed_precision"]["curve"]
    assert sum(point["status"] == "fail" for point in points) >= 3
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_max_drop_needs_labels(exported, precision):
    """Arrays have none: the request is refused before anything is made narrower."""
    with pytest.raises(InputError, match="--max-drop needs labels: pass --evaluation with a fold"):
        exported(max_drop=0.2, precision=precision)


def test_a_graph_that_is_no_chain_climbs_the_clip_methods_only(images, tmp_path):
    """A second branch around a block leaves four rungs, and mse as what equalize is refused for."""

    class Skipping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = RepVGG(TINY, num_classes=6)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.body(image) + image.mean(dim=(2, 3)).repeat(1, 2)

    network = Skipping()
    with torch.no_grad():
        for _ in range(5):
            network.train()(torch.from_numpy(images[:32]))
    arguments = {
        "example_input": torch.zeros(1, 3, 32, 32), "calibration": images, "targets": "orin",
        "out": tmp_path / "b", "min_agreement": 0.0,
    }  # fmt: skip
    parity = export(network.eval(), recipe="auto", **arguments).parity
    assert RUNGS[:4] == [rung["recipe"] for rung in parity["ladder"]]
    assert "mixed_precision" not in parity
    kept = export(network, recipe="mse", min_sqnr_db=35.0, **arguments).parity["mixed_precision"]
    assert kept["kept"]
    with pytest.raises(InputError, match="recipe full rescales a chain of convolutions"):
        export(network, recipe="full", **arguments)


def test_the_network_names_the_preprocessing_it_was_not_trained_with(command, tmp_path):
    """The bundled digits with ImageNet's normalization: a note in result, manifest and report."""
    out = tmp_path / "b"
    process = command(
        "engine", "A0", "--preprocess", "imagenet", "--image-size", "64", "--recipe", "minmax",
        "--evaluation-images", "64", "--target", "orin", "--min-agreement", "0", "--min-sqnr", "1",
        "--out", str(out), "--json",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    notes = json.loads(process.stdout)["notes"]
    assert any("BatchNorm" in note for note in notes), notes
    manifest = json.loads((out / "manifest.json").read_text())
    assert notes == manifest["notes"]
    codes = [finding["code"] for finding in manifest["calibration"]["data"]["findings"]]
    assert "wrong-preprocessing" in codes or "unlike-training" in codes
    assert "BatchNorm" in (out / "report.html").read_text()


def test_wide_publishes_a_graph_whose_relu_outputs_use_all_256_integers(exported):
    """A subtraction in front of each quantizer but the image's; every convolution still INT8."""
    bundle = exported(recipe="wide", targets="sm86")
    model = onnx.load(bundle.path / "model.int8.onnx")
    ops = [node.op_type for node in model.graph.node]
    count = ops.count("Conv")
    assert [count - 1] * 2 == [ops.count("Sub"), ops.count("Pad")]
    engine = json.loads((bundle.path / "engine.json").read_text())["convolutions"]
    assert count == engine["int8"]
    tensors = json.loads((bundle.path / "calibration.json").read_text())["tensors"]
    assert ["images"] == [name for name, entry in tensors.items() if not entry["unsigned"]]


@pytest.mark.parametrize("recipe", ["mse", "wide"])
def test_a_calibration_table_makes_the_same_graphs_again(exported, recipe, tmp_path):
    """Bit for bit, layers in half included, without observing or choosing anything anew."""
    first = exported(recipe=recipe, min_sqnr_db=28.0 if recipe == "mse" else 41.0)
    kept = first.parity["mixed_precision"]["kept"]
    table = tmp_path / "t.json"
    table.write_bytes((first.path / "calibration.json").read_bytes())
    graphs = {name: (first.path / name).read_bytes() for name in ("model.onnx", "model.int8.onnx")}
    again = exported(calibration_table=str(table))
    assert graphs == {name: (again.path / name).read_bytes() for name in graphs}
    assert table.read_bytes() == (again.path / "calibration.json").read_bytes()
    assert sorted(kept) == json.loads(table.read_text())["options"]["keep_half"]


def test_a_calibration_table_of_something_else_is_refused(exported, tmp_path, images):
    """Each thing that it is bound to is named; a file that is none is one sentence."""
    bundle = exported(recipe="minmax")
    table = tmp_path / "t.json"
    table.write_bytes((bundle.path / "calibration.json").read_bytes())
    with pytest.raises(
        InputError, match=r"made for something else: the recipe .the table's is minm"
    ):
        exported(calibration_table=str(table), recipe="full")
    with pytest.raises(InputError, match="something else: the calibration images differs"):
        exported(calibration_table=str(table), calibration=images[:64])
    with pytest.raises(InputError, match="per tensor weights differs"):
        exported(calibration_table=str(table), per_tensor_weights=True)
    document = json.loads(table.read_text())
    lost = document["tensors"].popitem()
    table.write_text(json.dumps(document))
    with pytest.raises(InputError, match=f"table does not fit the network: '{lost[0]}'"):
        exported(calibration_table=str(table))
    document["source_sha256"] = "0" * 64
    table.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"the network .or how it was exported. differs; leave"):
        exported(calibration_table=str(table))
    table.write_text("{}")
    with pytest.raises(InputError, match=r"calibration table .* cannot be used: calibration table"):
        exported(calibration_table=str(table))


@pytest.mark.slow
def test_the_command_shows_the_ladder_and_the_curve(command, tmp_path):
    """`--recipe auto` prints every rung; `--min-sqnr` beyond reach exits 1 with the curve."""
    arguments = ("engine", "A0", "--target", "sm86", "--out", str(tmp_path / "b"))
    process = command(*arguments, "--recipe", "auto")
    assert process.returncode == 0, process.stderr
    assert all(recipe in process.stdout for recipe in RUNGS)
    assert "KL, nats" in process.stdout
    process = command(*arguments, "--recipe", "mse", "--min-sqnr", "80", "--max-drop", "0.2")
    assert 1 == process.returncode
    assert "Layers in half" in process.stdout
    assert 1 == len(process.stderr.strip().splitlines()[-1:])
    assert "no choice of layers in half passes either: use --precision fp16" in process.stderr


def test_the_folder_of_a_failed_run_holds_nothing(command, tmp_path):
    """Max drop with unlabelled evaluation images is bad input: exit 2, no trace."""
    flat = tmp_path / "flat"
    flat.mkdir()
    from models.registry import bundled_weights

    for path in sorted(bundled_weights("A0").test_images.rglob("*.png"))[:8]:
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    out: Path = tmp_path / "b"
    process = command(
        "engine", "A0", "--max-drop", "1", "--evaluation", str(flat), "--out", str(out), "--quiet"
    )
    assert (2, "") == (process.returncode, process.stdout)
    assert "--max-drop needs labels" in process.stderr
    assert not out.exists()
