"""Half graphs: strongly typed, float at both ends, refused where half cannot hold the values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from exporter.errors import GateFailedError
from exporter.onnx_runner import OnnxRunner
from exporter.parity import compare
from exporter.precision import HALF_MAX, largest_magnitudes, require_half_range, to_half

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
    half = to_half(graph())
    assert {TensorProto.FLOAT16} == {tensor.data_type for tensor in half.graph.initializer}
    assert list(graph().graph.input) == list(half.graph.input)
    assert list(graph().graph.output) == list(half.graph.output)
    onnx.checker.check_model(half, full_check=True)


def test_there_is_one_cast_at_each_end() -> None:
    """Two Casts are added, to half behind the input and to float before the output."""
    nodes = list(to_half(graph()).graph.node)
    assert ["Cast", *(n.op_type for n in graph().graph.node), "Cast"] == [n.op_type for n in nodes]
    targets = [onnx.helper.get_attribute_value(n.attribute[0]) for n in (nodes[0], nodes[-1])]
    assert [TensorProto.FLOAT16, TensorProto.FLOAT] == targets
    assert (["images"], ["logits"]) == (list(nodes[0].input), list(nodes[-1].output))


def test_every_tensor_between_the_casts_is_half() -> None:
    """Shape inference finds no float32 tensor inside the graph."""
    inferred = onnx.shape_inference.infer_shapes(to_half(graph()), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert 8 == len(types)
    assert {TensorProto.FLOAT16} == set(types.values())


def test_half_computes_nearly_the_same() -> None:
    """The half graph is at least 50 dB from the float graph, unoptimized in ONNX Runtime."""
    expected = OnnxRunner(graph())(images())
    actual = OnnxRunner(to_half(graph()), optimize=False)(images())
    assert np.float32 == actual.dtype
    assert compare(expected, actual).sqnr_db >= 50


def test_the_float_graph_is_untouched() -> None:
    """to_half returns a new graph."""
    model = graph()
    to_half(model)
    assert graph() == model


def test_integer_initializers_stay() -> None:
    """Only float32 becomes half; a shape tensor keeps its type."""
    model = graph()
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "shape"))
    types = {tensor.name: tensor.data_type for tensor in to_half(model).graph.initializer}
    assert TensorProto.INT64 == types["shape"]


@pytest.mark.parametrize("value", [65505.0, -70000.0, math.inf, math.nan])
def test_a_weight_beyond_half_is_named(value: float) -> None:
    """A parameter that half cannot hold is refused by name, NaN included."""
    kernel = np.zeros(SHAPES["w1"])
    kernel[3, 2, 1, 0] = value
    with pytest.raises(GateFailedError, match=r"half overflow in w1: .*PRECISION=fp32 or int8$"):
        to_half(graph(w1=kernel))


def test_the_largest_half_weight_is_accepted() -> None:
    """Exactly 65504 is a half number."""
    half = to_half(graph(b1=np.full(8, -HALF_MAX)))
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
    actual = largest_magnitudes(model, iter([data[:4], data[4:]]))
    assert list(expected) == list(actual)
    assert expected == pytest.approx(dict(actual), rel=1e-5)


def test_magnitudes_read_the_batches_once() -> None:
    """The batches may be a generator; the maximum of any batch counts."""

    def stream() -> Iterator[np.ndarray]:
        yield images(2)
        yield 100 * images(2)
        yield images(2)

    whole = largest_magnitudes(graph(), [100 * images(2)])
    assert dict(whole) == dict(largest_magnitudes(graph(), stream()))


@pytest.mark.parametrize("position", [0, 1])
def test_a_nan_activation_is_not_lost(position: int) -> None:
    """A NaN in any batch makes the magnitude NaN, which the range check refuses."""
    batches = [images(1), images(1)]
    batches[position] = np.full((1, 3, 8, 8), np.nan, dtype=np.float32)
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
        "use PRECISION=fp32 or int8"
    ) == str(caught.value)


def test_half_range_is_inclusive() -> None:
    """65504 itself fits."""
    require_half_range({"stage0": HALF_MAX, "stage1": 0.0})


@pytest.mark.parametrize("value", [math.inf, math.nan, float(np.nextafter(HALF_MAX, math.inf))])
def test_what_is_not_within_half_is_refused(value: float) -> None:
    """Infinity, NaN and the next number after 65504 do not fit."""
    with pytest.raises(GateFailedError, match="half overflow in stage0"):
        require_half_range({"stage0": value})
