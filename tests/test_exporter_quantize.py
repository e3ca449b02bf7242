"""Q/DQ graphs: the structure that engines fuse, and the arithmetic it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch.nn import functional

from calibration.images import Preprocess
from calibration.table import CalibrationTable, TensorRange
from calibration.threshold import weight_scales
from exporter.calibrator import observe_images, table_by
from exporter.errors import InputError
from exporter.graph import attributes, boundary_tensors
from exporter.onnx_export import export_onnx
from exporter.parity.comparison import compare
from exporter.quantize import quantize
from exporter.running.image_set import ArrayImages, FolderImages, outputs_of
from exporter.running.onnx_runner import OnnxRunner
from models.checkpoint import load_checkpoint
from models.fusion import reparameterize
from models.registry import bundled_weights
from models.repvgg import RepVGG

PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[batch,3,8,8] images) => (float[batch,4] logits) {
    ["stage0.conv"] x0 = Conv <pads = [1,1,1,1], strides = [2,2]> (images, w0, b0)
    ["stage0.relu"] y0 = Relu (x0)
    ["stage1.conv"] x1 = Conv <pads = [1,1,1,1], group = 2> (y0, w1, b1)
    ["stage1.relu"] y1 = Relu (x1)
    ["head.pool"] p = GlobalAveragePool (y1)
    ["head.flatten"] f = Flatten (p)
    ["linear"] logits = Gemm <transB = 1> (f, w2, b2)
}
"""
SHAPES = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (6, 4, 3, 3), "b1": (6,), "w2": (4, 6), "b2": (4,)}
SCALES = {"images": 0.03, "y0": 0.02, "f": 0.01}
WEIGHTS = ("w0", "w1", "w2")


