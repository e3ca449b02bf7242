"""Networks with gates, and chains of depthwise and pointwise convolutions, on the INT8 ladder."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from calibration.chain import rescale
from calibration.recipe import RecipeOptions
from exporter.graph import quantizable
from exporter.network import classifier_interface
from exporter.onnx_export import export_network
from exporter.parity import compare
from exporter.quantization.chain_observer import observe_chain
from exporter.quantization.chain_quantizer import QuantizedGraphs, quantize_observed
from exporter.quantization.plain_chain import read_chain, with_chain
from exporter.running.image_set import ArrayImages
from exporter.running.onnx_runner import OnnxRunner
from models import RepVGG, Variant
from models.fusion import reparameterize
from models.repvgg import RepVGGBlock
from models.variants import ConvLayer, Squeeze

pytestmark = pytest.mark.usefixtures("one_thread")


def images_of(seed: int, count: int) -> np.ndarray:
    """Noise of another colour and contrast in every image, or all of them would look alike."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, 3, 32, 32)) * rng.uniform(0.2, 1.5, (count, 1, 1, 1))
    return (noise + rng.normal(size=(count, 3, 1, 1))).astype(np.float32)


CALIBRATION, HELD_OUT = images_of(0, 64), images_of(1, 64)


def gated(squeeze: Squeeze) -> nn.Module:
    variant = Variant(
        name="gated",
        num_blocks=(1, 2, 1, 1),
        width_multiplier=(0.25, 0.25, 0.125, 0.0625),
        squeeze=squeeze,
        squeeze_reduction=4,
    )
    return RepVGG(variant, num_classes=6)


class Separable(nn.Module):
    """MobileOne's layout: depthwise and pointwise blocks in turn, and its head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [self._block(3, 16, 2)]
        for inputs, outputs, stride in [(16, 24, 1), (24, 32, 2), (32, 32, 1)]:
            layers += [self._block(inputs, inputs, stride, groups=inputs)]
            layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.linear = nn.Linear(32, 6)

    def _block(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> RepVGGBlock:
        layer = ConvLayer(
            name="", in_channels=inputs, out_channels=outputs, stride=stride, groups=groups
        )
        return RepVGGBlock(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.body(x), 1)
        return self.linear(x.view(x.size(0), -1))


NETWORKS = {
    "gate before ReLU": lambda: gated(Squeeze.BEFORE_RELU),
    "gate after ReLU": lambda: gated(Squeeze.AFTER_RELU),
    "separable": Separable,
}


@pytest.fixture(scope="module", params=NETWORKS)
def model(request) -> onnx.ModelProto:
    """Exported, with BatchNorms that have seen the images."""
    torch.manual_seed(0)
    module = NETWORKS[request.param]()
    with torch.no_grad():
        for _ in range(10):
            module.train()(torch.from_numpy(CALIBRATION))
    fused = reparameterize(module.eval())
    return export_network(fused, classifier_interface((32, 32), 6, None), request.param, {})


def quantized(
    model: onnx.ModelProto, *recipes: str, keep_float: tuple[str, ...] = ()
) -> list[QuantizedGraphs]:
    plain = read_chain(model)
    assert plain is not None
    observed = observe_chain(model, plain, ArrayImages.of(CALIBRATION))
    options = RecipeOptions(keep_float=frozenset(keep_float))
    return [quantize_observed(model, plain, observed, r, options=options) for r in recipes]


def logits(model: onnx.ModelProto) -> np.ndarray:
    (found,) = OnnxRunner(model).run((HELD_OUT,)).values()
    return np.asarray(found)


def test_full_beats_mse_and_does_not_mind_a_rescaled_network(model):
    """On held-out images; where channels were rescaled by 2^U(-3, 3), mse falls far behind."""
    chain = read_chain(model).chain
    rng = np.random.default_rng(1)
    factors = [2.0 ** rng.uniform(-3, 3, len(stage.weight)) for stage in chain.stages]
    stressed = with_chain(model, rescale(chain, factors))
    reference = logits(model)
    (mse, full), (stressed_mse, stressed_full) = (
        [compare(reference, logits(made.graph)).sqnr_db for made in quantized(graph, "mse", "full")]
        for graph in (model, stressed)
    )
    assert mse - 0.3 < full  # less is noise
    assert stressed_mse + 8 < stressed_full
    assert abs(full - stressed_full) < 1.5


def test_equalization_leaves_the_float_network(model):
    """The rescaled graph, gates included, computes the same logits."""
    (made,) = quantized(model, "equalize")
    assert compare(logits(model), logits(made.model)).relative < 1e-5


def test_gates_and_the_classifier_stay_float(model):
    """Every stage is quantized and nothing else; naming what stays float changes nothing."""
    plain = read_chain(model)
    (made,) = quantized(model, "equalize", keep_float=plain.float_nodes)
    assert {*plain.float_nodes} == {node.name for node in quantizable(made.graph)}
    assert {*plain.boundaries[:-1]} == {*made.table.activation_scales}
