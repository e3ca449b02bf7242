"""What a run that fails a gate leaves beside OUT, and that its error names the layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporter import cli, export, float_graph
from exporter.errors import GateFailedError
from exporter.stages import precision as precision_stage
from models import RepVGG, Variant

LAYER_9 = "stage3.3.conv"
FAILED = {"bundle.failed.html", "bundle.failed.json"}


def flipped(model: onnx.ModelProto) -> onnx.ModelProto:
    """The largest weight of convolution 9 (counted from 0) changes its sign."""
    node = [node for node in model.graph.node if node.op_type == "Conv"][9]
    assert LAYER_9 == node.name
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
    weight = numpy_helper.to_array(tensor).copy()
    weight.flat[np.abs(weight).argmax()] *= -1
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return model


Failed = Callable[..., tuple[GateFailedError, Path]]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network() -> RepVGG:
    """Eleven convolutions of 16 to 64 channels."""
    torch.manual_seed(0)
    width = (0.25, 0.25, 0.25, 0.125)
    return RepVGG(
        Variant(name="tiny", num_blocks=(2, 3, 4, 1), width_multiplier=width), num_classes=6
    ).eval()


@pytest.fixture
def failed(network: RepVGG, tmp_path: Path) -> Failed:
    """Run an export that must fail a gate; its error and the folder around OUT."""
    images = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)

    def run(**options: str | float) -> tuple[GateFailedError, Path]:
        out = tmp_path / "new folder" / "bundle"
        with pytest.raises(GateFailedError) as caught:
            export(
                network,
                example_input=torch.zeros(1, 3, 32, 32),
                evaluation=images,
                targets="sm86",
                out=out,
                **options,
            )
        return caught.value, out.parent

    return run


def test_gates_that_are_asked_for_hold_at_fp32_too(failed: Failed) -> None:
    """The graph that is built is the simplified one."""
    error, _ = failed(precision="fp32", min_sqnr_db=199)
    assert "parity failed at stage simplified: SQNR is " in str(error)
    assert "required 199 dB" in str(error)


def test_a_weight_flipped_between_export_and_simplification_names_its_layer(
    failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the error's sentence, at the top of the report and in the JSON; OUT does not exist."""
    real = float_graph.simplify
    monkeypatch.setattr(float_graph, "simplify", lambda *a: flipped(real(*a)))
    error, folder = failed(precision="fp32")
    assert f"; the first layer that deviates is {LAYER_9}: its own error is " in str(error)
    assert str(error).startswith("parity failed at stage simplified: largest difference is ")
    assert str(error).endswith("; nothing was published")
    assert FAILED == {path.name for path in folder.iterdir()}
    page = (folder / "bundle.failed.html").read_text()
    assert f"First layer that deviates: <code>{LAYER_9}</code>" in page[: page.index("</header>")]
    document = json.loads((folder / "bundle.failed.json").read_text())
    assert (str(error), "simplify") == (document["error"], document["failed_in"])
    assert LAYER_9 == document["parity"]["localization"]["layer"]
    assert folder / "bundle.failed.html" == error.report
    assert error.evidence is not None
    assert LAYER_9 == error.evidence["localization"]["layer"]


def test_a_weight_flipped_in_the_export_names_its_module(
    failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last good stage is the torch network: its modules are what the graph is held against."""
    real = float_graph.export_onnx
    monkeypatch.setattr(float_graph, "export_onnx", lambda *a, **k: flipped(real(*a, **k)))
    error, _ = failed(precision="fp32")
    assert str(error).startswith("parity failed at stage onnx: largest difference is ")
    assert f"; the first layer that deviates is {LAYER_9.removesuffix('.conv')}: " in str(error)
    assert error.evidence is not None
    assert [True] == [
        row["deviates"] for row in error.evidence["localization"]["rows"] if row["sqnr_db"] < 100
    ]


def test_what_simplification_itself_breaks_is_named_too(
    failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxsim's own check comes before the ledger's."""
    from exporter import simplify

    real = simplify._restore_parameters
    monkeypatch.setattr(
        simplify, "_restore_parameters", lambda before, after: (real(before, after), flipped(after))
    )
    error, folder = failed(precision="fp32")
    assert "onnxsim's graph computes something else: logits differs by " in str(error)
    assert f"; the first layer that deviates is {LAYER_9}: " in str(error)
    document = json.loads((folder / "bundle.failed.json").read_text())
    assert ("fail", LAYER_9) == (
        document["parity"]["verdict"], document["parity"]["localization"]["layer"],
    )  # fmt: skip


def test_a_weight_flipped_in_the_half_graph_names_its_layer(
    failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The good graph is the simplified one, whose tensors the half graph has in half."""
    real = precision_stage.to_type
    monkeypatch.setattr(precision_stage, "to_type", lambda kind, model: flipped(real(kind, model)))
    error, _ = failed(precision="fp16", min_sqnr_db=60.0)
    assert f"; the first layer that deviates is {LAYER_9}: " in str(error)


def test_a_gate_that_asks_for_too_much_blames_no_layer(failed: Failed) -> None:
    """Nothing is broken: the errors of all layers add up."""
    error, folder = failed(precision="fp16", min_sqnr_db=150.0)
    assert "; no single layer deviates: the errors of 12 add up, the largest is " in str(error)
    assert "No single layer deviates" in (folder / "bundle.failed.html").read_text()


@pytest.mark.slow
def test_the_command_names_the_report_and_the_next_run_removes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two lines on standard error, the path in the JSON; the good run leaves its bundle alone."""
    out = tmp_path / "bundle"
    arguments = ["engine", "A0", "--precision", "fp16", "--target", "sm86", "--out", str(out)]
    arguments += ["--evaluation-images", "16", "--quiet"]
    assert 1 == cli.main([*arguments, "--min-sqnr", "150", "--json"])
    page = tmp_path / "bundle.failed.html"
    written = capsys.readouterr()
    assert str(page) == json.loads(written.out)["report"]
    lines = written.err.strip().splitlines()
    assert (2, f"the report of the failure: {page}") == (len(lines), lines[-1])
    assert 0 == cli.main(arguments)
    assert ["bundle"] == [path.name for path in tmp_path.iterdir()]


def test_a_report_that_cannot_be_written_changes_nothing_else(
    failed: Failed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the gate's; there is no page and no half-written one."""
    from exporter.stages import failure

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failure, "private_folder", full)
    error, folder = failed(precision="fp16", min_sqnr_db=150.0)
    assert (None, True) == (error.report, "parity failed at stage fp16" in str(error))
    assert not folder.exists() or [] == list(folder.iterdir())
