"""FP8: scales to 448, exact rescaling, a graph that ONNX Runtime computes as E4M3 is defined."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from calibration.chain import rescale
from exporter.errors import InputError
from exporter.graph import attributes, with_outputs
from exporter.onnx_export import export_onnx
from exporter.parity.comparison import compare
from exporter.quantization.fp8 import Fp8Graphs, Fp8Options, quantize_fp8
from exporter.quantization.plain_chain import read_chain, with_chain
from exporter.running.image_set import ArrayImages, outputs_of
from exporter.running.onnx_runner import OnnxRunner
from models import RepVGG, Variant
from models.fusion import reparameterize

TINY = Variant(name="tiny", num_blocks=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))


@pytest.fixture(scope="module")
def images() -> ArrayImages:
    return ArrayImages.of(np.random.default_rng(0).normal(size=(48, 3, 32, 32)).astype(np.float32))


@pytest.fixture(scope="module")
def model(images: ArrayImages) -> onnx.ModelProto:
    """A small network whose BatchNorms have seen the images."""
    torch.manual_seed(0)
    network = RepVGG(TINY, num_classes=6)
    (batch,) = next(images.batches())
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.from_numpy(batch))
    return export_onnx(reparameterize(network.eval()), (32, 32), {})


def made_from(
    model: onnx.ModelProto, images: ArrayImages, *, as_chain: bool = True, **options: object
) -> Fp8Graphs:
    chain = read_chain(model) if as_chain else None
    return quantize_fp8(model, chain, images, Fp8Options(**options), lambda _fraction: None)


def logits(model: onnx.ModelProto, images: ArrayImages, *, optimize: bool = False) -> np.ndarray:
    return outputs_of(OnnxRunner(model, optimize=optimize).run, images.batches())["logits"]


def e4m3(values: np.ndarray) -> np.ndarray:
    """By its definition: 3 bits behind the leading one, from 2^-6 on, ties to even, end at 448."""
    magnitude = np.abs(np.asarray(values, np.float64))
    exponent = np.maximum(np.floor(np.log2(np.maximum(magnitude, 2.0**-20))), -6)
    step = 2.0 ** (exponent - 3)
    return np.sign(values) * np.minimum(np.round(magnitude / step) * step, 448.0)


@given(st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=64))
def test_onnx_runtimes_rounding_is_the_formats_definition(values: list[float]) -> None:
    """Subnormal numbers, ties and saturation included."""
    array = np.array([values], np.float32)
    assert np.array_equal(e4m3(array).astype(np.float32), _rounding()(array))


_RUNNERS: list[OnnxRunner] = []


def _rounding() -> OnnxRunner:
    if not _RUNNERS:
        text = """
        <ir_version: 9, opset_import: ["" : 19]>
        round (float[batch,n] x) => (float[batch,n] y) <float s = {1}> {
            q = QuantizeLinear (x, s, zero)
            y = DequantizeLinear (q, s, zero)
        }
        """
        graph = onnx.parser.parse_model(text)
        kind = onnx.helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
        graph.graph.initializer.append(numpy_helper.from_array(np.zeros((), kind), "zero"))
        _RUNNERS.append(OnnxRunner(graph, optimize=False))
    return _RUNNERS[0]


def test_each_layer_is_a_fake_quantized_convolution(model, images) -> None:
    """Unoptimized ONNX Runtime equals E4M3 by its definition around a float64 convolution."""
    graph = made_from(model, images).graph
    nodes = {output: node for node in graph.graph.node for output in node.output}
    values = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in graph.graph.initializer}
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert 6 == len(convolutions)
    sources = [nodes[nodes[node.input[0]].input[0]].input[0] for node in convolutions]
    names = [*(n for n in sources if n != "images"), *(node.output[0] for node in convolutions)]
    (batch,) = next(images.batches())
    found = OnnxRunner(with_outputs(graph, names), optimize=False).run((batch,))
    found["images"] = batch
    for source, node in zip(sources, convolutions, strict=True):
        scale = values[f"{source}.scale"]
        weight = nodes[node.input[1]]
        scales = values[weight.input[1]].reshape(-1, 1, 1, 1)
        stored = values[weight.input[0]]
        assert np.array_equal(e4m3(stored), stored)
        # In float32, as the division is done.
        steps = e4m3(found[source] / np.float32(scale))
        expected = torch.nn.functional.conv2d(
            torch.from_numpy(steps * scale),
            torch.from_numpy(stored * scales),
            torch.from_numpy(values[node.input[2]]),
            attributes(node)["strides"],
            1,
        ).numpy()
        assert compare(expected, found[node.output[0]], classifier=False).sqnr_db >= 110


def test_the_graph_is_typed_as_a_builder_wants_it(model, images) -> None:
    """Opset 19, 0-d activation scales, E4M3 weights with one float32 scale an output channel."""
    made = made_from(model, images)
    tensors = {t.name: t for t in made.graph.graph.initializer}
    assert 19 == made.graph.opset_import[0].version
    onnx.checker.check_model(made.graph, full_check=True)
    for name, scale in made.table.activation_scales.items():
        assert (TensorProto.FLOAT, []) == (
            tensors[f"{name}.scale"].data_type,
            list(tensors[f"{name}.scale"].dims),
        )
        assert TensorProto.FLOAT8E4M3FN == tensors[f"{name}.zero_point"].data_type
        assert np.float32(scale) == numpy_helper.to_array(tensors[f"{name}.scale"])
    weights = [name for name in tensors if name.endswith(".fp8")]
    assert 6 == len(weights)
    for name in weights:
        values = numpy_helper.to_array(tensors[name]).astype(np.float32)
        assert TensorProto.FLOAT8E4M3FN == tensors[name].data_type
        assert [len(values)] == list(tensors[name.replace(".fp8", ".scale")].dims)
        # The largest of each channel is the format's largest number.
        assert np.array_equal(
            np.full(len(values), 448.0), np.abs(values).reshape(len(values), -1).max(1)
        )


def test_one_weight_scale_is_a_scalar(model, images) -> None:
    """--per-tensor-weights stores one, of shape []."""
    graph = made_from(model, images, per_tensor_weights=True).graph.graph
    scales = [
        t for t in graph.initializer if t.name.replace(".scale", ".fp8") in
        {other.name for other in graph.initializer if other.name.endswith(".fp8")}
        and t.name.endswith(".scale")
    ]  # fmt: skip
    assert [[]] * 6 == [list(t.dims) for t in scales]


def test_rescaling_by_powers_of_two_changes_no_bit_of_the_float_network(model, images) -> None:
    """The published float graph computes exactly what the network did, and the table says what."""
    made = made_from(model, images)
    assert np.array_equal(logits(model, images), logits(made.model, images))
    assert made.table.source_sha256 != made.table.onnx_sha256
    for divisors in made.table.channel_scales.values():
        assert np.array_equal(np.full(len(divisors), 0.5), np.frexp(divisors)[0])


def test_a_rescaled_checkpoint_loses_less_with_rescaling_than_without(model, images) -> None:
    """Channels that are far apart put the small ones among E4M3's subnormal numbers."""
    plain = read_chain(model)
    assert plain is not None
    generator = np.random.default_rng(1)
    factors = [2.0 ** generator.integers(-7, 8, len(stage.weight)) for stage in plain.chain.stages]
    stressed = with_chain(model, rescale(plain.chain, factors))
    reference = logits(model, images)
    ours = compare(reference, logits(made_from(stressed, images).graph, images)).sqnr_db
    without = made_from(stressed, images, as_chain=False, keep_float=("linear",))
    plainly = compare(reference, logits(without.graph, images)).sqnr_db
    same = compare(reference, logits(made_from(model, images).graph, images)).sqnr_db
    assert ours >= plainly + 1
    assert ours == pytest.approx(same, abs=0.5)


