"""Half graphs: strongly typed, float at both ends, refused where half cannot hold the values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.errors import GateFailedError
from exporter.parity.comparison import compare
from exporter.precision import (
    BFLOAT16,
    HALF,
    HALF_MAX,
    largest_magnitudes,
    require_half_range,
    to_type,
)
from exporter.running.emulation import emulated
from exporter.running.onnx_runner import OnnxRunner

PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[batch,3,8,8] images) => (float[batch,4] logits) {
    ["stage0.conv"] x0 = Conv <pads = [1,1,1,1], strides = [2,2]> (images, w0, b0)
    ["stage0.relu"] y0 = Relu (x0)
    ["stage1.conv"] x1 = Conv <pads = [1,1,1,1]> (y0, w1, b1)
    ["stage1.relu"] y1 = Relu (x1)
    ["head.pool"] p = GlobalAveragePool (y1)
    ["head.flatten"] f = Flatten (p)
    ["linear"] logits = Gemm <transB = 1> (f, w2, b2)
}
"""
SHAPES = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "b1": (8,), "w2": (4, 8), "b2": (4,)}


def graph(**replaced: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(PLAIN)
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = 0.3 * generator.standard_normal(shape)
        array = replaced.get(name, array).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model


def images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


def test_all_parameters_are_half_and_the_interface_is_float() -> None:
    """Every initializer is FLOAT16; input and output keep their names and float32."""
    half = to_type(HALF, graph())
    assert {TensorProto.FLOAT16} == {tensor.data_type for tensor in half.graph.initializer}
    assert list(graph().graph.input) == list(half.graph.input)
    assert list(graph().graph.output) == list(half.graph.output)
    onnx.checker.check_model(half, full_check=True)


def test_there_is_one_cast_at_each_end() -> None:
    """Two Casts are added, to half behind the input and to float before the output."""
    nodes = list(to_type(HALF, graph()).graph.node)
    assert ["Cast", *(n.op_type for n in graph().graph.node), "Cast"] == [n.op_type for n in nodes]
    targets = [onnx.helper.get_attribute_value(n.attribute[0]) for n in (nodes[0], nodes[-1])]
    assert [TensorProto.FLOAT16, TensorProto.FLOAT] == targets
    assert (["images"], ["logits"]) == (list(nodes[0].input), list(nodes[-1].output))


def test_every_tensor_between_the_casts_is_half() -> None:
    """Shape inference finds no float32 tensor inside the graph."""
    inferred = onnx.shape_inference.infer_shapes(to_type(HALF, graph()), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert 8 == len(types)
    assert {TensorProto.FLOAT16} == set(types.values())


def test_half_computes_nearly_the_same() -> None:
    """The half graph is at least 50 dB from the float graph, unoptimized in ONNX Runtime."""
    expected = OnnxRunner(graph())(images())
    actual = OnnxRunner(to_type(HALF, graph()), optimize=False)(images())
    assert np.float32 == actual.dtype
    assert compare(expected, actual).sqnr_db >= 50


def test_the_float_graph_is_untouched() -> None:
    """to_type returns a new graph."""
    model = graph()
    to_type(HALF, model)
    assert graph() == model


def test_integer_initializers_stay() -> None:
    """Only float32 becomes half; a shape tensor keeps its type."""
    model = graph()
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "shape"))
    types = {tensor.name: tensor.data_type for tensor in to_type(HALF, model).graph.initializer}
    assert TensorProto.INT64 == types["shape"]


@pytest.mark.parametrize("value", [65505.0, -70000.0, math.inf, math.nan])
def test_a_weight_beyond_half_is_named(value: float) -> None:
    """A parameter that half cannot hold is refused by name, NaN included."""
    kernel = np.zeros(SHAPES["w1"])
    kernel[3, 2, 1, 0] = value
    with pytest.raises(
        GateFailedError, match=r"half overflow in w1: .*--precision bf16, fp32 or int8$"
    ):
        to_type(HALF, graph(w1=kernel))


def test_the_largest_half_weight_is_accepted() -> None:
    """Exactly 65504 is a half number."""
    half = to_type(HALF, graph(b1=np.full(8, -HALF_MAX)))
    stored = {t.name: numpy_helper.to_array(t) for t in half.graph.initializer}
    assert -HALF_MAX == stored["b1"].min()


def test_magnitudes_are_those_of_a_direct_computation() -> None:
    """Convolutions before their ReLU and the classifier, over all batches, equal numpy's."""
    model, data = graph(), images(7)
    parameters = {t.name: numpy_helper.to_array(t).astype(float) for t in model.graph.initializer}

    def convolution(x: np.ndarray, layer: int, stride: int) -> np.ndarray:
        weight, bias = parameters[f"w{layer}"], parameters[f"b{layer}"]
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        windows = windows[:, :, ::stride, ::stride]
        return np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]

    x0 = convolution(data.astype(float), 0, 2)
    x1 = convolution(np.maximum(x0, 0), 1, 1)
    logits = np.maximum(x1, 0).mean(axis=(2, 3)) @ parameters["w2"].T + parameters["b2"]
    expected = {name: float(np.abs(x).max()) for name, x in
                {"x0": x0, "x1": x1, "logits": logits}.items()}  # fmt: skip
    actual = largest_magnitudes(model, iter([(data[:4],), (data[4:],)]))
    assert list(expected) == list(actual)
    assert expected == pytest.approx(dict(actual), rel=1e-5)


