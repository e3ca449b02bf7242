"""Deploy module -> ONNX: only Conv, Relu and the head, under the checkpoint's names."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporter.onnx_export import INPUT_NAME, OPSET, OUTPUT_NAME, export_onnx
from exporter.running.onnx_runner import OnnxRunner
from models.fusion import reparameterize
from models.repvgg import RepVGG
from models.variants import VARIANTS, Variant

SMALL = Variant(name="A0", num_blocks=(1, 1, 2, 1), width_multiplier=(0.125, 0.125, 0.125, 0.125))
GROUPED = Variant(
    name="B1g2", num_blocks=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25), groups=2
)


def deploy_form(variant: Variant) -> RepVGG:
    torch.manual_seed(0)
    module = RepVGG(variant, num_classes=10)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, torch.nn.BatchNorm2d):
                child.bias.normal_(std=0.2)
                child.momentum = None
        module.train()(torch.randn(8, 3, 64, 64))
    fused = reparameterize(module.eval())
    assert isinstance(fused, RepVGG)
    return fused


def noise(count: int, height: int = 32, width: int = 32) -> np.ndarray:
    generator = np.random.default_rng(count)
    return generator.standard_normal((count, 3, height, width)).astype(np.float32)


def torch_logits(module: RepVGG, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(images)).numpy()


def relative(expected: np.ndarray, actual: np.ndarray) -> float:
    return float(np.max(np.abs(expected - actual)) / np.ptp(expected))


@pytest.fixture(scope="module")
def module() -> RepVGG:
    return deploy_form(SMALL)


@pytest.fixture(scope="module")
def model(module: RepVGG) -> onnx.ModelProto:
    return export_onnx(module, (32, 32), {"variant": "A0", "weights_sha256": "0" * 64})


@pytest.mark.parametrize("variant", [SMALL, GROUPED], ids=lambda variant: variant.name)
def test_graph_is_conv_relu_pairs_and_three_head_nodes(variant: Variant) -> None:
    """The operators are exactly (Conv, Relu) * n, GlobalAveragePool, Flatten, Gemm."""
    model = export_onnx(deploy_form(variant), (32, 32), {})
    expected = ["Conv", "Relu"] * len(variant.layers) + ["GlobalAveragePool", "Flatten", "Gemm"]
    assert expected == [node.op_type for node in model.graph.node]


def test_full_a0_exports_and_computes_the_same() -> None:
    """A full A0 has 22 convolutions in the plain graph and torch's logits within 1e-5."""
    module = deploy_form(VARIANTS["A0"])
    model = export_onnx(module, (64, 64), {})
    assert 22 == sum(node.op_type == "Conv" for node in model.graph.node)
    assert len(model.graph.node) == 47
    images = noise(2, 64, 64)
    assert relative(torch_logits(module, images), OnnxRunner(model)(images)) < 1e-5


def test_equal_parameters_stay_apart() -> None:
    """Layers whose biases are equal (all zero, fresh BatchNorm) still own one bias each."""
    module = reparameterize(RepVGG(SMALL, num_classes=10).eval())
    assert isinstance(module, RepVGG)
    model = export_onnx(module, (32, 32), {})
    assert {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"} == {
        node.op_type for node in model.graph.node
    }
    for layer, node in zip(
        SMALL.layers, [n for n in model.graph.node if n.op_type == "Conv"], strict=True
    ):
        assert [f"{layer.name}.weight", f"{layer.name}.bias"] == list(node.input[1:])
    stored = {tensor.name for tensor in model.graph.initializer}
    assert {name for node in model.graph.node for name in node.input} <= stored | {
        INPUT_NAME,
        *(node.output[0] for node in model.graph.node),
    }


def test_opset_is_17(model: onnx.ModelProto) -> None:
    """The default domain's opset is 17, the newest one that TensorRT 8.6 reads."""
    assert 17 == OPSET
    assert [("", 17)] == [(entry.domain, entry.version) for entry in model.opset_import]


def test_batch_axis_is_free_and_the_others_are_fixed(model: onnx.ModelProto) -> None:
    """Input and output have a symbolic first axis; height, width and classes are numbers."""
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (model.graph.input[0], model.graph.output[0])
    ]
    assert [["batch", 3, 32, 32], ["batch", 10]] == shapes


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_logits_equal_torch_at_any_batch_size(
    module: RepVGG, model: onnx.ModelProto, batch: int
) -> None:
    """ONNX Runtime and torch agree within 1e-5 of the logits' range."""
    images = noise(batch)
    actual = OnnxRunner(model)(images)
    assert (batch, 10) == actual.shape
    assert relative(torch_logits(module, images), actual) < 1e-5


@pytest.mark.parametrize("size", [(32, 64), (96, 32), (33, 47)])
def test_height_and_width_may_differ(module: RepVGG, size: tuple[int, int]) -> None:
    """Non-square and odd sizes export and compute the same as torch."""
    images = noise(2, *size)
    actual = OnnxRunner(export_onnx(module, size, {}))(images)
    assert relative(torch_logits(module, images), actual) < 1e-5


def test_names_are_the_checkpoints(model: onnx.ModelProto) -> None:
    """Nodes and parameters carry the layer names of the official code."""
    body = [f"{layer.name}.{kind}" for layer in SMALL.layers for kind in ("conv", "relu")]
    assert [*body, "head.pool", "head.flatten", "linear"] == [n.name for n in model.graph.node]
    parameters = {f"{layer.name}.{k}" for layer in SMALL.layers for k in ("weight", "bias")}
    assert parameters | {"linear.weight", "linear.bias"} == {
        tensor.name for tensor in model.graph.initializer
    }
    assert ("images", "logits") == (INPUT_NAME, OUTPUT_NAME)
    assert [INPUT_NAME] == [value.name for value in model.graph.input]
    assert [OUTPUT_NAME] == [value.name for value in model.graph.output]


def test_tensors_can_go_into_a_calibration_cache(model: onnx.ModelProto) -> None:
    """No tensor name has a colon or white space, which TensorRT's cache cannot hold."""
    names = [name for node in model.graph.node for name in (*node.input, *node.output)]
    assert [] == [name for name in names if not name or set(name) & set(": \t\n")]


def test_parameters_are_torchs_bit_for_bit(module: RepVGG, model: onnx.ModelProto) -> None:
    """Export rounds nothing: stage1.0.weight is the fused kernel itself."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kernel = module.stage1[0].rbr_reparam.weight.detach().numpy()
    np.testing.assert_array_equal(kernel, stored["stage1.0.weight"])


def test_metadata_is_in_the_model(model: onnx.ModelProto) -> None:
    """The metadata is in metadata_props, and the graph is named after the variant."""
    assert {"variant": "A0", "weights_sha256": "0" * 64} == {
        entry.key: entry.value for entry in model.metadata_props
    }
    assert "RepVGG-A0" == model.graph.name


def test_no_warning_leaks(module: RepVGG) -> None:
    """The TorchScript exporter's deprecation notice does not reach the caller."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(module, (32, 32), {})
    assert [] == [str(entry.message) for entry in caught]


def test_module_is_untouched(module: RepVGG) -> None:
    """Exporting changes neither the module's parameters nor its mode."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    export_onnx(module, (32, 32), {})
    assert not any(child.training for child in module.modules())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
