"""Which graphs are read as a chain, that the chain computes what they do, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from calibration.chain import rescale
from calibration.convolution import run_chain
from exporter.errors import InputError
from exporter.network import classifier_interface
from exporter.onnx_export import export_network, export_onnx
from exporter.quantization.plain_chain import PlainChain, read_chain, with_chain
from exporter.running.onnx_runner import OnnxRunner
from exporter.simplify import simplify, started_simplifier
from models import RepVGG, Variant
from models.fusion import reparameterize
from models.variants import Squeeze

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Variant(name="tiny", num_blocks=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))
GATED = Variant(
    name="gated",
    num_blocks=(1, 1, 1, 1),
    width_multiplier=(0.25, 0.25, 0.125, 0.0625),
    squeeze_reduction=4,
)
IMAGES = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)


def exported(module: nn.Module) -> onnx.ModelProto:
    return export_network(module.eval(), classifier_interface((32, 32), 6, None), "network", {})


def gated(squeeze: Squeeze) -> onnx.ModelProto:
    torch.manual_seed(0)
    module = RepVGG(replace(GATED, squeeze=squeeze), num_classes=6).eval()
    return exported(reparameterize(module))


@pytest.fixture(scope="module")
def models() -> dict[str, onnx.ModelProto]:
    torch.manual_seed(0)
    plain = export_onnx(reparameterize(RepVGG(TINY, num_classes=6).eval()), (32, 32), {})
    gates = {s.value: gated(s) for s in (Squeeze.BEFORE_RELU, Squeeze.AFTER_RELU)}
    return {"plain": plain, **gates}


def read(model: onnx.ModelProto) -> PlainChain:
    found = read_chain(model)
    assert found is not None
    return found


def logits(model: onnx.ModelProto) -> np.ndarray:
    (found,) = OnnxRunner(model).run((IMAGES,)).values()
    return np.asarray(found)


def require_close(expected: np.ndarray, found: np.ndarray) -> None:
    assert np.abs(expected - found).max() < 1e-5 * np.ptp(expected)


def test_a_plain_graph_is_a_chain_of_its_convolutions(models):
    """Names, shapes and boundaries are the graph's; only the classifier stays float."""
    plain = read(models["plain"])
    convolutions = [node for node in models["plain"].graph.node if node.op_type == "Conv"]
    assert [node.name for node in convolutions] == [s.name for s in plain.chain.stages]
    assert (*(node.input[0] for node in convolutions), "stage4.0.output") == plain.boundaries
    assert ("linear",) == plain.float_nodes


@pytest.mark.parametrize("squeeze", [Squeeze.BEFORE_RELU, Squeeze.AFTER_RELU])
def test_a_gate_belongs_to_its_stage(models, squeeze):
    """Its convolutions are no stages of their own, and stay float; its place is the graph's."""
    found = read(models[squeeze.value])
    names = [f"stage{index}.0" if index else "stage0" for index in range(5)]
    assert [f"{name}.rbr_reparam.conv" for name in names] == [s.name for s in found.chain.stages]
    after = squeeze is Squeeze.AFTER_RELU
    assert [after] * 5 == [s.gate and s.gate.after_relu for s in found.chain.stages]
    inside = [f"{name}.se.{part}.conv" for name in names for part in ("down", "up")]
    assert (*inside, "linear.gemm") == found.float_nodes
    last = "stage4.0.se.mul.output" if after else "stage4.0.nonlinearity.relu.output"
    assert ("images", last) == (found.boundaries[0], found.boundaries[-1])


@pytest.mark.parametrize("name", ["plain", "before_relu", "after_relu"])
def test_the_chain_computes_what_the_graph_does_and_so_does_a_rescaled_one(models, name):
    """By numpy and by ONNX Runtime, also with every boundary rescaled by 2^U(-3, 3)."""
    model = models[name]
    chain = read(model).chain
    require_close(logits(model), run_chain(chain, IMAGES))
    rng = np.random.default_rng(1)
    moved = rescale(chain, [2.0 ** rng.uniform(-3, 3, len(s.weight)) for s in chain.stages])
    require_close(logits(model), run_chain(moved, IMAGES))
    require_close(logits(model), logits(with_chain(model, moved)))


