"""The two ways to INT8 behind one door, on small trained-like networks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from exporter.errors import GateFailedError, InputError
from exporter.onnx_export import export_onnx
from exporter.parity.comparison import compare
from exporter.quantization.plain_chain import read_chain
from exporter.quantization.quantizers import (
    Quantizer,
    QuantizerOptions,
    multiply_accumulates,
    open_quantizer,
)
from exporter.running.image_set import ArrayImages, outputs_of
from exporter.running.onnx_runner import OnnxRunner
from exporter.spec import Recipe
from models import RepVGG, Variant
from models.fusion import reparameterize

TINY = Variant(name="tiny", num_blocks=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))


def silent(_fraction: float) -> None:
    return


@pytest.fixture(scope="module")
def images() -> ArrayImages:
    return ArrayImages.of(np.random.default_rng(0).normal(size=(64, 3, 32, 32)).astype(np.float32))


@pytest.fixture(scope="module")
def model(images: ArrayImages) -> onnx.ModelProto:
    torch.manual_seed(0)
    network = RepVGG(TINY, num_classes=6)
    (batch,) = next(images.batches())
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.from_numpy(batch))
    return export_onnx(reparameterize(network.eval()), (32, 32), {})


def opened(
    model: onnx.ModelProto, images: ArrayImages, *, as_chain: bool, **options: object
) -> Quantizer:
    chain = read_chain(model) if as_chain else None
    return open_quantizer(model, chain, images, QuantizerOptions(**options), silent)


def sqnr(model: onnx.ModelProto, graph: onnx.ModelProto, images: ArrayImages) -> float:
    expected = outputs_of(OnnxRunner(model).run, images.batches())["logits"]
    found = outputs_of(OnnxRunner(graph).run, images.batches())["logits"]
    return compare(expected, found).sqnr_db


def test_a_chain_knows_every_recipe_and_any_graph_the_clip_methods(model, images) -> None:
    """Plain to full; the default is the last rung, or mse where there is no chain."""
    chain = opened(model, images, as_chain=True)
    graph = opened(model, images, as_chain=False)
    names = ["minmax", "percentile", "mse", "entropy", "equalize", "full", "wide"]
    assert names == [str(recipe) for recipe in chain.recipes]
    assert names[:4] == [str(recipe) for recipe in graph.recipes]
    assert (Recipe.FULL, Recipe.MSE) == (chain.default, graph.default)


@pytest.mark.parametrize("as_chain", [True, False])
def test_layers_in_half_raise_the_sqnr_and_hold_no_integers(model, images, as_chain) -> None:
    """The most sensitive half of the layers in half brings decibels; their weights are float16."""
    quantizer = opened(model, images, as_chain=as_chain)
    before = quantizer.make(quantizer.default)
    effects = sorted(quantizer.effects(before).layers, key=lambda layer: -layer.power)
    kept = [layer.name for layer in effects[:3]]
    after = quantizer.make(quantizer.default, kept)
    assert sqnr(model, before.graph, images) + 1 < sqnr(model, after.graph, images)
    nodes = {node.name: node for node in after.graph.graph.node}
    stored = {tensor.name: tensor.data_type for tensor in after.graph.graph.initializer}
    assert [TensorProto.FLOAT16] * 3 == [stored[nodes[name].input[1]] for name in kept]


def test_measured_and_predicted_effects_agree_on_the_total(model, images) -> None:
    """Both sum up to the noise of the whole network within 3 dB."""
    for as_chain in (True, False):
        quantizer = opened(model, images, as_chain=as_chain)
        made = quantizer.make(Recipe.MINMAX)
        effects = quantizer.effects(made)
        total = sum(layer.power for layer in effects.layers) / effects.signal
        assert abs(-10 * np.log10(total) - sqnr(model, made.graph, images)) < 3


def test_multiply_accumulates_are_the_papers_count(model) -> None:
    """Output positions times terms: the sum is the variant's own figure."""
    batch = (np.zeros((2, 3, 32, 32), dtype=np.float32),)
    assert TINY.macs((32, 32), 6) == sum(multiply_accumulates(model, batch).values())


def test_per_tensor_weights_hold_for_either_way(model, images) -> None:
    """Every weight scale is a scalar."""
    for as_chain in (True, False):
        quantizer = opened(model, images, as_chain=as_chain, per_tensor_weights=True)
        made = quantizer.make(Recipe.MINMAX)
        stored = {t.name: numpy_helper.to_array(t) for t in made.graph.graph.initializer}
        scales = [v.shape for name, v in stored.items() if name.endswith(".weight.scale")]
        assert scales
        assert {()} == set(scales)


def test_power_of_two_equalization_moves_no_bit_of_the_float_result(model, images) -> None:
    """Scales by powers of two commute with every rounding of the float network."""
    quantizer = opened(model, images, as_chain=True, power_of_two=True)
    made = quantizer.make(Recipe.EQUALIZE)
    (batch,) = next(images.batches())
    np.testing.assert_array_equal(OnnxRunner(model)(batch), OnnxRunner(made.model)(batch))
    with pytest.raises(InputError, match="power-of-two scales belong to equalization"):
        opened(model, images, as_chain=False, power_of_two=True)


def test_a_name_that_is_no_layer_is_refused_with_the_known_ones(model, images) -> None:
    """Before any image is looked at."""
    with pytest.raises(InputError, match=r"is called x; known: linear, stage0\.conv"):
        opened(model, ArrayImages(chunks=()), as_chain=True, keep_float=("x",))


def test_a_layer_whose_values_half_cannot_hold_is_not_kept_in_half(images) -> None:
    """A bias of 1e5 overflows binary16; the error names the tensor."""
    network = reparameterize(RepVGG(TINY, num_classes=6).eval())
    model = export_onnx(network, (32, 32), {})
    bias = next(n.input[2] for n in model.graph.node if n.name == "stage1.0.conv")
    for tensor in model.graph.initializer:
        if tensor.name == bias:
            values = numpy_helper.to_array(tensor).copy()
            values[0] = 1e5
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    quantizer = opened(model, images, as_chain=False)
    with pytest.raises(GateFailedError, match="half overflow"):
        quantizer.make(Recipe.MINMAX, ("stage1.0.conv",))
