"""Q/DQ graphs that somebody trained: what is read from them, and what is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calibration.table import CalibrationTable, TensorRange
from calibration.threshold import weight_scales
from exporter.errors import InputError
from exporter.parity.comparison import compare
from exporter.quantization.qdq_import import ImportedQuantization, read_qdq
from exporter.quantize import RoundedWeight, quantize
from exporter.running.onnx_runner import OnnxRunner

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[batch,3,8,8] images) => (float[batch,4] logits) {
    ["first"] x0 = Conv <pads = [1,1,1,1], strides = [2,2]> (images, w0, b0)
    ["relu0"] y0 = Relu (x0)
    ["second"] x1 = Conv <pads = [1,1,1,1], group = 2> (y0, w1, b1)
    ["relu1"] y1 = Relu (x1)
    ["pool"] p = GlobalAveragePool (y1)
    ["flatten"] f = Flatten (p)
    ["linear"] logits = Gemm <transB = 1> (f, w2, b2)
}
"""
# As pytorch-quantization and Model Optimizer export: float weights go through Q and DQ.
TRAINED = """
<ir_version: 8, opset_import: ["" : 17]>
trained (float[batch,3,8,8] images) => (float[batch,4] logits) {
    q0 = QuantizeLinear (images, s0, zero)
    d0 = DequantizeLinear (q0, s0, zero)
    v0 = QuantizeLinear <axis = 0> (w0, ws0, z8)
    u0 = DequantizeLinear <axis = 0> (v0, ws0, z8)
    ["first"] x0 = Conv <pads = [1,1,1,1], strides = [2,2]> (d0, u0, b0)
    ["relu0"] y0 = Relu (x0)
    q1 = QuantizeLinear (y0, s1, zero)
    d1 = DequantizeLinear (q1, s1, zero)
    v1 = QuantizeLinear <axis = 0> (w1, ws1, z6)
    u1 = DequantizeLinear <axis = 0> (v1, ws1, z6)
    ["second"] x1 = Conv <pads = [1,1,1,1], group = 2> (d1, u1, b1)
    ["relu1"] y1 = Relu (x1)
    ["pool"] p = GlobalAveragePool (y1)
    ["flatten"] f = Flatten (p)
    ["linear"] logits = Gemm <transB = 1> (f, w2, b2)
}
"""
SHAPES = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (6, 4, 3, 3), "b1": (6,), "w2": (4, 6), "b2": (4,)}
SCALES = {"images": 0.03, "y0": 0.02, "f": 0.01}
Arrays = dict[str, np.ndarray]