def graph(text: str = PLAIN, **replaced: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    used = {name for node in model.graph.node for name in node.input}
    for name, shape in SHAPES.items():
        array = 0.3 * generator.standard_normal(shape)
        if name in used:
            array = replaced.get(name, array).astype(np.float32)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.checker.check_model(model)
    return model


def table(scales: Mapping[str, float] = SCALES) -> CalibrationTable:
    rounded = {name: float(np.float32(scale)) for name, scale in scales.items()}
    return CalibrationTable(
        method="minmax",
        activation_scales=rounded,
        ranges={
            name: TensorRange(minimum=0.0, maximum=127 * scale, threshold=127 * scale)
            for name, scale in rounded.items()
        },
        onnx_sha256="0" * 64,
        data_sha256="0" * 64,
        image_count=1,
        preprocess={},
    )


def images(count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def writers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def test_quantize_and_dequantize_stand_only_before_convolutions_and_the_classifier() -> None:
    """In order: Q, DQ of the activation, DQ of the weight, the layer; nothing else is added."""
    layer = ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]
    expected = [
        *layer, "Conv", "Relu", *layer, "Conv", "Relu",
        "GlobalAveragePool", "Flatten", *layer, "Gemm",
    ]  # fmt: skip
    assert expected == [node.op_type for node in quantize(graph(), table()).graph.node]


def test_every_layer_reads_two_dequantized_tensors_and_a_float_bias() -> None:
    """Activation = DQ(Q(x)), weight = DQ(int8), bias = the float bias of before."""
    model = quantize(graph(), table())
    made_by = writers(model)
    for node, source in zip(
        [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")], SCALES, strict=True
    ):
        activation, weight = made_by[node.input[0]], made_by[node.input[1]]
        assert ("DequantizeLinear", "DequantizeLinear") == (activation.op_type, weight.op_type)
        quantizer = made_by[activation.input[0]]
        assert ("QuantizeLinear", source) == (quantizer.op_type, quantizer.input[0])
        assert list(quantizer.input[1:]) == list(activation.input[1:])
        assert TensorProto.INT8 == numpy_helper_type(model, weight.input[0])
        np.testing.assert_array_equal(arrays(graph())[node.input[2]], arrays(model)[node.input[2]])


def numpy_helper_type(model: onnx.ModelProto, name: str) -> int:
    return next(t.data_type for t in model.graph.initializer if t.name == name)


def test_nothing_stands_between_convolution_and_relu() -> None:
    """Each ReLU reads its convolution directly, so that an engine can fuse them."""
    model = quantize(graph(), table())
    made_by = writers(model)
    relus = [node for node in model.graph.node if node.op_type == "Relu"]
    assert ["Conv", "Conv"] == [made_by[relu.input[0]].op_type for relu in relus]


def test_activation_scales_are_scalars() -> None:
    """Scale and zero point of an activation are 0-d; with [1] no convolution would run in INT8."""
    stored = arrays(quantize(graph(), table()))
    for name, scale in SCALES.items():
        assert ((), ()) == (stored[f"{name}.scale"].shape, stored[f"{name}.zero_point"].shape)
        assert np.float32(scale) == stored[f"{name}.scale"]
        assert (np.int8, 0) == (stored[f"{name}.zero_point"].dtype, stored[f"{name}.zero_point"])


def test_weights_are_int8_with_one_scale_a_channel() -> None:
    """Scales are [O] with axis 0, zero points [O] zeros, and no float weight is left."""
    model = quantize(graph(), table())
    stored, before = arrays(model), arrays(graph())
    for name in WEIGHTS:
        channels = SHAPES[name][0]
        assert name not in stored
        assert (np.int8, SHAPES[name]) == (
            stored[f"{name}.int8"].dtype,
            stored[f"{name}.int8"].shape,
        )
        np.testing.assert_array_equal(weight_scales(before[name]), stored[f"{name}.scale"])
        np.testing.assert_array_equal(np.zeros(channels, np.int8), stored[f"{name}.zero_point"])
        assert {"axis": 0} == attributes(writers(model)[f"{name}.dequantized"])


def test_the_graph_passes_the_full_check() -> None:
    """Types and shapes of the quantized graph are inferred without a contradiction."""
    onnx.checker.check_model(quantize(graph(), table()), full_check=True)


def test_interface_and_original_stay() -> None:
    """Input, output, opset and metadata are the float graph's, which is not edited."""
    model = graph()
    onnx.helper.set_model_props(model, {"variant": "A0"})
    before = onnx.ModelProto()
    before.CopyFrom(model)
    quantized = quantize(model, table())
    assert before == model
    assert list(model.graph.input) == list(quantized.graph.input)
    assert list(model.graph.output) == list(quantized.graph.output)
    assert list(model.opset_import) == list(quantized.opset_import)
    assert list(model.metadata_props) == list(quantized.metadata_props)


@settings(deadline=None)
@given(
    st.floats(1e-6, 1e6),
    st.lists(st.floats(-1, 1, width=32), min_size=24, max_size=24),
)
def test_a_weight_is_at_most_half_a_step_off(size: float, values: list[float]) -> None:
    """|W - s q| <= s / 2 for every weight, whatever its magnitude, zeros included."""
    weight = (size * np.array(values).reshape(4, 6)).astype(np.float32)
    stored = arrays(quantize(graph(w2=weight), table()))
    scale = stored["w2.scale"].astype(np.float64)[:, None]
    error = np.abs(weight - scale * stored["w2.int8"])
    assert np.all(error <= scale / 2 * (1 + 1e-6))


@pytest.mark.parametrize("kept", [("linear",), ("stage0.conv", "linear"), ("stage1.conv",)])
def test_kept_layers_stay_exactly_as_they_were(kept: tuple[str, ...]) -> None:
    """The named nodes and their weights are the float graph's; all others are quantized."""
    model, before = quantize(graph(), table(), keep_float=kept), graph()
    nodes = {node.name: node for node in model.graph.node}
    for node in before.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert (node.name in kept) == (node == nodes[node.name])
            assert (node.name in kept) == (node.input[1] in arrays(model))
    assert 3 - len(kept) == sum(n.op_type == "QuantizeLinear" for n in model.graph.node)


def test_keeping_everything_gives_the_float_graph_back() -> None:
    """With every layer kept there is nothing to add and no scale is needed."""
    kept = ("stage0.conv", "stage1.conv", "linear")
    assert graph() == quantize(graph(), table({}), keep_float=kept)


def test_an_unknown_layer_to_keep_is_named() -> None:
    """The error names what does not exist and what does."""
    with pytest.raises(InputError) as caught:
        quantize(graph(), table(), keep_float=("stage9.conv", "stage0.relu", "linear"))
    assert (
        "no Conv or Gemm is called stage0.relu, stage9.conv; "
        "known: linear, stage0.conv, stage1.conv"
    ) == str(caught.value)


def test_a_missing_scale_is_named() -> None:
    """A table of another graph is refused with the tensor it lacks."""
    with pytest.raises(InputError, match=r"^the calibration table has no scale for y0$"):
        quantize(graph(), table({"images": 0.03, "f": 0.01}))


def test_a_kept_layer_needs_no_scale() -> None:
    """Only quantized layers read the table."""
    model = quantize(graph(), table({"images": 0.03, "y0": 0.02}), keep_float=("linear",))
    assert 2 == sum(node.op_type == "QuantizeLinear" for node in model.graph.node)


def test_a_gemm_without_transb_is_scaled_along_its_second_axis() -> None:
    """[features, classes] weights have their output channels on axis 1; the logits agree."""
    weight = arrays(graph())["w2"]
    text = PLAIN.replace("Gemm <transB = 1>", "Gemm")
    plain = quantize(graph(), table())
    turned = quantize(graph(text, w2=weight.T), table())
    assert {"axis": 1} == attributes(writers(turned)["w2.dequantized"])
    np.testing.assert_array_equal(arrays(plain)["w2.scale"], arrays(turned)["w2.scale"])
    np.testing.assert_array_equal(arrays(plain)["w2.int8"].T, arrays(turned)["w2.int8"])
    np.testing.assert_allclose(
        OnnxRunner(plain, optimize=False)(images()),
        OnnxRunner(turned, optimize=False)(images()),
        atol=1e-5,
    )


SHARED = """
<ir_version: 8, opset_import: ["" : 17]>
shared (float[batch,8,4,4] y0) => (float[batch,6,4,4] sum) {
    ["left"] a = Conv <pads = [1,1,1,1], group = 2> (y0, w1, b1)
    ["right"] b = Conv <pads = [1,1,1,1], group = 2> (y0, w1, b1)
    sum = Add (a, b)
}
"""


def test_a_tensor_that_two_layers_read_is_quantized_once() -> None:
    """Shared activations and shared weights get one Q/DQ pair and one DQ."""
    model = quantize(graph(SHARED), table())
    expected = ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv", "Conv", "Add"]
    assert expected == [node.op_type for node in model.graph.node]
    assert {"w1.int8", "w1.scale", "w1.zero_point", "b1", "y0.scale", "y0.zero_point"} == set(
        arrays(model)
    )


def test_a_weight_shared_with_a_kept_layer_stays_beside_its_int8_form() -> None:
    """The float copy remains where a kept layer still reads it."""
    model = quantize(graph(SHARED), table(), keep_float=("right",))
    assert {"w1", "w1.int8"} <= set(arrays(model))
    data = np.random.default_rng(2).random((2, 8, 4, 4)).astype(np.float32)
    assert (2, 6, 4, 4) == OnnxRunner(model)(data).shape


def reference_logits(model: onnx.ModelProto, data: np.ndarray) -> np.ndarray:
    """The quantized network from its definition, in torch float64, without ONNX's operators."""
    parameters = {
        name: torch.tensor(array, dtype=torch.float64) for name, array in arrays(model).items()
    }

    def activation(x: torch.Tensor, name: str) -> torch.Tensor:
        scale = float(np.float32(SCALES[name]))
        return torch.clamp(torch.round(x / scale), -128, 127) * scale

    def weight(name: str) -> torch.Tensor:
        w = parameters[name]
        scale = w.flatten(1).abs().amax(dim=1) / 127
        scale = scale.float().double().reshape(-1, *[1] * (w.ndim - 1))
        return torch.clamp(torch.round(w / scale), -127, 127) * scale

    x = activation(torch.from_numpy(data).double(), "images")
    x = torch.relu(functional.conv2d(x, weight("w0"), parameters["b0"], stride=2, padding=1))
    x = activation(x, "y0")
    x = torch.relu(functional.conv2d(x, weight("w1"), parameters["b1"], padding=1, groups=2))
    x = activation(x.mean(dim=(2, 3)), "f")
    return functional.linear(x, weight("w2"), parameters["b2"]).numpy()


def test_logits_equal_an_independent_implementation() -> None:
    """ONNX Runtime on the Q/DQ graph and the definition in torch float64 agree.

    A value on a rounding boundary may fall to either side, which moves a logit by less than a
    thousandth of the range; everything else is float rounding.
    """
    expected = reference_logits(graph(), images(20))
    actual = OnnxRunner(quantize(graph(), table()), optimize=False)(images(20))
    assert compare(expected.astype(np.float32), actual).relative < 2e-3
    assert np.median(np.abs(expected - actual)) / np.ptp(expected) < 1e-6


def test_a_coarser_scale_is_further_from_the_float_graph() -> None:
    """Doubling a sufficient scale again and again lowers the SQNR each time."""
    expected = OnnxRunner(graph())(images(20))
    found = []
    for factor in (1, 4, 16, 64):
        scales = {name: factor * scale for name, scale in {"images": 0.04, "y0": 0.05,
                                                           "f": 0.01}.items()}  # fmt: skip
        quantized = OnnxRunner(quantize(graph(), table(scales)), optimize=False)
        found.append(compare(expected, quantized(images(20))).sqnr_db)
    assert sorted(found, reverse=True) == found
    assert found[0] > 25


@pytest.fixture(scope="module")
def a0() -> tuple[onnx.ModelProto, CalibrationTable]:
    """The bundled network and its table."""
    bundled = bundled_weights("A0")
    assert bundled is not None
    module = reparameterize(load_checkpoint(bundled.checkpoint).module)
    assert isinstance(module, RepVGG)
    preprocess = Preprocess.from_json(bundled.preprocess)
    model = export_onnx(module, preprocess.image_size, {})
    folder = FolderImages.open(
        bundled.calibration_images, preprocess, "calibration", count=64, skip_bad=False
    )
    observers = observe_images(model, folder)
    return model, table_by("mse", observers, model, folder.to_json(), preprocess)


def test_the_bundled_a0_keeps_25_db(a0: tuple[onnx.ModelProto, CalibrationTable]) -> None:
    """All 22 convolutions and the classifier quantized: 25 dB and 98 % agreement on test images."""
    model, scales = a0
    bundled = bundled_weights("A0")
    assert bundled is not None
    quantized = quantize(model, scales)
    assert 23 == sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node)
    held_out = FolderImages.open(
        bundled.test_images,
        Preprocess.from_json(bundled.preprocess),
        "test",
        count=128,
        skip_bad=False,
    )
    found = compare(
        outputs_of(OnnxRunner(model).run, held_out.batches())["logits"],
        outputs_of(OnnxRunner(quantized).run, held_out.batches())["logits"],
    )
    assert found.sqnr_db >= 25
    assert found.top1_agreement >= 0.98


def test_scales_that_do_not_fit_cost_the_a0_its_accuracy(
    a0: tuple[onnx.ModelProto, CalibrationTable],
) -> None:
    """Negative control: scales 32 times too coarse leave less than 15 dB."""
    model, scales = a0
    coarse = {name: 32 * scale for name, scale in scales.activation_scales.items()}
    data = np.random.default_rng(3).standard_normal((8, 3, 64, 64)).astype(np.float32)
    quantized = quantize(model, replace(scales, activation_scales=coarse))
    assert compare(OnnxRunner(model)(data), OnnxRunner(quantized)(data)).sqnr_db < 15


def test_all_boundaries_of_the_a0_have_a_scale(
    a0: tuple[onnx.ModelProto, CalibrationTable],
) -> None:
    """The table names exactly the tensors that the quantizer asks for."""
    model, scales = a0
    assert set(boundary_tensors(model)) == set(scales.activation_scales)


GENERAL = """
<ir_version: 8, opset_import: ["" : 17]>
general (float[batch,3,8,8] image, float[batch,5,6] tokens)
    => (float[batch,8,8,8] map, float[batch,5,4] mixed) {
    ["wide.conv"] a = Conv <pads = [4,4,4,4], dilations = [2,2]> (image, k5, b8)
    ["deep.conv"] b = Conv <pads = [1,1,1,1], group = 8> (a, kd, b8)
    ["side.conv"] c = Conv (a, k1, b8)
    ["up"] d = ConvTranspose (c, kt)
    ["add"] e = Add (b, d)
    ["weights"] computed = Identity (k1)
    ["dynamic.conv"] map = Conv (e, computed)
    ["fc"] mixed = MatMul (tokens, wm)
    ["turned"] mixed_t = Transpose <perm = [0,2,1]> (mixed)
    ["attention"] scores = MatMul (mixed, mixed_t)
}
"""
GENERAL_SHAPES = {
    "k5": (8, 3, 5, 5), "b8": (8,), "kd": (8, 1, 3, 3), "k1": (8, 8, 1, 1), "kt": (8, 8, 1, 1),
    "wm": (6, 4),
}  # fmt: skip


def general() -> onnx.ModelProto:
    model = onnx.parser.parse_model(GENERAL)
    generator = np.random.default_rng(0)
    for name, shape in GENERAL_SHAPES.items():
        array = 0.2 * generator.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.checker.check_model(model)
    return model


def test_every_product_with_a_constant_weight_is_quantized() -> None:
    """Any kernel, dilation and groups, and MatMul; not ConvTranspose, not products of tensors."""
    assert ("image", "a", "tokens") == boundary_tensors(general())
    scales = {"image": 0.03, "a": 0.05, "tokens": 0.03}
    model = quantize(general(), table(scales))
    quantized = {n.name for n in model.graph.node if n.input[0].endswith(".dequantized")}
    assert {"wide.conv", "deep.conv", "side.conv", "fc"} == quantized
    activations = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert ["image", "a", "tokens"] == [n.input[0] for n in activations]


def test_a_matmul_is_quantized_per_column() -> None:
    """Its output channels are the last axis of the weight."""
    model = quantize(general(), table({"image": 0.03, "a": 0.05, "tokens": 0.03}))
    stored = arrays(model)
    assert ((6, 4), (4,)) == (stored["wm.int8"].shape, stored["wm.scale"].shape)
    node = writers(model)["wm.dequantized"]
    assert 1 == attributes(node)["axis"]


def test_per_tensor_weights_have_one_scalar_scale() -> None:
    """The scale is the largest weight over 127, 0-d, and the node has no axis."""
    model = quantize(graph(), table(), per_tensor_weights=True)
    stored = arrays(model)
    for name in WEIGHTS:
        weight = arrays(graph())[name]
        assert () == stored[f"{name}.scale"].shape == stored[f"{name}.zero_point"].shape
        assert np.float32(np.abs(weight).max() / 127) == stored[f"{name}.scale"]
        assert {} == attributes(writers(model)[f"{name}.dequantized"])
        real = stored[f"{name}.int8"] * stored[f"{name}.scale"]
        assert np.abs(real - weight).max() <= stored[f"{name}.scale"] * 0.501


def test_a_general_quantized_graph_stays_close() -> None:
    """With calibrated scales both outputs are within 30 dB of the float graph."""
    generator = np.random.default_rng(1)
    batch = (
        generator.standard_normal((16, 3, 8, 8)).astype(np.float32),
        generator.standard_normal((16, 5, 6)).astype(np.float32),
    )
    data = ArrayImages.of(*batch)
    observers = observe_images(general(), data)
    scales = table_by("mse", observers, general(), data.to_json(), None)
    expected = OnnxRunner(general()).run(batch)
    actual = OnnxRunner(quantize(general(), scales)).run(batch)
    for name, values in expected.items():
        assert compare(values, actual[name], classifier=False).sqnr_db >= 30