@pytest.mark.parametrize("name", ["plain", "before_relu", "after_relu"])
def test_what_was_read_is_written_back_unchanged(models, name):
    """``with_chain(model, read_chain(model).chain)`` is ``model``, byte for byte."""
    model = models[name]
    again = with_chain(model, read(model).chain)
    assert model.SerializeToString() == again.SerializeToString()


def test_a_chain_is_not_written_into_another_graph(models):
    """The stages must be the graph's."""
    with pytest.raises(ValueError, match="does not have the stages"):
        with_chain(models["plain"], read(models["before_relu"]).chain)


class Separable(nn.Module):
    """Depthwise and pointwise convolutions without biases, one directly behind another."""

    def __init__(self, head: Callable[[nn.Module, Tensor], Tensor], *, bias: bool = True) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 12, 3, stride=2, padding=(1, 0), groups=3, bias=False)
        self.point = nn.Conv2d(12, 16, 1, bias=False)
        self.grouped = nn.Conv2d(16, 8, 3, groups=4, dilation=2)
        self.linear = nn.Linear(8, 6, bias=bias)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.point(self.depthwise(x)))
        return self.head(self, self.grouped(x))


def pooled(x: Tensor) -> Tensor:
    return nn.functional.adaptive_avg_pool2d(x, 1)


HEADS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "flatten": lambda m, x: m.linear(torch.flatten(pooled(x), 1)),
    "view": lambda m, x: m.linear(pooled(x).view(x.size(0), -1)),
    "squeeze": lambda m, x: m.linear(pooled(x).squeeze(-1).squeeze(-1)),
    "mean": lambda m, x: m.linear(x.mean((2, 3))),
    "mean of a kept size": lambda m, x: m.linear(x.mean((-1, -2), keepdim=True).flatten(1)),
    "average pool": lambda m, x: m.linear(nn.functional.avg_pool2d(x, (12, 11)).flatten(1)),
    "addmm": lambda m, x: torch.addmm(m.linear.bias, x.mean((2, 3)), m.linear.weight.T),
    "product and sum": lambda m, x: m.linear.bias + pooled(x).flatten(1) @ m.linear.weight.T,
}


@pytest.mark.parametrize("head", HEADS)
def test_every_way_to_write_the_head_is_read_and_written(head):
    """Depthwise, pointwise and grouped stages, with ReLU or none, in front of each head."""
    torch.manual_seed(0)
    model = exported(Separable(HEADS[head]))
    chain = read(model).chain
    assert [3, 1, 4] == [stage.groups for stage in chain.stages]
    assert [False, True, False] == [stage.relu for stage in chain.stages]
    require_close(logits(model), run_chain(chain, IMAGES))
    again = with_chain(model, chain)
    assert model.SerializeToString() == again.SerializeToString()


@pytest.mark.parametrize("head", ["flatten", "mean"])
def test_a_missing_bias_is_added_where_one_is_needed(head):
    """A bias correction reaches convolutions and classifiers that had no bias."""
    torch.manual_seed(0)
    model = exported(Separable(HEADS[head], bias=False))
    chain = read(model).chain
    assert not chain.classifier.bias.any()
    stages = tuple(replace(s, bias=np.arange(len(s.bias)) / 9.0) for s in chain.stages)
    classifier = replace(chain.classifier, bias=np.arange(6.0))
    moved = replace(chain, stages=stages, classifier=classifier)
    written = with_chain(model, moved)
    onnx.checker.check_model(written)
    require_close(run_chain(moved, IMAGES), logits(written))
    np.testing.assert_array_equal(np.arange(6), read(written).chain.classifier.bias)


