"""Graphs say what they are in their own documentation, and compute what they computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from calibration.table import CalibrationTable, TensorRange
from exporter.graph.annotation import Description, annotate, annotate_precision
from exporter.quantize import quantize
from exporter.running.onnx_runner import OnnxRunner

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[n, 4, 6, 6] images) => (float[n, 3] logits) {
  y = Conv <pads = [1, 1, 1, 1], strides = [2, 2], group = 2>
    (images, stage0_weight, stage0_bias)
  z = Relu (y)
  p = GlobalAveragePool (z)
  f = Flatten (p)
  logits = Gemm <transB = 1> (f, linear_weight, linear_bias)
}
"""
DESCRIPTION = Description(
    title="RepVGG-T", metadata={"variant": "T"}, blocks={"stage0_weight": "stage0"}
)


@pytest.fixture
def model() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(GRAPH)
    names = ("stage0.conv", "stage0.relu", "head.pool", "head.flatten", "linear")
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    shapes = {
        "stage0_weight": (6, 2, 3, 3), "stage0_bias": (6,),
        "linear_weight": (3, 6), "linear_bias": (3,),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


@pytest.fixture
def table() -> CalibrationTable:
    sha = "0" * 64
    found = TensorRange(minimum=-1.5, maximum=2.0, threshold=1.27)
    return CalibrationTable(
        method="full",
        activation_scales={"images": 0.0078125, "f": 0.015625},
        ranges={"images": found, "f": found},
        onnx_sha256=sha,
        data_sha256="1" * 64,
        image_count=9,
        preprocess={},
    )


def _words(model: onnx.ModelProto) -> dict[str, str]:
    return {node.name: node.doc_string for node in model.graph.node}


def test_every_layer_of_the_float_graph_is_described(model):
    """Kernel, channels, stride, groups, and the block whose branches are in it."""
    told = annotate(model, DESCRIPTION)
    assert {
        "stage0.conv": "3x3 convolution, 4 -> 6 channels, stride 2, 2 groups; all branches of "
        "block stage0 in one kernel",
        "stage0.relu": "",
        "head.pool": "average of each channel over height and width",
        "head.flatten": "from [batch, channels, 1, 1] to [batch, channels]",
        "linear": "fully connected, 6 -> 3",
    } == _words(told)
    assert "RepVGG-T, deploy form: 1 convolutions, 1 of them fused RepVGG blocks" == (
        told.graph.doc_string
    )
    assert ("RepVGG-T", "repvgg-exporter") == (told.graph.name, told.producer_name)
    assert {"variant": "T"} == {entry.key: entry.value for entry in told.metadata_props}


def test_a_quantized_graph_says_its_ranges_and_where_they_come_from(model, table):
    """Scale and clip of each activation, scales of each weight, recipe and data of the table."""
    graph = quantize(annotate(model, DESCRIPTION), table)
    told = annotate_precision(graph, "int8", table=table, kept=("linear",))
    words = _words(told)
    assert "scale 0.0078125; observed -1.5 to 2, clipped at 1.27" == words["images.q"]
    assert words["stage0_weight.dq"].startswith("weight of 8 bits, 6 scales, one a channel: ")
    assert "fully connected, 6 -> 3; not quantized" == words["linear"]
    assert told.graph.doc_string.endswith("; int8")
    assert {
        "variant": "T", "precision": "int8", "recipe": "full",
        "calibration_sha256": "1" * 64, "calibration_images": "9",
    } == {entry.key: entry.value for entry in told.metadata_props}  # fmt: skip


def test_words_change_neither_results_nor_the_graph_they_were_made_of(model, table):
    """Both graphs compute bit for bit what they did, and the originals are left alone."""
    before = model.SerializeToString()
    images = np.random.default_rng(1).normal(size=(2, 4, 6, 6)).astype(np.float32)
    told = annotate(model, DESCRIPTION)
    graph = quantize(told, table)
    final = annotate_precision(graph, "int8", table=table)
    for plain, annotated in ((model, told), (graph, final)):
        expected = OnnxRunner(plain).run((images,))["logits"]
        np.testing.assert_array_equal(expected, OnnxRunner(annotated).run((images,))["logits"])
        onnx.checker.check_model(annotated)
    assert before == model.SerializeToString()


@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
    groups=st.integers(1, 4),
)
def test_any_convolution_has_a_sentence(kernel, stride, dilation, groups):
    """What is 1 everywhere is left out; all else is said."""
    weight = numpy_helper.from_array(np.zeros((2 * groups, 3, *kernel), np.float32), "w")
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], name="c", group=groups,
        strides=[stride, stride], dilations=[dilation, 1],
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("x", 1, None)], [value("y", 1, None)], initializer=[weight]
    )
    told = annotate(helper.make_model(graph), replace(DESCRIPTION, blocks={}))
    words = told.graph.node[0].doc_string
    assert words.startswith(f"{kernel[0]}x{kernel[1]} convolution, {3 * groups} -> {2 * groups} ")
    assert (stride > 1) == (f", stride {stride}" in words)
    assert (dilation > 1) == (f", dilation {dilation}x1" in words)
    assert (groups > 1) == (f", {groups} groups" in words)
