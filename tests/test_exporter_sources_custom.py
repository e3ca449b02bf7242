"""Networks of the caller's own through export(): inputs, outputs, sizes, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from exporter import Bundle, export
from exporter.errors import GateFailedError, InputError
from exporter.network import Port
from exporter.sources.custom import array_images, example_tensors, module_source
from exporter.verify import verify
from models.repvgg import RepVGGBlock
from models.variants import ConvLayer

PORTS = (
    Port(name="image", shape=("batch", 3, "height", "width")),
    Port(name="vector", shape=("batch", 5)),
)


def block(inputs: int, outputs: int, stride: int = 1) -> RepVGGBlock:
    return RepVGGBlock(
        ConvLayer(name="", in_channels=inputs, out_channels=outputs, stride=stride, groups=1)
    )


class TwoInputs(nn.Module):
    """An image and a vector in; a map, and a dict with another map and tokens out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16, 2)
        self.body = block(16, 16)
        self.condition = nn.Linear(5, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Conv2d(8, 4, 1)
        self.tokens = nn.Linear(16, 6)

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.body(self.stem(image) + self.condition(vector)[:, :, None, None])
        up = nn.functional.relu6(self.up(x))
        coarse = self.head(nn.functional.avg_pool2d(up, 2))
        return self.head(up), {
            "coarse": coarse,
            "tokens": self.tokens(x.flatten(2).transpose(1, 2)),
        }


def batches(count: int, height: int = 32, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count)
    image = generator.standard_normal((count, 3, height, width)).astype(np.float32)
    return image, generator.standard_normal((count, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> TwoInputs:
    """Its BatchNorms have seen images."""
    torch.manual_seed(0)
    module = TwoInputs().train()
    with torch.no_grad():
        for _ in range(5):
            module(*map(torch.from_numpy, batches(8)))
    return module.eval()


@pytest.fixture(scope="module")
def bundle(network: TwoInputs, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """int8, open height and width, calibrated on two sizes."""
    return export(
        network,
        example_input=tuple(map(torch.from_numpy, batches(1))),
        precision="int8",
        calibration=iter([batches(20), batches(4), batches(6, 64, 32)]),
        targets="sm86",
        dynamic_size="32:32:64x32:48:64",
        out=tmp_path_factory.mktemp("custom") / "b",
    )


def test_inputs_and_outputs_are_named_and_open(bundle: Bundle) -> None:
    """Names are those of the forward and of what it returns; free extents are words."""
    manifest = bundle.manifest
    assert [
        {"name": "image", "shape": ["batch", 3, "height", "width"]},
        {"name": "vector", "shape": ["batch", 5]},
    ] == manifest["inputs"]
    assert ["output_0", "output_1_coarse", "output_1_tokens"] == [
        port["name"] for port in manifest["outputs"]
    ]
    assert ("TwoInputs", None, None) == (
        manifest["model"]["name"], manifest["model"]["variant"], manifest["preprocess"],
    )  # fmt: skip
    assert (30, "32:32:64x32:48:64") == (
        manifest["calibration"]["images"], manifest["spec"]["dynamic_size"],
    )  # fmt: skip


def test_every_output_is_compared_at_every_size(bundle: Bundle) -> None:
    """The calibration's own sizes and both ends of the profile; the row is the worst's."""
    rows = {row["stage"]: row for row in bundle.parity["stages"]}
    outputs = rows["int8"]["outputs"]
    sizes = {name.partition("@")[2] for name in outputs}
    assert {"", "64x32", "32x32", "64x64"} == sizes
    assert 12 == len(outputs)
    assert min(figures["sqnr_db"] for figures in outputs.values()) == rows["int8"]["sqnr_db"]
    assert {"min_sqnr_db": 25.0} == rows["int8"]["tolerance"]
    assert "pass" == bundle.parity["verdict"]


def test_blocks_are_listed_and_the_rest_allowed(bundle: Bundle) -> None:
    """The manifest has every block's own equivalence and the contract's verdict."""
    found = bundle.manifest["reparameterization"]
    assert ["stem", "body"] == [entry["name"] for entry in found["blocks"]]
    assert max(entry["relative"] for entry in found["blocks"]) == found["worst_relative"] < 1e-5
    contract = bundle.manifest["contract"]
    assert ("pass", 4, 2) == tuple(contract[k] for k in ("verdict", "convolutions", "blocks"))
    assert (2, 1) == (
        contract["allowed_extras"]["Conv"], contract["allowed_extras"]["ConvTranspose"],
    )  # fmt: skip


def test_nodes_are_named_after_modules(bundle: Bundle) -> None:
    """Convolutions, their parameters and what they compute carry the module's name."""
    graph = onnx.load(bundle.path / "model.onnx").graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert [
        "stem.rbr_reparam.conv", "body.rbr_reparam.conv", "head.conv", "head_1.conv",
    ] == [node.name for node in convolutions]  # fmt: skip
    assert ["head.weight"] * 2 == [node.input[1] for node in convolutions[2:]]
    assert "stem.rbr_reparam.conv.output" == convolutions[0].output[0]
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
              for v in (*graph.input, *graph.output)}  # fmt: skip
    ports = (*bundle.manifest["inputs"], *bundle.manifest["outputs"])
    assert {port["name"]: port["shape"] for port in ports} == shapes
    names = {tensor.name for tensor in graph.initializer}
    assert {"up.weight", "up.bias", "tokens.bias", "condition.weight"} <= names


def test_every_convolution_of_the_engine_is_int8(bundle: Bundle) -> None:
    """The engine is held to the number of convolutions that the graph has."""
    engine = json.loads((bundle.path / "engine.json").read_text())
    assert {"total": 4, "int8": 4, "half": 0, "float": 0, "bf16": 0, "fp8": 0} == engine[
        "convolutions"
    ]


def exported(network: TwoInputs, out: Path, **options: Any) -> Bundle:
    return export(
        network,
        example_input=tuple(map(torch.from_numpy, batches(1))),
        calibration=iter([batches(20), batches(4), batches(6, 64, 32)]),
        dynamic_size="32:32:64x32:48:64",
        out=out,
        **options,
    )


@pytest.mark.parametrize(("precision", "target"), [("bf16", "h100"), ("fp8", "sm89")])
def test_the_other_narrow_types_take_the_same_road(
    network: TwoInputs, tmp_path: Path, precision: str, target: str
) -> None:
    """Several inputs and outputs, open sizes and what is no convolution included."""
    made = exported(network, tmp_path / "b", precision=precision, targets=target)
    ledger = verify(made)
    assert ("pass", ["simplified", precision, "engine"]) == (
        ledger.verdict,
        [row.stage for row in ledger.stages],
    )
    inputs, _ = made.reference()
    assert (8, 4, 32, 48) == made.run(inputs)["output_0"].shape
    engine = json.loads((made.path / "engine.json").read_text())
    if precision == "fp8":
        assert {"total": 4, "fp8": 4} == {k: v for k, v in engine["convolutions"].items() if v}
    else:
        assert "deferred" == engine["status"]


def test_tensorrt_rtx_has_no_bfloat16_transposed_convolution(
    network: TwoInputs, tmp_path: Path
) -> None:
    """The builder's own words say which node; nothing is published."""
    with pytest.raises(GateFailedError, match=r"Could not infer output types .*up\.convtranspose"):
        exported(network, tmp_path / "b", precision="bf16", targets="sm89")
    assert not (tmp_path / "b").exists()


def test_a_custom_bundle_runs_and_verifies(bundle: Bundle, network: TwoInputs) -> None:
    """run takes a tuple, at any size of the profile, and returns a dict; verify passes."""
    inputs, outputs = bundle.reference()
    assert list(outputs) == list(bundle.run(inputs))
    assert (8, 4, 32, 48) == outputs["output_0"].shape
    with torch.no_grad():
        expected, _ = network(*map(torch.from_numpy, inputs))
    np.testing.assert_allclose(expected.numpy(), outputs["output_0"], atol=1e-5)
    assert (2, 4, 64, 40) == bundle.run(batches(2, 64, 40))["output_0"].shape
    ledger = verify(bundle)
    assert ("pass", ["simplified", "int8", "engine"]) == (
        ledger.verdict, [row.stage for row in ledger.stages],
    )  # fmt: skip


def test_the_report_lists_outputs_and_extras(bundle: Bundle) -> None:
    """People see the breakdown, the blocks and how to make it again."""
    report = (bundle.path / "report.html").read_text()
    expected = (
        "TwoInputs at int8",
        "output_1_tokens@64x64",
        "2 of them fused blocks",
        "2 blocks; the worst",
        "1 ConvTranspose",
        "exporter.export(TwoInputs(...)",
    )
    for words in expected:
        assert words in report
    assert 'classname="repvgg.TwoInputs.int8"' in (bundle.path / "junit.xml").read_text()


class Frozen(nn.Module):
    """Python turns a shape into a number, which tracing freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.stem(image) / float(image.shape[2])


def test_what_tracing_freezes_is_found_at_another_size(tmp_path: Path) -> None:
    """The graph is right at the example's size and wrong at the profile's end: refused."""
    with pytest.raises(GateFailedError, match=r"output output@64x64: .* tracing freezes") as e:
        export(
            Frozen().eval(),
            example_input=torch.zeros(1, 3, 32, 32),
            precision="fp32",
            calibration=batches(4, 32, 32)[0],
            dynamic_size="32:32:64",
            targets="sm86",
            out=tmp_path / "b",
        )
    assert "at stage onnx" in str(e.value)
    assert "; the first layer that deviates is output: its own error is " in str(e.value)
    assert {"b.failed.html", "b.failed.json"} == {path.name for path in tmp_path.iterdir()}


def test_several_inputs_need_arrays(network: TwoInputs, tmp_path: Path) -> None:
    """A folder of images cannot feed two inputs; int8 without calibration says what to pass."""
    example = tuple(map(torch.from_numpy, batches(1)))
    with pytest.raises(InputError, match=r"not one image .*: pass calibration= arrays"):
        export(network, example_input=example, out=tmp_path / "b")
    with pytest.raises(InputError, match="example_input fixes the image size"):
        export(network, example_input=example, image_size="64", out=tmp_path / "b")


def test_a_module_without_blocks_is_refused(tmp_path: Path) -> None:
    """The message explains what a block is."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(InputError, match="no RepVGG-style block was found in Sequential"):
        export(
            plain,
            example_input=torch.zeros(1, 3, 8, 8),
            precision="fp32",
            calibration=batches(2, 8, 8)[0],
            out=tmp_path / "b",
        )
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "needs example_input, a float tensor"),
        ((), "needs tensors with one batch size"),
        (torch.zeros(2, 3, dtype=torch.int64), r"is torch.int64 \[2, 3\], expected float"),
        (torch.zeros(3), r"is torch.float32 \[3\]"),
        ((torch.zeros(2, 3), "x"), "is str, expected float"),
        ((torch.zeros(2, 3), torch.zeros(1, 3)), "one batch size"),
        (torch.zeros(0, 3), "one batch size, at least 1"),
    ],
)
def test_examples_are_float_tensors_of_one_batch(example: Any, message: str) -> None:
    """Each refusal names what was passed."""
    with pytest.raises(InputError, match=message):
        example_tensors(example, nn.Identity())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (batches(2)[0], "calibration holds 1 arrays, expected one an input: image, vector"),
        ((batches(2)[0], batches(3)[1]), "calibration holds 2 of image and 3 of vector"),
        ((batches(2)[1], batches(2)[1]), r"float32 \[2, 5\], expected float32 \[N, 3, H, W\]"),
        ([("a", "b")], "calibration holds str, expected float32"),
        ((batches(2)[0] * np.nan, batches(2)[1]), "holds NaN or Inf"),
        ([], "calibration holds no images"),
        (tuple(array[:0] for array in batches(2)), "calibration holds no images"),
    ],
)
def test_arrays_must_fit_the_inputs(arrays: Any, message: str) -> None:
    """Number, shape, type and values are checked before any work."""
    with pytest.raises(InputError, match=message):
        array_images(arrays, "calibration", PORTS)


def test_the_weights_hash_sees_bfloat16() -> None:
    """Modules in half types are copied to float32; their own bits are hashed."""
    module = nn.Sequential(block(3, 4)).eval().bfloat16()
    source = module_source(module, (torch.zeros(1, 3, 8, 8),), None)
    assert torch.float32 == next(source.module.parameters()).dtype
    assert torch.bfloat16 == next(module.parameters()).dtype
    assert 64 == len(source.origin["sha256"])