def test_magnitudes_read_the_batches_once() -> None:
    """The batches may be a generator; the maximum of any batch counts."""

    def stream() -> Iterator[tuple[np.ndarray]]:
        yield (images(2),)
        yield (100 * images(2),)
        yield (images(2),)

    whole = largest_magnitudes(graph(), [(100 * images(2),)])
    assert dict(whole) == dict(largest_magnitudes(graph(), stream()))


@pytest.mark.parametrize("position", [0, 1])
def test_a_nan_activation_is_not_lost(position: int) -> None:
    """A NaN in any batch makes the magnitude NaN, which the range check refuses."""
    batches = [(images(1),), (images(1),)]
    batches[position] = (np.full((1, 3, 8, 8), np.nan, dtype=np.float32),)
    magnitudes = largest_magnitudes(graph(), batches)
    assert math.isnan(magnitudes["x0"])
    with pytest.raises(GateFailedError, match="half overflow in x0: its values reach nan"):
        require_half_range(magnitudes)


def test_the_first_layer_beyond_half_is_named() -> None:
    """The error names the first tensor that overflows, with its size and half's."""
    magnitudes = {"stage0": 12.0, "stage1.0": 65505.0, "stage1.1": 1e9}
    with pytest.raises(GateFailedError) as caught:
        require_half_range(magnitudes)
    assert (
        "half overflow in stage1.0: its values reach 65505, half ends at 65504; "
        "use --precision bf16, fp32 or int8"
    ) == str(caught.value)


def test_half_range_is_inclusive() -> None:
    """65504 itself fits."""
    require_half_range({"stage0": HALF_MAX, "stage1": 0.0})


@pytest.mark.parametrize("value", [math.inf, math.nan, float(np.nextafter(HALF_MAX, math.inf))])
def test_what_is_not_within_half_is_refused(value: float) -> None:
    """Infinity, NaN and the next number after 65504 do not fit."""
    with pytest.raises(GateFailedError, match="half overflow in stage0"):
        require_half_range({"stage0": value})


GENERAL = """
<ir_version: 8, opset_import: ["" : 17]>
general (float[batch,3,height,width] image, float[batch,8] shift)
    => (float[batch,8,h,w] map, float[batch,4] scores)
    <float[4] up = {1, 1, 2, 2}, float low = {0}, float high = {6}, int64[2] axes = {2, 3},
     int64[1] from = {2}, int64[1] to = {4}, float two = {2}> {
    ["stem.conv"] x = Conv <pads = [1,1,1,1]> (image, w0, b0)
    ["clip"] y = Clip (x, low, high)
    ["unsqueeze"] s = Unsqueeze (shift, axes)
    ["add"] z = Add (y, s)
    ["resize"] r = Resize <mode = "linear"> (z, , up)
    ["scale"] t = Mul (r, two)
    ["constant"] half = Constant <value_float = 0.5> ()
    ["scaled"] map = Mul (t, half)
    ["shape"] all = Shape (image)
    ["slice"] sides = Slice (all, from, to)
    ["to_float"] fsides = Cast <to = 1> (sides)
    ["area"] area = ReduceProd <keepdims = 0> (fsides)
    ["sum"] total = ReduceSum <keepdims = 0> (map, axes)
    ["mean"] m = Div (total, area)
    ["doubled"] d = Mul (area, two)
    ["norm"] n = Div (m, d)
    ["linear"] scores = MatMul (n, w2t)
}
"""


def general() -> onnx.ModelProto:
    model = onnx.parser.parse_model(GENERAL)
    generator = np.random.default_rng(0)
    for name, shape in {"w0": (8, 3, 3, 3), "b0": (8,), "w2t": (8, 4)}.items():
        array = 0.3 * generator.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.checker.check_model(model)
    return model


def general_inputs() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    image = generator.standard_normal((3, 3, 40, 60)).astype(np.float32)
    return image, generator.standard_normal((3, 8)).astype(np.float32)


def test_several_inputs_and_outputs_keep_their_types() -> None:
    """Each float input gets a Cast, each float output another; the interface is unchanged."""
    half = to_type(HALF, general())
    assert list(general().graph.input) == list(half.graph.input)
    assert list(general().graph.output) == list(half.graph.output)
    casts = [node for node in half.graph.node if node.name.endswith(".cast")]
    assert [
        "image.cast",
        "shift.cast",
        "area.half.cast",
        "d.half.cast",
        "map.cast",
        "scores.cast",
    ] == [node.name for node in casts]


