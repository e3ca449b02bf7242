"""Single layers of a graph computed in half, with casts only where data types meet."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from exporter.errors import GateFailedError
from exporter.parity.comparison import compare
from exporter.quantization.half_nodes import in_half
from exporter.running.onnx_runner import OnnxRunner

PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[batch,3,8,8] images) => (float[batch,4] logits) {
    ["conv0"] x0 = Conv <pads = [1,1,1,1]> (images, w0, b0)
    ["relu0"] y0 = Relu (x0)
    ["conv1"] x1 = Conv <pads = [1,1,1,1]> (y0, w1, b1)
    ["relu1"] y1 = Relu (x1)
    ["conv2"] x2 = Conv <pads = [1,1,1,1]> (y1, w1, b1)
    ["relu2"] y2 = Relu (x2)
    ["pool"] p = GlobalAveragePool (y2)
    ["flatten"] f = Flatten (p)
    ["linear"] logits = Gemm <transB = 1> (f, w3, b3)
}
"""
SHAPES = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "b1": (8,), "w3": (4, 8), "b3": (4,)}
LAYERS = ("conv0", "conv1", "conv2", "linear")


def graph(**replaced: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(PLAIN)
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = replaced.get(name, 0.3 * generator.standard_normal(shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


@given(st.sets(st.sampled_from(LAYERS)))
def test_exactly_the_named_layers_are_half(names: set[str]) -> None:
    """Their results are half, the others' float; inputs and outputs keep their type."""
    model = in_half(graph(), names)
    found = types(model)
    for node in model.graph.node:
        if node.name in LAYERS:
            wanted = TensorProto.FLOAT16 if node.name in names else TensorProto.FLOAT
            assert wanted == found[node.output[0]], node.name
    assert TensorProto.FLOAT == found["images"] == found["logits"]


@given(st.sets(st.sampled_from(LAYERS)))
def test_half_layers_compute_the_same_up_to_halfs_rounding(names: set[str]) -> None:
    """At least 55 dB against the float graph, and exactly it where nothing is half."""
    images = np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32)
    expected = OnnxRunner(graph())(images)
    found = compare(expected, OnnxRunner(in_half(graph(), names))(images))
    assert found.sqnr_db >= (55 if names else 200)


def test_neighbours_in_half_pass_half_on() -> None:
    """Two layers with the ReLU between them need two casts, not four."""
    ops = [node.op_type for node in in_half(graph(), ("conv1", "conv2")).graph.node]
    expected = [
        "Conv", "Relu", "Cast", "Conv", "Relu", "Conv", "Relu", "Cast",
        "GlobalAveragePool", "Flatten", "Gemm",
    ]  # fmt: skip
    assert expected == ops


def test_a_weight_that_two_layers_share_is_stored_in_both_types() -> None:
    """conv1 in half reads w1.half, conv2 still reads w1; the input graph is untouched."""
    model = graph()
    before = model.SerializeToString()
    stored = {
        tensor.name: tensor.data_type for tensor in in_half(model, ("conv1",)).graph.initializer
    }
    assert (TensorProto.FLOAT, TensorProto.FLOAT16) == (stored["w1"], stored["w1.half"])
    assert "w0.half" not in stored
    assert before == model.SerializeToString()


def test_a_weight_beyond_halfs_range_is_refused() -> None:
    """65504 is the largest half number."""
    with pytest.raises(GateFailedError, match=r"half overflow in w0\.half: its values reach 70000"):
        in_half(graph(w0=np.full((8, 3, 3, 3), 70000.0)), ("conv0",))
