"""All 256 integers behind a ReLU: the same convolution, through a shift and its bias."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from calibration.table import CalibrationTable, TensorRange
from exporter.quantization.full_range import use_full_range
from exporter.quantize import quantize
from exporter.running.onnx_runner import OnnxRunner

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[batch,3,9,7] images) => (float[batch,O,H,W] out) {
    ["conv0"] x0 = Conv <pads = [1,1,1,1]> (images, w0, b0)
    ["relu0"] y0 = Relu (x0)
    ["conv1"] out = Conv <pads = [PADS], strides = [STRIDE,STRIDE], group = GROUPS> (y0, w1BIAS)
}
"""


def graph(pads: str, stride: int, groups: int, *, bias: bool = True) -> onnx.ModelProto:
    text = GRAPH.replace("PADS", pads).replace("STRIDE", str(stride))
    text = text.replace("GROUPS", str(groups)).replace("BIAS", ", b1" if bias else "")
    model = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (6, 8 // groups, 3, 3), "b1": (6,)}
    for name, shape in shapes.items():
        if name != "b1" or bias:
            array = (0.3 * generator.standard_normal(shape)).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def table(step: float) -> CalibrationTable:
    scales = {"images": float(np.float32(0.03)), "y0": float(np.float32(step))}
    return CalibrationTable(
        method="wide",
        activation_scales=scales,
        ranges={
            name: TensorRange(minimum=0.0, maximum=255 * scale, threshold=255 * scale)
            for name, scale in scales.items()
        },
        unsigned=frozenset({"y0"}),
        onnx_sha256="0" * 64,
        data_sha256="0" * 64,
        image_count=1,
        preprocess={},
    )


def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, 3, 9, 7)).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["1,1,1,1", "0,0,0,0", "2,1,0,1"]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.floats(0.004, 0.05),
)
def test_it_is_the_convolution_of_unsigned_integers(pads, stride, groups, bias, step):
    """Equal to W^ * (D clip(round(x / D), 0, 255)) + b, border included, up to float rounding."""
    model, scales = graph(pads, stride, groups, bias=bias), table(step)
    found = OnnxRunner(use_full_range(quantize(model, scales), ("y0",)))(images())
    # The same arithmetic with the integers of y0 written as a float graph of its own.
    middle = onnx.ModelProto()
    middle.CopyFrom(quantize(model, scales, keep_float=("conv1",)))
    del middle.graph.node[-1], middle.graph.output[:]
    middle.graph.output.append(onnx.helper.make_tensor_value_info("y0", 1, None))
    y = OnnxRunner(middle)(images())
    rounded = np.float32(step) * np.clip(np.rint(y / np.float32(step)), 0, 255)
    weight = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w1"))
    scale = np.abs(weight).max(axis=(1, 2, 3)) / np.float32(127)
    integers = np.rint(weight / scale[:, None, None, None])
    last = onnx.ModelProto()
    last.CopyFrom(model)
    del last.graph.node[:2], last.graph.input[:]
    last.graph.input.append(onnx.helper.make_tensor_value_info("y0", 1, [None, 8, 9, 7]))
    for tensor in last.graph.initializer:
        if tensor.name == "w1":
            exact = (integers * scale[:, None, None, None]).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(exact, "w1"))
    expected = OnnxRunner(last)(rounded.astype(np.float32))
    np.testing.assert_allclose(expected, found, atol=2e-5 * np.abs(expected).max())


def test_padding_moves_in_front_of_the_shift():
    """Pad with zeros, Sub, Q, DQ, and a convolution without padding; scales stay scalars."""
    model = use_full_range(quantize(graph("1,1,1,1", 1, 1), table(0.01)), ("y0",))
    ops = [node.op_type for node in model.graph.node]
    expected = ["Pad", "Sub", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv"]
    assert expected == ops[-6:]
    assert "pads" not in [attribute.name for attribute in model.graph.node[-1].attribute]
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert np.float32(128) * stored["y0.scale"] == stored["y0.shift"]
    assert () == stored["y0.shift"].shape == stored["y0.scale"].shape


def test_nothing_to_widen_is_the_same_graph():
    """Without tensors the graph is returned as it is."""
    model = quantize(graph("1,1,1,1", 1, 1), table(0.01))
    assert model is use_full_range(model, ())


def test_a_tensor_with_two_quantized_readers_is_refused():
    """Each would need the other's padding."""
    model = graph("1,1,1,1", 1, 1)
    second = onnx.helper.make_node("Conv", ["y0", "w1", "b1"], ["more"], name="conv2")
    model.graph.node.append(second)
    model.graph.output.append(onnx.helper.make_tensor_value_info("more", 1, ["batch", 6, 9, 7]))
    with pytest.raises(ValueError, match=r"y0\.dequantized has 2 readers"):
        use_full_range(quantize(model, table(0.01)), ("y0",))