def test_constants_have_the_types_that_the_operators_demand() -> None:
    """Clip bounds and factors are half; Resize's scales stay float; a shared one exists twice."""
    stored = {t.name: t.data_type for t in to_type(HALF, general()).graph.initializer}
    assert TensorProto.FLOAT == stored["up"]
    for name in ("low", "high", "half", "w0", "w2t"):
        assert TensorProto.FLOAT16 == stored[name]
    assert (TensorProto.FLOAT, TensorProto.FLOAT16) == (stored["two"], stored["two.half"])


def test_what_is_computed_from_shapes_stays_float() -> None:
    """Pixel counts and their products are formed in float32; the data around them is half."""
    half = to_type(HALF, general())
    inferred = onnx.shape_inference.infer_shapes(half, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert {TensorProto.FLOAT} == {types[name] for name in ("fsides", "area", "d")}
    assert {TensorProto.FLOAT16} == {types[name] for name in ("x", "y", "z", "r", "m", "n")}


def test_a_general_half_graph_computes_nearly_the_same() -> None:
    """Both outputs are at least 50 dB from the float graph's."""
    expected = OnnxRunner(general()).run(general_inputs())
    actual = OnnxRunner(to_type(HALF, general()), optimize=False).run(general_inputs())
    for name, values in expected.items():
        assert compare(values, actual[name], classifier=False).sqnr_db >= 50


def test_sums_and_products_are_watched_for_overflow() -> None:
    """The names are those of what the nodes compute; sizes are not among them."""
    found = largest_magnitudes(general(), [general_inputs()])
    assert ["x", "z", "t", "map", "total", "scores"] == list(found)


def test_a_graph_that_has_no_half_form_is_refused() -> None:
    """An operator whose type does not follow its input's is found by strict inference."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    odd (float[batch,4] x) => (float[batch,4] y) <float s = {2}, int8 z = {0}> {
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, s, z)
    }
    """
    model = onnx.parser.parse_model(text)
    with pytest.raises(GateFailedError, match="the graph has no half form: "):
        to_type(HALF, model)


def test_a_bfloat16_graph_is_typed_as_strongly_as_a_half_one() -> None:
    """Initializers and all tensors between the ends are BFLOAT16; the interface is float32."""
    narrow = to_type(BFLOAT16, graph())
    assert {TensorProto.BFLOAT16} == {tensor.data_type for tensor in narrow.graph.initializer}
    assert list(graph().graph.input) == list(narrow.graph.input)
    assert list(graph().graph.output) == list(narrow.graph.output)
    inferred = onnx.shape_inference.infer_shapes(narrow, strict_mode=True).graph.value_info
    types = {value.name: value.type.tensor_type.elem_type for value in inferred}
    assert {"images.bf16", "x0", "y0", "x1", "y1", "p", "f", "logits.bf16"} == set(types)
    assert {TensorProto.BFLOAT16} == set(types.values())


def test_a_bfloat16_graph_has_the_opset_whose_convolution_takes_it() -> None:
    """Opset 22, or a newer one if the graph has it; a half graph keeps its own."""
    newer = graph()
    newer.opset_import[0].version = 23
    newer.ir_version = 11
    assert 22 == to_type(BFLOAT16, graph()).opset_import[0].version
    assert 23 == to_type(BFLOAT16, newer).opset_import[0].version
    assert 17 == to_type(HALF, graph()).opset_import[0].version


def test_bfloat16_holds_what_half_cannot() -> None:
    """70000 is no half number; what rounds beyond the last bfloat16 is refused by name."""
    stored = {
        t.name: numpy_helper.to_array(t)
        for t in to_type(BFLOAT16, graph(b1=np.full(8, 70000.0))).graph.initializer
    }
    assert 70144 == float(stored["b1"][0])
    to_type(BFLOAT16, graph(b1=np.full(8, BFLOAT16.largest)))
    with pytest.raises(GateFailedError) as caught:
        to_type(BFLOAT16, graph(b1=np.full(8, 3.4e38)))
    assert (
        "bfloat16 overflow in b1: its values reach 3.4e+38, bfloat16 ends at 3.38953e+38; "
        "use --precision fp32 or int8"
    ) == str(caught.value)


def test_a_general_bfloat16_graph_computes_nearly_the_same() -> None:
    """Raised to opset 22, sizes in float32, both outputs are within bf16's gate."""
    narrow = to_type(BFLOAT16, general())
    types = {t.name: t.data_type for t in narrow.graph.initializer}
    assert TensorProto.FLOAT == types["up"]
    assert (TensorProto.FLOAT, TensorProto.BFLOAT16) == (types["two"], types["two.bf16"])
    expected = OnnxRunner(general()).run(general_inputs())
    actual = OnnxRunner(emulated(narrow), optimize=False).run(general_inputs())
    for name, values in expected.items():
        assert 36 <= compare(values, actual[name], classifier=False).sqnr_db <= 70


def test_a_graph_that_has_no_bfloat16_form_is_refused() -> None:
    """The sentence names the type that was asked for."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    odd (float[batch,4] x) => (float[batch] y) { y = Einsum <equation = "ij->i"> (x) }
    """
    with pytest.raises(GateFailedError, match="the graph has no bfloat16 form: "):
        to_type(BFLOAT16, onnx.parser.parse_model(text))