class OfficialGate(nn.Module):
    """The block of the official RepVGG code, which pools and reshapes by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.down = nn.Conv2d(8, 2, 1)
        self.up = nn.Conv2d(2, 8, 1, bias=False)
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        opening = self.down(nn.functional.avg_pool2d(y, kernel_size=y.size(3)))
        opening = torch.sigmoid(self.up(torch.relu(opening)))
        y = torch.relu(y * opening.view(-1, 8, 1, 1))
        return self.linear(pooled(y).flatten(1))


def test_the_official_gate_is_read_behind_the_simplifier():
    """It averages a window as large as the map; with a smaller window it is no gate."""
    torch.manual_seed(0)
    with started_simplifier() as simplifier:
        model = simplify(exported(OfficialGate()), [(IMAGES,)], simplifier)
    chain = read(model).chain
    assert chain.stages[0].gate is not None
    assert not chain.stages[0].gate.after_relu
    require_close(logits(model), run_chain(chain, IMAGES))
    pool = node_of(model, "AveragePool")
    (window,) = [found for found in pool.attribute if found.name == "kernel_shape"]
    window.ints[:] = [15, 14]
    assert read_chain(model) is None


def node_of(model: onnx.ModelProto, op: str, index: int = 0) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == op][index]


def become(op: str, index: int, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node_of(model, op, index).op_type = new

    return change


def attribute(op: str, name: str, value: object) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node_of(model, op).attribute.append(onnx.helper.make_attribute(name, value))

    return change


def add_reader(model: onnx.ModelProto) -> None:
    read_twice = node_of(model, "Relu").output[0]
    model.graph.node.append(onnx.helper.make_node("Neg", [read_twice], ["other"], name="other"))


def add_output(model: onnx.ModelProto) -> None:
    name = node_of(model, "Relu").output[0]
    float_type = onnx.TensorProto.FLOAT
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, float_type, None))


def share_weights(model: onnx.ModelProto) -> None:
    first, second = node_of(model, "Conv", 2), node_of(model, "Conv", 4)
    second.input[1] = first.input[1]


CHANGES: dict[str, tuple[str, Callable[[onnx.ModelProto], None]]] = {
    "Clip": ("plain", become("Relu", 1, "Clip")),
    "LeakyRelu": ("plain", become("Relu", 0, "LeakyRelu")),
    "max pooling in front of the classifier": (
        "plain",
        become("GlobalAveragePool", 0, "GlobalMaxPool"),
    ),
    "a scaled classifier": ("plain", attribute("Gemm", "alpha", 2.0)),
    "automatic padding": ("plain", attribute("Conv", "auto_pad", "SAME_UPPER")),
    "a second reader": ("plain", add_reader),
    "a second output": ("plain", add_output),
    "weights of two layers": ("plain", share_weights),
    "a gate with max pooling": ("before_relu", become("GlobalAveragePool", 2, "GlobalMaxPool")),
    "a gate with HardSigmoid": ("after_relu", become("Sigmoid", 1, "HardSigmoid")),
    "a gate that is added": ("after_relu", become("Mul", 0, "Add")),
    "a gate without ReLU": ("before_relu", become("Relu", 0, "Sqrt")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_not_commute_with_scaling_is_no_chain(models, change):
    """Another nonlinearity, another reader, shared weights or another head give None."""
    name, edit = CHANGES[change]
    other = onnx.ModelProto()
    other.CopyFrom(models[name])
    edit(other)
    assert read_chain(other) is None


@pytest.mark.parametrize("place", ["pool", "product"])
def test_a_gate_between_two_tensors_is_no_chain(models, place):
    """The gate must pool what it multiplies: the convolution's result, or the ReLU's."""
    other = onnx.ModelProto()
    other.CopyFrom(models["after_relu"])
    before = node_of(other, "Conv").output[0]
    if place == "pool":
        node_of(other, "GlobalAveragePool").input[0] = before
    else:
        product = node_of(other, "Mul")
        product.input[0] = before
    assert read_chain(other) is None


def test_weights_that_are_no_numbers_are_refused(models):
    """A NaN in a gate names the stage."""
    other = onnx.ModelProto()
    other.CopyFrom(models["before_relu"])
    name = "stage1.0.se.up.weight"
    (tensor,) = [t for t in other.graph.initializer if t.name == name]
    values = np.array(onnx.numpy_helper.to_array(tensor))
    values[1] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    with pytest.raises(InputError, match=r"stage1\.0\.rbr_reparam\.conv: a weight or bias of the"):
        read_chain(other)
