"""ONNX Runtime behind one small class."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporter.errors import EnvironmentLackError, GateFailedError
from exporter.graph import with_outputs
from exporter.running.onnx_runner import BATCH_SIZE, OnnxRunner

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[batch,2,3,3] images) => (float[batch,2] logits) {
    y = Relu (images)
    p = GlobalAveragePool (y)
    logits = Flatten (p)
}
"""


def graph() -> onnx.ModelProto:
    return onnx.parser.parse_model(GRAPH)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 2, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("count", [1, BATCH_SIZE, BATCH_SIZE + 1, 3 * BATCH_SIZE + 5])
@pytest.mark.parametrize("optimize", [True, False])
def test_running_in_chunks_equals_one_run(count: int, optimize: bool) -> None:
    """Long inputs are cut into chunks; the answer is that of all images at once, in order."""
    runner = OnnxRunner(graph(), optimize=optimize)
    whole = runner.run((images(count),))["logits"]
    expected = np.maximum(images(count), 0).mean(axis=(2, 3))
    np.testing.assert_allclose(expected, whole, atol=1e-6)
    np.testing.assert_array_equal(whole, runner(images(count)))


def test_a_file_and_a_graph_in_memory_are_the_same(tmp_path: Path) -> None:
    """A path is read from disk."""
    onnx.save(graph(), tmp_path / "model.onnx")
    expected = OnnxRunner(graph())(images(3))
    np.testing.assert_array_equal(expected, OnnxRunner(tmp_path / "model.onnx")(images(3)))


def test_inner_tensors_can_be_asked_for() -> None:
    """with_outputs exposes tensors by name, and the original graph keeps its own outputs."""
    model = graph()
    runner = OnnxRunner(with_outputs(model, ["y", "p"]))
    assert (["y", "p"], ["images"]) == (runner.output_names, runner.input_names)
    values = runner.run((images(2),))
    np.testing.assert_array_equal(np.maximum(images(2), 0), values["y"])
    assert (2, 2, 1, 1) == values["p"].shape
    assert graph() == model


def test_a_broken_graph_is_refused() -> None:
    """What ONNX Runtime cannot load is a failed gate in one line."""
    model = graph()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(GateFailedError, match=r"ONNX Runtime refuses the graph: .+") as caught:
        OnnxRunner(model)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The error names the file."""
    with pytest.raises(GateFailedError, match=r"ONNX Runtime refuses the graph: .*absent\.onnx"):
        OnnxRunner(tmp_path / "absent.onnx")


def test_input_of_another_shape_is_an_error_of_ours() -> None:
    """ONNX Runtime's own exceptions do not reach the caller."""
    with pytest.raises(GateFailedError, match=r"ONNX Runtime cannot run the graph: .*dimensions"):
        OnnxRunner(graph())(np.zeros((1, 3, 3, 3), np.float32))


def test_without_onnxruntime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing library is an environment error that says how to get it."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    expected = r"^onnxruntime is not installed; pip install .*'repvgg-exporter\[export\]'$"
    with pytest.raises(EnvironmentLackError, match=expected):
        OnnxRunner(graph())