def parameters(seed: int = 0) -> Arrays:
    """Float weights, their per-channel scales, and a scale of each activation."""
    generator = np.random.default_rng(seed)
    arrays: Arrays = {
        name: (0.3 * generator.standard_normal(shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    arrays |= {f"ws{i}": weight_scales(arrays[f"w{i}"]) for i in (0, 1, 2)}
    arrays |= {f"s{i}": np.array(v, dtype=np.float32) for i, v in enumerate(SCALES.values())}
    arrays |= {f"z{n}": np.zeros(n, dtype=np.int8) for n in (4, 6, 8)}
    return arrays | {"zero": np.array(0, dtype=np.int8)}


def graph(text: str, **changed: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    for name, array in (parameters() | changed).items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def table(scales: Mapping[str, float]) -> CalibrationTable:
    exact = {name: float(np.float32(scale)) for name, scale in scales.items()}
    return CalibrationTable(
        method="minmax",
        activation_scales=exact,
        ranges={n: TensorRange(minimum=0.0, maximum=1.0, threshold=1.0) for n in exact},
        onnx_sha256="0" * 64,
        data_sha256="0" * 64,
        image_count=1,
        preprocess={},
    )


def images(count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


def literal(model: onnx.ModelProto) -> np.ndarray:
    """What the graph says, node by node, without ONNX Runtime's integer rewrites."""
    return OnnxRunner(model, optimize=False)(images())


def again(imported: ImportedQuantization) -> onnx.ModelProto:
    """The Q/DQ graph that this project makes of what was imported."""
    return quantize(
        imported.float_model,
        table(imported.activation_scales),
        keep_float=imported.float_layers,
        rounded=imported.weights,
    )


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(InputError) as caught:
        read_qdq(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def node(model: onnx.ModelProto, output: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if output in n.output)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scales=st.tuples(*[st.floats(2.0**-20, 2.0**20, width=32)] * 3),
    linear=st.booleans(),
)
def test_what_quantize_wrote_is_read_back(seed, scales, linear):
    """Integers, scales and float layers come back, and the graph made of them is the same."""
    arrays = parameters(seed)
    chosen = dict(zip(SCALES, scales, strict=True))
    kept = [] if linear else ["linear"]
    rounded = {
        name: RoundedWeight(
            integers=np.random.default_rng(seed).integers(-128, 128, SHAPES[name]).astype(np.int8),
            scales=np.abs(arrays[name]).reshape(len(arrays[name]), -1).max(axis=1),
        )
        for name in ("w0", "w1", "w2")
    }
    model = quantize(graph(CHAIN, **arrays), table(chosen), keep_float=kept, rounded=rounded)
    imported = read_qdq(model)
    expected = {name: scale for name, scale in chosen.items() if linear or name != "f"}
    assert expected == imported.activation_scales
    assert tuple(kept) == imported.float_layers
    assert ((), True) == (imported.dropped, imported.exact)
    weights = {f"{name}.dequantized": w for name, w in rounded.items() if linear or name != "w2"}
    assert weights.keys() == imported.weights.keys()
    for name, theirs in imported.weights.items():
        ours = weights[name]
        np.testing.assert_array_equal(ours.integers, theirs.integers)
        np.testing.assert_array_equal(ours.scales, theirs.scales)
    np.testing.assert_array_equal(literal(model), literal(again(imported)))


def test_no_quantizer_is_left_in_the_float_graph():
    """The float graph is the chain again: every Q and DQ is gone, names and ends are the same."""
    float_model = read_qdq(quantize(graph(CHAIN), table(SCALES))).float_model
    expected = graph(CHAIN)
    assert [n.op_type for n in expected.graph.node] == [n.op_type for n in float_model.graph.node]
    assert [n.name for n in expected.graph.node] == [n.name for n in float_model.graph.node]
    assert expected.graph.input == float_model.graph.input
    assert expected.graph.output == float_model.graph.output


def test_the_float_weights_stand_on_the_grid():
    """A float weight is exactly its integers times its scales, as the trained network used it."""
    imported = read_qdq(graph(TRAINED))
    stored = {t.name: numpy_helper.to_array(t) for t in imported.float_model.graph.initializer}
    assert imported.weights
    for name, weight in imported.weights.items():
        expected = weight.integers.astype(np.float32) * weight.scales.reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(expected, stored[name])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0.25, 4, width=32))
def test_float_weights_through_q_and_dq_are_rounded_as_onnx_does(seed, factor):
    """Integers are those of QuantizeLinear, saturated where the scale is small: same outputs."""
    arrays = parameters(seed)
    for name in ("ws0", "ws1"):
        arrays[name] = arrays[name] * np.float32(factor)
    model = graph(TRAINED, **arrays)
    imported = read_qdq(model)
    wanted = np.clip(np.rint(arrays["w0"] / arrays["ws0"].reshape(-1, 1, 1, 1)), -128, 127)
    np.testing.assert_array_equal(wanted, next(iter(imported.weights.values())).integers)
    assert ("linear",) == imported.float_layers
    np.testing.assert_array_equal(literal(model), literal(again(imported)))


def test_one_scale_for_a_weight_becomes_one_for_each_channel():
    """Per-tensor weights are the same integers with the scale repeated."""
    scale = np.array(0.01, dtype=np.float32)
    imported = read_qdq(graph(TRAINED, ws0=scale, ws1=scale, z8=zero(), z6=zero()))
    first, second = imported.weights.values()
    np.testing.assert_array_equal(np.full(8, scale), first.scales)
    np.testing.assert_array_equal(np.full(6, scale), second.scales)


def zero() -> np.ndarray:
    return np.array(0, dtype=np.int8)


def test_activation_scales_of_shape_one_are_scalars():
    """A scale stored as [1], which costs INT8 in TensorRT-RTX, is read like a scalar."""
    flat = {f"s{i}": parameters()[f"s{i}"].reshape(1) for i in (0, 1)}
    imported = read_qdq(graph(TRAINED, **flat, zero=np.zeros(1, dtype=np.int8)))
    assert read_qdq(graph(TRAINED)).activation_scales == imported.activation_scales


def test_scales_behind_constants_and_casts_are_read():
    """Constant, Identity and Cast in front of a scale are computed, as exporters leave them."""
    model = graph(TRAINED)
    kept = [t for t in model.graph.initializer if t.name not in ("s0", "s1")]
    double = numpy_helper.from_array(np.array(0.03, dtype=np.float64))
    single = numpy_helper.from_array(np.array(0.02, dtype=np.float32))
    made = [
        helper.make_node("Constant", [], ["raw"], value=double),
        helper.make_node("Cast", ["raw"], ["s0"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["raw1"], value=single),
        helper.make_node("Identity", ["raw1"], ["s1"]),
    ]
    nodes = [*made, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    expected = {"images": float(np.float32(0.03)), "y0": float(np.float32(0.02))}
    assert expected == read_qdq(model).activation_scales


MOVED = TRAINED.replace(
    """y0 = Relu (x0)
    q1 = QuantizeLinear (y0, s1, zero)
    d1 = DequantizeLinear (q1, s1, zero)""",
    """d1 = Relu (e0)""",
).replace(
    '["relu0"]',
    """q1 = QuantizeLinear (x0, s1, zero)
    e0 = DequantizeLinear (q1, s1, zero)
    ["relu0"]""",
)


def test_a_quantizer_in_front_of_relu_is_the_next_layers():
    """Rounding commutes with ReLU: Conv, Q/DQ, Relu, Conv is the same function, bit for bit."""
    model = graph(MOVED)
    imported = read_qdq(model)
    assert () == imported.dropped
    assert [float(np.float32(s)) for s in (0.03, 0.02)] == [*imported.activation_scales.values()]
    np.testing.assert_array_equal(literal(model), literal(again(imported)))
    np.testing.assert_array_equal(literal(graph(TRAINED)), literal(model))


TWICE = TRAINED.replace(
    '["relu0"] y0 = Relu (x0)',
    """a0 = QuantizeLinear (x0, s2, zero)
    c0 = DequantizeLinear (a0, s2, zero)
    ["relu0"] y0 = Relu (c0)""",
)


def test_a_quantizer_that_repeats_the_next_one_is_no_loss():
    """The same scale before and after Relu rounds once: nothing is dropped, nothing changes."""
    same = np.array(0.02, dtype=np.float32)
    model = graph(TWICE, s2=same)
    imported = read_qdq(model)
    assert () == imported.dropped
    np.testing.assert_array_equal(literal(model), literal(again(imported)))


def test_a_quantizer_with_another_scale_is_dropped_and_named():
    """Between Conv and Relu an engine has none: the last one before the next layer counts."""
    model = graph(TWICE, s2=np.array(0.033, dtype=np.float32))
    imported = read_qdq(model)
    assert ("x0",) == imported.dropped
    assert float(np.float32(0.02)) == imported.activation_scales["y0"]
    assert 20 < compare(literal(model), literal(again(imported))).sqnr_db < 100


TAIL = TRAINED.replace("GlobalAveragePool (y1)", "GlobalAveragePool (e1)").replace(
    '["pool"]',
    """a1 = QuantizeLinear (y1, s1, zero)
    e1 = DequantizeLinear (a1, s1, zero)
    ["pool"]""",
).replace("logits = Gemm", "raw = Gemm").replace(
    "(f, w2, b2)",
    """(f, w2, b2)
    o = QuantizeLinear (raw, s2, zero)
    logits = DequantizeLinear (o, s2, zero)""",
)  # fmt: skip


def test_quantizers_around_pooling_and_logits_are_dropped_and_named():
    """They stand in front of no INT8 layer; the output keeps its name."""
    imported = read_qdq(graph(TAIL))
    assert (("logits", "y1"), False) == (imported.dropped, imported.exact)
    assert ["logits"] == [value.name for value in imported.float_model.graph.output]


def test_int32_biases_become_float():
    """A bias behind DequantizeLinear, as ONNX Runtime writes it, is its float value."""
    integers = np.arange(-4, 4, dtype=np.int32) * 2**20
    steps = np.full(8, 2.0**-24, dtype=np.float32)
    text = TRAINED.replace(
        '["first"]', 'bias = DequantizeLinear <axis = 0> (i0, is0)\n    ["first"]'
    ).replace("u0, b0)", "u0, bias)")
    imported = read_qdq(graph(text, i0=integers, is0=steps))
    stored = {t.name: numpy_helper.to_array(t) for t in imported.float_model.graph.initializer}
    np.testing.assert_array_equal(np.arange(-4, 4, dtype=np.float32) / 16, stored["bias"])


NORM = TRAINED.replace("Relu (x0)", "Relu (n0)").replace(
    '["relu0"]', '["norm"] n0 = BatchNormalization (x0, gain, shift, mean, var)\n    ["relu0"]'
)


def norm(gain: np.ndarray) -> Arrays:
    generator = np.random.default_rng(3)
    return {
        "gain": gain.astype(np.float32),
        "shift": generator.standard_normal(8).astype(np.float32),
        "mean": generator.standard_normal(8).astype(np.float32),
        "var": generator.uniform(0.5, 2, 8).astype(np.float32),
    }


@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_behind_a_convolution_goes_into_its_scales(bias):
    """Negative and zero gains too: integers change sign or vanish, the function stays."""
    gain = np.array([1.0, -1.0, 0.5, 0.0, 2.0, -0.3, 1.0, 0.7])
    model = graph(NORM if bias else NORM.replace("u0, b0)", "u0)"), **norm(gain))
    before = read_qdq(graph(TRAINED)).weights["u0"]
    imported = read_qdq(model)
    folded = next(iter(imported.weights.values()))
    signs = np.sign(gain).astype(np.int8).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(signs * before.integers, folded.integers)
    assert "BatchNormalization" not in {n.op_type for n in imported.float_model.graph.node}
    assert not imported.exact
    assert compare(literal(model), literal(again(imported))).sqnr_db > 60


MATMUL = TRAINED.replace(
    '["linear"] logits = Gemm <transB = 1> (f, w2, b2)',
    """q2 = QuantizeLinear (f, s2, zero)
    d2 = DequantizeLinear (q2, s2, zero)
    v2 = QuantizeLinear <axis = 0> (w2, ws2, z4)
    u2 = DequantizeLinear <axis = 0> (v2, ws2, z4)
    t2 = Transpose <perm = [1, 0]> (u2)
    ["matmul"] m2 = MatMul (d2, t2)
    ["linear"] logits = Add (m2, b2)""",
)


def test_a_transposed_weight_keeps_its_integers():
    """Q/DQ, Transpose, MatMul is a linear layer: its integers have the classes first."""
    model = graph(MATMUL)
    imported = read_qdq(model)
    weight = imported.weights["t2"]
    assert (4, 6) == weight.integers.shape
    np.testing.assert_array_equal(parameters()["ws2"], weight.scales)
    np.testing.assert_array_equal(literal(model), literal(again(imported)))


def test_a_layer_with_a_weight_on_a_grid_and_a_float_input_stays_float():
    """INT8 needs both scales; the weight keeps its rounded values."""
    text = TRAINED.replace("(d1, u1, b1)", "(y0, u1, b1)")
    model = graph(text)
    imported = read_qdq(model)
    assert ("second", "linear") == imported.float_layers
    assert ["images"] == list(imported.activation_scales)
    np.testing.assert_array_equal(literal(model), literal(again(imported)))


def uint8(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "zero":
            tensor.CopyFrom(numpy_helper.from_array(np.array(128, dtype=np.uint8), "zero"))


def replaced(name: str, array: np.ndarray) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def float8(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == "zero":
            tensor.CopyFrom(
                helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
            )


def without_zero_point(model: onnx.ModelProto) -> None:
    del node(model, "q0").input[2]


def computed_scale(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("ReduceMax", ["images"], ["scale"]))
    node(model, "q0").input[1] = "scale"


def renamed(output: str, op_type: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node(model, output).op_type = op_type

    return change


def other_scale(model: onnx.ModelProto) -> None:
    node(model, "d0").input[1] = "s1"


def blocks(model: onnx.ModelProto) -> None:
    node(model, "v0").attribute.append(helper.make_attribute("block_size", 16))


def half_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def quantized_input(model: onnx.ModelProto) -> None:
    node(model, "d0").input[0] = "images"


def wrong_axis(model: onnx.ModelProto) -> None:
    for output in ("v0", "u0"):
        node(model, output).attribute[0].i = 1
    for name, array in (("ws0", np.full(3, 0.1, dtype=np.float32)), ("z8", np.zeros(3, np.int8))):
        replaced(name, array)(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (uint8, "images is quantized to UINT8; TensorRT's INT8 is signed and symmetric"),
        (without_zero_point, "images is quantized to UINT8"),
        (float8, "images is quantized to FLOAT8_E4M3FN"),
        (
            replaced("zero", np.array(3, dtype=np.int8)),
            "images is quantized asymmetrically, with zero point 3",
        ),
        (
            replaced("s0", np.array(0, dtype=np.float32)),
            "a scale of images is 0, expected positive finite numbers",
        ),
        (replaced("s1", np.array(-1, dtype=np.float32)), "a scale of y0 is -1"),
        (replaced("ws0", np.full(8, np.nan, dtype=np.float32)), "a scale of w0 is nan"),
        (
            replaced("ws0", np.full(5, 0.1, dtype=np.float32)),
            r"w0 \[8, 3, 3, 3\] has 5 scales along axis 0",
        ),
        (
            replaced("s0", np.full(3, 0.1, dtype=np.float32)),
            "the activation images has 3 scales; INT8 needs one scale for the whole tensor",
        ),
        (replaced("w0", np.full((8, 3, 3, 3), np.inf, dtype=np.float32)), "w0 holds NaN or Inf"),
        (computed_scale, r"the scale of images is computed at run time \(dynamic"),
        (other_scale, "quantized with scale 0.03 and dequantized with 0.02; the two must be equal"),
        (blocks, "w0 has block-wise scales; INT8 has none"),
        (half_input, "the graph's input images is FLOAT16; export the network with float32"),
        (quantized_input, "dequantizes images, which no QuantizeLinear made"),
        (wrong_axis, "the scales of its weight lie along axis 1, expected its output channels"),
        (renamed("q0", "DynamicQuantizeLinear"), "node q0 is DynamicQuantizeLinear; only"),
        (renamed("x0", "ConvInteger"), "node first is ConvInteger; only QuantizeLinear and"),
        (renamed("x0", "QLinearConv"), "node first is QLinearConv; only"),
        (renamed("q0", "TRT_FP8QuantizeLinear"), "node q0 is TRT_FP8QuantizeLinear; only"),
    ],
)  # fmt: skip
def test_what_int8_in_tensorrt_cannot_express_is_refused(change, message):
    """One sentence names the node or tensor, what was found and what was expected."""
    model = graph(TRAINED)
    change(model)
    found = refusal(model)
    assert re.search(message, found), found


def test_a_float_graph_carries_no_scales():
    """Without any Q/DQ there is nothing to import, and the checkpoint is the thing to pass."""
    assert refusal(graph(CHAIN)) == "this ONNX carries no scales; pass the checkpoint instead"


def test_scales_of_activations_alone_are_refused():
    """If no weight carries scales, no layer could compute in INT8."""
    text = TRAINED.replace("u0, b0)", "w0, b0)").replace("u1, b1)", "w1, b1)")
    assert "has scales for no Conv or Gemm" in refusal(graph(text))


def test_an_integer_output_is_refused():
    """A graph that ends in int8 numbers has no logits to compare."""
    model = graph(TAIL)
    model.graph.output[0].name = "o"
    assert refusal(model) == "the output o is no float tensor that the graph computes"


def test_the_imported_graph_is_not_changed():
    """Values flow, they are not edited: the caller's graph is the same bytes afterwards."""
    model = graph(NORM, **norm(np.ones(8)))
    before = model.SerializeToString(deterministic=True)
    read_qdq(model)
    assert before == model.SerializeToString(deterministic=True)
