"""A plain graph is observed once, equalized exactly, and written back as integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from calibration.chain import rescale
from calibration.recipe import Recipe as Rung
from calibration.recipe import RecipeOptions
from exporter.errors import InputError
from exporter.graph import quantizable
from exporter.onnx_export import export_onnx
from exporter.parity import compare
from exporter.quantization.chain_observer import observe_chain
from exporter.quantization.chain_quantizer import QuantizedGraphs, quantize_observed
from exporter.quantization.plain_chain import read_chain, with_chain
from exporter.running.image_set import ArrayImages
from exporter.running.onnx_runner import OnnxRunner
from exporter.spec import Recipe
from models import RepVGG, Variant
from models.fusion import reparameterize

TINY = Variant(name="tiny", num_blocks=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))


@pytest.fixture(scope="module")
def images() -> ArrayImages:
    return ArrayImages.of(np.random.default_rng(0).normal(size=(96, 3, 32, 32)).astype(np.float32))


@pytest.fixture(scope="module")
def model(images) -> onnx.ModelProto:
    """A small network whose BatchNorms have seen the images."""
    torch.manual_seed(0)
    module = RepVGG(TINY, num_classes=6)
    (batch, *_) = next(images.batches())
    with torch.no_grad():
        for _ in range(20):
            module.train()(torch.from_numpy(batch))
    return export_onnx(reparameterize(module.eval()), (32, 32), {})


def logits(model: onnx.ModelProto, images: ArrayImages) -> np.ndarray:
    (found,) = zip(*(OnnxRunner(model).run(b).values() for b in images.batches()), strict=True)
    return np.concatenate(found)


def quantized(
    model: onnx.ModelProto, images: ArrayImages, recipe: str, *keep_float: str
) -> QuantizedGraphs:
    plain = read_chain(model)
    assert plain is not None
    observed = observe_chain(model, plain, images)
    options = RecipeOptions(keep_float=frozenset(keep_float))
    return quantize_observed(model, plain, observed, recipe, options=options)


@pytest.mark.parametrize("recipe", ["minmax", "equalize", "full"])
def test_equalization_leaves_the_float_network_and_the_table_binds_to_it(model, images, recipe):
    """The rescaled float graph computes the same, and the table carries its hash."""
    import hashlib

    made = quantized(model, images, recipe)
    before, after = logits(model, images), logits(made.model, images)
    assert compare(before, after).relative < 1e-5
    digest = hashlib.sha256(made.model.SerializeToString()).hexdigest()
    assert (recipe, digest) == (made.table.method, made.table.onnx_sha256)
    assert len(read_chain(model).chain.stages) == len(made.table.activation_scales)


def test_full_beats_nearest_rounding_and_does_not_mind_a_rescaled_checkpoint(model, images):
    """A function-preserving rescaling by 2^U(-3, 3) per channel costs min-max its accuracy."""
    plain = read_chain(model)
    reference = logits(model, images)
    rng = np.random.default_rng(1)
    factors = [2.0 ** rng.uniform(-3, 3, len(stage.weight)) for stage in plain.chain.stages]
    stressed = with_chain(model, rescale(plain.chain, factors))
    found = {}
    for name, graph in (("plain", model), ("stressed", stressed)):
        for recipe in ("minmax", "full"):
            made = quantized(graph, images, recipe)
            found[name, recipe] = compare(reference, logits(made.graph, images)).sqnr_db
    assert found["plain", "minmax"] + 2 < found["plain", "full"]
    assert found["stressed", "minmax"] + 15 < found["stressed", "full"]
    assert abs(found["plain", "full"] - found["stressed", "full"]) < 1.5


def test_the_classifier_and_kept_convolutions_stay_float(model, images):
    """Everything else has integers, a scale per output channel and a 0-d activation scale."""
    made = quantized(model, images, "equalize", "stage1.0.conv")
    tensors = {t.name: numpy_helper.to_array(t) for t in made.graph.graph.initializer}
    kept = {node.name for node in quantizable(made.graph)}
    assert {"linear", "stage1.0.conv"} == kept
    scales = [tensors[n.input[1]] for n in made.graph.graph.node if n.op_type == "QuantizeLinear"]
    assert [()] * (len(read_chain(model).chain.stages) - 1) == [scale.shape for scale in scales]


def test_an_unknown_name_to_keep_is_refused(model, images):
    """The known convolutions are listed."""
    with pytest.raises(InputError, match=r"no convolution is called x; known: stage0\.conv"):
        quantized(model, images, "full", "x")


def test_the_command_line_knows_every_rung():
    """The names that may be typed are those of the ladder, in its order, and auto."""
    assert [*(rung.value for rung in Rung), "auto"] == [recipe.value for recipe in Recipe]
