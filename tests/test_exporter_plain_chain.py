"""A plain graph is read as a chain, equalized exactly, and written back as integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from calibration.chain import rescale
from calibration.recipe import Recipe as Rung
from exporter.errors import InputError
from exporter.graph import quantizable
from exporter.image_set import ArrayImages
from exporter.onnx_export import export_onnx
from exporter.onnx_runner import OnnxRunner
from exporter.parity import compare
from exporter.plain_chain import PlainChain, quantize_chain_graph, read_chain, with_chain
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


def test_a_plain_graph_is_a_chain_of_its_convolutions(model):
    """Names, shapes and boundaries are the graph's."""
    plain = read_chain(model)
    assert plain is not None
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [node.name for node in convolutions] == [s.name for s in plain.chain.stages]
    assert (*(node.input[0] for node in convolutions), "stage4.0.output") == plain.boundaries


@pytest.mark.parametrize("change", ["relu", "head", "branch", "alpha"])
def test_anything_else_is_no_chain(model, change):
    """A missing ReLU, another head, a further node or a scaled classifier give None."""
    other = onnx.ModelProto()
    other.CopyFrom(model)
    nodes = list(other.graph.node)
    if change == "relu":
        nodes[2].input[0] = nodes[0].output[0]
        del other.graph.node[1]
    elif change == "head":
        nodes[-3].op_type = "GlobalMaxPool"
    elif change == "branch":
        other.graph.node.insert(
            2, onnx.helper.make_node("Identity", [nodes[1].output[0]], ["branch"])
        )
    else:
        nodes[-1].attribute.append(onnx.helper.make_attribute("alpha", 2.0))
    assert read_chain(other) is None


@pytest.mark.parametrize("recipe", ["minmax", "equalize", "full"])
def test_equalization_leaves_the_float_network_and_the_table_binds_to_it(model, images, recipe):
    """The rescaled float graph computes the same, and the table carries its hash."""
    import hashlib

    made = quantize_chain_graph(model, read_chain(model), images, recipe)
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
            made = quantize_chain_graph(graph, read_chain(graph), images, recipe)
            found[name, recipe] = compare(reference, logits(made.graph, images)).sqnr_db
    assert found["plain", "minmax"] + 3 < found["plain", "full"]
    assert found["stressed", "minmax"] + 15 < found["stressed", "full"]
    assert abs(found["plain", "full"] - found["stressed", "full"]) < 1.5


def test_the_classifier_and_kept_convolutions_stay_float(model, images):
    """Everything else has integers, a scale per output channel and a 0-d activation scale."""
    made = quantize_chain_graph(
        model, read_chain(model), images, "equalize", keep_float=("stage1.0.conv",)
    )
    tensors = {t.name: numpy_helper.to_array(t) for t in made.graph.graph.initializer}
    kept = {node.name for node in quantizable(made.graph)}
    assert {"linear", "stage1.0.conv"} == kept
    scales = [tensors[n.input[1]] for n in made.graph.graph.node if n.op_type == "QuantizeLinear"]
    assert [()] * (len(read_chain(model).chain.stages) - 1) == [scale.shape for scale in scales]


def test_an_unknown_name_to_keep_is_refused(model, images):
    """The known convolutions are listed."""
    plain: PlainChain = read_chain(model)
    with pytest.raises(InputError, match=r"no convolution is called x; known: stage0\.conv"):
        quantize_chain_graph(model, plain, images, "full", keep_float=("x",))


def test_the_command_line_knows_every_rung():
    """The names that may be typed are those of the ladder, in its order."""
    assert [rung.value for rung in Rung] == [recipe.value for recipe in Recipe]