def test_the_classifier_and_named_nodes_stay_float(model, images) -> None:
    """A chain keeps its classifier; nodes that are named keep their float weights."""
    made = made_from(model, images, keep_float=("stage1.0.conv",))
    assert ("stage1.0.conv", "linear") == made.kept_float
    types = {t.name: t.data_type for t in made.graph.graph.initializer}
    weights = {n.name: n.input[1] for n in model.graph.node if n.op_type in ("Conv", "Gemm")}
    for name in made.kept_float:
        assert TensorProto.FLOAT == types[weights[name]]
    assert 5 == sum(kind == TensorProto.FLOAT8E4M3FN for n, kind in types.items() if ".fp8" in n)
    with pytest.raises(InputError, match="no convolution is called stage9; known: linear, stage0"):
        made_from(model, images, keep_float=("stage9",))


def test_any_graph_can_be_fp8_without_rescaling(model, images) -> None:
    """What is no chain keeps its weights; every product with constant weights is quantized."""
    made = made_from(model, images, as_chain=False)
    assert model == made.model
    assert ((), {}) == (made.kept_float, dict(made.table.channel_scales))
    assert 7 == sum(t.name.endswith(".fp8") for t in made.graph.graph.initializer)
    assert compare(logits(model, images), logits(made.graph, images)).sqnr_db >= 15
