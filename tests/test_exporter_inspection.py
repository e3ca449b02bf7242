"""Inspection: each kind of file is told for what it is, trouble is counted and not refused."""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from calibration.table import CalibrationTable, TensorRange
from exporter.bundle import file_sha256
from exporter.bundle.writer import BundleWriter
from exporter.errors import InputError
from exporter.inspection import Inspection, Kind, Outlook, inspect_file
from exporter.inspection.outlook import kernel_outlook
from exporter.inspection.tables import tables
from exporter.inspection.weights import kernel_outlooks
from models.checkpoint import identify, read_checkpoint_file
from models.registry import bundled_weights
from models.repvgg import QAREPVGG, REPVGG, RepVGG, mobileone
from models.variants import VARIANTS, Squeeze, Variant

A0 = bundled_weights("A0").checkpoint
CONTRACT = {"kind", "format", "form", "variant", "num_classes", "parameters", "nan_count"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The bundled A0's tensors."""
    return load_file(A0)


@pytest.fixture(scope="module")
def bundled() -> Inspection:
    """The bundled A0, inspected."""
    return inspect_file(A0)


def without_data(path: Path, module: RepVGG) -> Path:
    """A file with a network's names and shapes and no numbers."""
    torch.save(module.state_dict(), path)
    return path


def on_meta(variant: str, **options: object) -> RepVGG:
    with torch.device("meta"):
        return RepVGG(VARIANTS[variant], num_classes=4, **options)


# --- checkpoints -------------------------------------------------------------------------------


def test_the_bundled_checkpoint_is_described(bundled):
    """The names of the contract are there, with the file's size and hash."""
    document = json.loads(json.dumps(bundled.to_json(), allow_nan=False))
    assert CONTRACT <= document.keys()
    expected = {
        "kind": "checkpoint",
        "format": "official",
        "form": "train",
        "variant": "A0",
        "num_classes": 10,
        "nan_count": 0,
        "inf_count": 0,
        "bytes": A0.stat().st_size,
        "sha256": file_sha256(A0),
        "wrappers_removed": [],
        "prefixes_removed": [],
        "dtypes": {"float32": 245, "float16": 45},
        "container": "safetensors",
    }
    assert expected == {key: document[key] for key in expected}
    assert document["parameters"] == sum(
        p.numel() for p in RepVGG(VARIANTS["A0"], num_classes=10).parameters()
    )


def test_the_outlook_sees_the_identity_branches_of_the_bundled_network(bundled):
    """Blocks with an identity stand out by tens of sigmas, as measured; those without do not."""
    layers = {layer.name: layer for layer in bundled.layers}
    table = {layer.name: layer for layer in VARIANTS["A0"].layers}
    assert list(table) == list(layers)
    for name, found in layers.items():
        if table[name].has_identity:
            assert 30 < found.centre_sigmas < 60
            assert found.peak_sigmas == pytest.approx(found.centre_sigmas)
            assert found.outlook in (Outlook.WATCH, Outlook.TROUBLE)
        else:
            assert (found.peak_sigmas < 10, found.outlook) == (True, Outlook.OK)


@pytest.mark.parametrize("squeeze", Squeeze)
@pytest.mark.parametrize("style", [REPVGG, QAREPVGG, mobileone(2)])
def test_every_kind_of_block_has_an_outlook(tmp_path, style, squeeze):
    """One row a block, the kernel of the branches alone, whatever gates stand behind it."""
    tiny = Variant(
        name="tiny",
        num_blocks=(2, 1, 1, 1),
        width_multiplier=(0.125, 0.125, 0.0625, 0.03125),
        squeeze=squeeze,
        squeeze_reduction=4,
    )
    torch.manual_seed(0)
    module = RepVGG(tiny, num_classes=2, style=style)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    checkpoint = identify(read_checkpoint_file(tmp_path / "w.pth"), tiny)
    found = list(kernel_outlooks(checkpoint))
    assert [layer.name for layer in tiny.layers] == [row.name for row in found]
    identity = next(row for row in found if row.name == "stage1.1")
    assert (style != mobileone(2)) == (identity.centre_sigmas > 4)


def test_wrappers_and_prefixes_that_were_removed_are_listed(tmp_path, weights):
    """Outermost first; the wrapper that was not read is named."""
    state = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": {"state_dict": state}, "ema": weights}, tmp_path / "w.tar")
    document = inspect_file(tmp_path / "w.tar").to_json()
    assert ["model", "state_dict"] == document["wrappers_removed"]
    assert (["module."], ["ema"]) == (document["prefixes_removed"], document["other_wrappers"])
    assert "ema in the file holds tensors too; model.state_dict was read" in document["notes"]


def test_a_header_length_that_begins_like_an_onnx_is_still_safetensors(tmp_path):
    """A length of 8 modulo 256 starts with the byte that opens an ONNX file."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    padded = header.ljust(256 + 8).encode()
    (tmp_path / "w.bin").write_bytes(struct.pack("<Q", len(padded)) + padded + bytes(4))
    found = inspect_file(tmp_path / "w.bin")
    assert (Kind.CHECKPOINT, "safetensors") == (found.kind, found.details["container"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_are_counted_and_not_refused(tmp_path, weights, dtype):
    """The counts are right, the block is marked, the note says that an export would refuse."""
    name = "stage2.1.rbr_dense.conv.weight"
    broken = weights[name].to(dtype, copy=True)
    broken[0, 0, 0, :2] = math.nan
    broken[1, 0, 0, 0] = -math.inf
    save_file({**weights, name: broken}, tmp_path / "w.safetensors")
    found = inspect_file(tmp_path / "w.safetensors")
    assert (2, 1) == (found.nan_count, found.to_json()["inf_count"])
    marked = [layer.name for layer in found.layers if layer.outlook is Outlook.UNKNOWN]
    assert ["stage2.1"] == marked
    assert any(f"has 3 NaN or Inf values, first in {name}" in note for note in found.notes)
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("variant", "options", "style"),
    [
        ("A0", {"style": QAREPVGG}, "qarepvgg"),
        ("A1", {"style": mobileone(3)}, "mobileone, 3 3x3 branches"),
        ("B1g2", {}, "repvgg"),
        ("D2se", {"deploy": True}, None),
    ],
)
def test_variants_and_styles_are_named_without_data(tmp_path, variant, options, style):
    """Names and shapes suffice; without numbers there is no outlook."""
    found = inspect_file(without_data(tmp_path / "w.pth", on_meta(variant, **options)))
    assert (variant, 4, style) == (found.variant, found.num_classes, found.to_json()["style"])
    assert () == found.layers


def test_qarepvgg_is_warned_about_its_eps(tmp_path):
    """The state does not hold it and YOLOv6 changes it."""
    found = inspect_file(without_data(tmp_path / "w.pth", on_meta("A0", style=QAREPVGG)))
    assert any("eps of BatchNorm is not in the file" in note for note in found.notes)


def test_a_backbone_without_a_classifier_is_described(tmp_path, weights):
    """The variant and the outlook are there, the classes are not, the note says why."""
    state = {n: t for n, t in weights.items() if not n.startswith("linear.")}
    save_file(state, tmp_path / "w.safetensors")
    found = inspect_file(tmp_path / "w.safetensors")
    assert ("A0", None, 22) == (found.variant, found.num_classes, len(found.layers))
    assert any("without a classifier" in note for note in found.notes)


def test_a_backbone_in_a_larger_network_is_found(tmp_path, weights):
    """Its place and its neighbours are told."""
    state = {f"backbone.{n}": t for n, t in weights.items() if not n.startswith("linear.")}
    save_file({**state, "neck.weight": torch.ones(2)}, tmp_path / "w.safetensors")
    document = inspect_file(tmp_path / "w.safetensors").to_json()
    assert ("A0", "official") == (document["variant"], document["format"])
    assert ("backbone.", ["neck"]) == (document["within"], document["beside"])


def test_a_near_miss_is_explained_and_not_refused(tmp_path):
    """The variant is null, the nearest one and the differing keys are told."""
    module = on_meta("B1g4")
    state = module.state_dict()
    del state["stage4.0.rbr_1x1.bn.bias"]
    torch.save(state, tmp_path / "w.pth")
    found = inspect_file(tmp_path / "w.pth")
    document = found.to_json()
    assert ("official", None, "B1g4") == (found.format, found.variant, document["nearest"])
    assert ["stage4.0.rbr_1x1.bn.bias is missing"] == document["differences"]
    assert ("fits B1g4 but for 1 key: stage4.0.rbr_1x1.bn.bias is missing",) == found.notes


def test_another_network_is_an_unknown_format(tmp_path):
    """A readable state of something else is described as far as it goes."""
    state = {"conv1.weight": torch.tensor([[math.nan, 1.0]]), "fc.bias": torch.ones(3)}
    torch.save(state, tmp_path / "w.pth")
    found = inspect_file(tmp_path / "w.pth")
    assert (Kind.CHECKPOINT, "unknown", None, None) == (
        found.kind,
        found.format,
        found.variant,
        found.form,
    )
    assert (5, 1) == (found.parameters, found.nan_count)
    assert found.notes[0].startswith("fits no RepVGG variant; tensors that differ from A")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(10, dtype=torch.int8),
        torch.ones(10).to(torch.float8_e4m3fn),
        torch.ones(10).to_sparse(),
        torch.ones(10, dtype=torch.complex64),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tensor.layout}",
)
def test_tensors_of_other_kinds_are_described(tmp_path, weights, tensor):
    """What an export refuses, an inspection tells."""
    torch.save({**weights, "linear.bias": tensor}, tmp_path / "w.pth")
    found = inspect_file(tmp_path / "w.pth")
    assert ("A0", 0) == (found.variant, found.nan_count)
    assert any("weights must be dense tensors" in note for note in found.notes)


def test_mixed_forms_are_told_and_have_no_form(tmp_path, weights):
    """The form is null, the note names the blocks."""
    torch.save({**weights, "stage0.rbr_reparam.bias": torch.ones(48)}, tmp_path / "w.pth")
    found = inspect_file(tmp_path / "w.pth")
    assert (None, None) == (found.form, found.variant)
    assert found.notes[0].startswith("mixes deploy form (a fused kernel in stage0) and train form")


# --- the outlook -------------------------------------------------------------------------------


def random_kernel(outputs: int, inputs: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(outputs, inputs, 3, 3))


def test_a_normal_kernel_is_ok():
    """Kurtosis 3, no tap beyond a few sigmas, channels alike."""
    found = kernel_outlook("x", random_kernel(64, 64), square=True)
    assert Outlook.OK is found.outlook
    assert found.kurtosis == pytest.approx(3.0, abs=0.1)
    assert (found.peak_sigmas < 6, found.spread < 2, found.dead_channels) == (True, True, 0)


@pytest.mark.parametrize(
    ("sigmas", "outlook"), [(15, Outlook.OK), (20, Outlook.WATCH), (40, Outlook.TROUBLE)]
)
def test_an_identity_that_stands_out_is_measured(sigmas, outlook):
    """A diagonal of n sigmas is read back as n."""
    kernel = random_kernel(64, 64)
    kernel[np.arange(64), np.arange(64), 1, 1] = sigmas
    found = kernel_outlook("x", kernel, square=True)
    assert found.centre_sigmas == pytest.approx(sigmas, rel=0.02)
    assert outlook is found.outlook


def test_the_diagonal_of_a_grouped_kernel_starts_anew_in_each_group():
    """Output o of g groups reads itself in column o modulo the group's width."""
    kernel = random_kernel(64, 16)
    kernel[np.arange(64), np.arange(64) % 16, 1, 1] = 25.0
    assert kernel_outlook("x", kernel, square=True).centre_sigmas == pytest.approx(25.0, rel=0.05)


@pytest.mark.parametrize(
    ("factor", "outlook"), [(4, Outlook.OK), (12, Outlook.WATCH), (64, Outlook.TROUBLE)]
)
def test_one_large_channel_is_a_spread(factor, outlook):
    """The largest channel over the median one."""
    kernel = random_kernel(64, 64)
    kernel[7] *= factor / np.abs(kernel[7]).max() * np.median(np.abs(kernel).max(axis=(1, 2, 3)))
    found = kernel_outlook("x", kernel, square=False)
    assert found.spread == pytest.approx(factor, rel=0.02)
    assert (outlook, None) == (found.outlook, found.centre_sigmas)


def test_dead_channels_are_counted_and_disturb_nothing():
    """Zero rows change no other figure."""
    kernel = random_kernel(64, 64)
    kernel[:5] = 0.0
    found = kernel_outlook("x", kernel, square=False)
    alive = kernel_outlook("x", kernel[5:], square=False)
    assert (5, alive.spread, alive.kurtosis) == (found.dead_channels, found.spread, found.kurtosis)


@pytest.mark.parametrize(
    "kernel",
    [
        np.zeros((4, 4, 3, 3)),
        np.ones((4, 4, 3, 3)),
        np.eye(4).reshape(4, 4, 1, 1),
        np.ones((1, 1, 1, 1)),
    ],
    ids=["zero", "constant", "identity", "one number"],
)
def test_degenerate_kernels_have_figures_that_are_finite(kernel):
    """Nothing divides by zero, and a tap among equals or zeros stands out by nothing."""
    found = kernel_outlook("x", kernel, square=True)
    assert found.peak_sigmas in (None, 0.0)
    json.dumps(found.to_json(), allow_nan=False)
    assert Outlook.OK is found.outlook


@given(exponent=st.integers(-300, 300))
def test_the_outlook_does_not_depend_on_the_scale(exponent):
    """A power of two in front of the kernel changes no figure."""
    kernel = np.random.default_rng(1).normal(size=(8, 8, 3, 3))
    kernel[3, 3, 1, 1] = 30.0
    scaled = np.ldexp(kernel, exponent)
    assert kernel_outlook("x", kernel, square=True) == kernel_outlook("x", scaled, square=True)


# --- ONNX --------------------------------------------------------------------------------------


def conv_graph(scale_shape: tuple[int, ...] = (), *, weight: float = 1.0) -> onnx.ModelProto:
    """One quantized Conv whose activation scale has ``scale_shape``."""
    tensors = [
        numpy_helper.from_array(np.full(scale_shape, 0.1, np.float32), "scale"),
        numpy_helper.from_array(np.zeros(scale_shape, np.int8), "zero"),
        numpy_helper.from_array(np.full((2, 3, 3, 3), weight, np.float32), "kernel"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Conv", ["d", "kernel"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def test_a_graph_is_counted(tmp_path):
    """Opset, operators, inputs and Q/DQ; the weights fit no variant."""
    onnx.save(conv_graph(), tmp_path / "g.onnx")
    found = inspect_file(tmp_path / "g.onnx")
    document = found.to_json()
    assert (Kind.ONNX, "unknown", None, 54) == (
        found.kind,
        found.format,
        found.variant,
        found.parameters,
    )
    assert {"ai.onnx": 17} == document["opset"]
    assert {"QuantizeLinear": 1, "DequantizeLinear": 1, "Conv": 1} == document["nodes"]
    assert {"x": ["n", 3, 8, 8]} == document["inputs"]
    assert "not judged: the weights fit no variant" == document["contract"]
    assert () == found.notes


def test_a_flat_activation_scale_is_called_out(tmp_path):
    """Shape [1] costs INT8 silently; the scale is named."""
    onnx.save(conv_graph((1,)), tmp_path / "g.onnx")
    found = inspect_file(tmp_path / "g.onnx")
    assert ["scale"] == found.to_json()["quantization"]["flat_activation_scales"]
    assert "activation scales of shape [1], which silently cost INT8" in found.notes[0]


def test_a_flat_weight_scale_is_none_of_its_business(tmp_path):
    """A weight with one scale for all channels may have it in shape [1]."""
    model = conv_graph()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "ws"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((2, 3, 3, 3), np.int8), "w"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"]))
    model.graph.node[-1].input[1] = "wd"
    onnx.save(model, tmp_path / "g.onnx")
    found = inspect_file(tmp_path / "g.onnx")
    assert (54, ()) == (found.parameters, found.notes)


def plain_a0(*, pad: int = 1, quantized: bool = False) -> onnx.ModelProto:
    """A0 for 7 classes as the contract wants it, all weights zero."""
    nodes, tensors, current = [], [], "images"
    for layer in VARIANTS["A0"].layers:
        kernel, bias = f"{layer.name}.weight", f"{layer.name}.bias"
        kernel_values = np.zeros(layer.weight_shape, np.int8 if quantized else np.float32)
        tensors.append(numpy_helper.from_array(kernel_values, kernel))
        tensors.append(numpy_helper.from_array(np.zeros(layer.out_channels, np.float32), bias))
        if quantized:
            scale = numpy_helper.from_array(np.ones(layer.out_channels, np.float32), f"{kernel}_s")
            tensors.append(scale)
            names = [kernel, scale.name]
            kernel = f"{kernel}_d"
            nodes.append(helper.make_node("DequantizeLinear", names, [kernel], axis=0))
        nodes.append(
            helper.make_node(
                "Conv", [current, kernel, bias], [f"{layer.name}_c"], kernel_shape=[3, 3],
                pads=[pad] * 4, strides=[layer.stride] * 2, group=layer.groups,
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"{layer.name}_c"], [f"{layer.name}_r"]))
        current = f"{layer.name}_r"
    nodes += [
        helper.make_node("GlobalAveragePool", [current], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "linear.weight", "linear.bias"], ["logits"], transB=1),
    ]
    tensors.append(numpy_helper.from_array(np.zeros((7, 1280), np.float32), "linear.weight"))
    tensors.append(numpy_helper.from_array(np.zeros(7, np.float32), "linear.bias"))
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 64, 64])]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 7])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("options", "contract", "violations"),
    [
        ({}, "pass", 0),
        ({"pad": 0}, "fail", 22),
        ({"quantized": True}, "not judged: the contract is for the float graph", 0),
    ],
)
def test_a_graph_that_fits_a_variant_is_held_against_the_contract(
    tmp_path, options, contract, violations
):
    """Variant and classes come from the weights, also behind a DequantizeLinear."""
    onnx.save(plain_a0(**options), tmp_path / "g.onnx")
    found = inspect_file(tmp_path / "g.onnx")
    assert ("exporter", "deploy", "A0", 7) == (
        found.format,
        found.form,
        found.variant,
        found.num_classes,
    )
    assert VARIANTS["A0"].deploy_parameters(7) == found.parameters
    assert (contract, violations) == (
        found.details["contract"],
        len(found.details["violations"]),
    )


def test_a_graph_that_contradicts_itself_is_refused_in_one_sentence(tmp_path):
    """A shape of 2^40 numbers over 108 bytes, and a Cast that casts what it makes."""
    declared, cyclic = conv_graph(), conv_graph()
    weight = next(tensor for tensor in declared.graph.initializer if len(tensor.dims) == 4)
    weight.dims[0] = 2**40
    convolution = next(node for node in cyclic.graph.node if node.op_type == "Conv")
    convolution.input[1] = "itself"
    cyclic.graph.node.append(helper.make_node("Cast", ["itself"], ["itself"], to=1))
    for name, model in (("declared", declared), ("cyclic", cyclic)):
        (tmp_path / name).write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match=rf"{name} is a damaged ONNX model \("):
            inspect_file(tmp_path / name)


def test_nan_in_an_initializer_is_counted(tmp_path):
    """Every number of the kernel."""
    onnx.save(conv_graph(weight=math.nan), tmp_path / "g.onnx")
    assert 54 == inspect_file(tmp_path / "g.onnx").nan_count


# --- engines, calibration, bundles -------------------------------------------------------------


def plan(path: Path, mask: int, *, size: int = 256) -> Path:
    """The header of a TensorRT-RTX plan, as measured, and zeros."""
    head = bytearray(size)
    head[:4] = b"vtrt"
    struct.pack_into("<Q", head, 0x10, size)
    head[0x18:0x1B] = bytes((1, 7, 1))
    struct.pack_into("<Q", head, 0x20, mask)
    struct.pack_into("<Q", head, 0x38, 123)
    path.write_bytes(head)
    return path


@pytest.mark.parametrize(
    ("mask", "targets"),
    [(0b1, ["sm75"]), (0b1100, ["sm86", "sm89"]), (1 << 5 | 1 << 9, ["sm121", "bit 9"])],
)
def test_an_engine_is_described_by_its_header(tmp_path, mask, targets):
    """Version, targets and bytes of weights; an unknown bit is shown as one."""
    found = inspect_file(plan(tmp_path / "m.engine", mask))
    document = found.to_json()
    assert (Kind.ENGINE, "TensorRT-RTX 1.7.1") == (found.kind, document["builder"])
    assert (targets, 123) == (document["targets"], document["weight_bytes"])


@pytest.mark.parametrize("size", [20, 63, 64, 255])
def test_a_cut_engine_is_refused(tmp_path, size):
    """Within the header or behind it."""
    path = plan(tmp_path / "m.engine", 1)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"is cut within its header|speaks of 256 bytes, the file"):
        inspect_file(path)


def table() -> CalibrationTable:
    scales = {"a": 0.5, "b": 0.25}
    return CalibrationTable(
        method="mse",
        activation_scales=scales,
        ranges={n: TensorRange(minimum=0.0, maximum=1.0, threshold=1.0) for n in scales},
        onnx_sha256="0" * 64,
        data_sha256="1" * 64,
        image_count=9,
        preprocess={},
    )


def test_calibration_texts_are_described(tmp_path):
    """Our table with its provenance, TensorRT's cache with its header."""
    (tmp_path / "c.json").write_text(table().dumps())
    (tmp_path / "c.cache").write_text(table().to_cache_text("10.3.0"))
    ours, cache = inspect_file(tmp_path / "c.json"), inspect_file(tmp_path / "c.cache")
    assert (Kind.CALIBRATION_TABLE, "exporter") == (ours.kind, ours.format)
    assert ("mse", 9) == (ours.details["method"], ours.details["images"])
    assert Kind.CALIBRATION_CACHE is cache.kind
    assert "TRT-100300-EntropyCalibration2" == cache.details["header"]
    for found in (ours, cache):
        scales = found.details["smallest_scale"], found.details["largest_scale"]
        assert (2, (0.25, 0.5)) == (found.details["tensors"], scales)


def bundle(path: Path, **engine: Any) -> Path:
    engine = engine or {"targets": ["sm86"], "convolutions": {"total": 22}, "status": "built"}
    with BundleWriter(path) as writer:
        writer.write_text("parity.json", '{"verdict": "pass", "stages": [{"stage": "onnx"}]}')
        writer.write_text("engine.json", json.dumps(engine))
        model = {"variant": "A0", "num_classes": 10, "parameters": 5}
        writer.publish({"model": model, "spec": {"precision": "int8"}})
    return path


def test_a_bundle_is_described_by_its_manifest(tmp_path):
    """Verdict, precision, targets and the network; nothing is damaged."""
    found = inspect_file(bundle(tmp_path / "b"))
    document = found.to_json()
    assert (Kind.BUNDLE, "exporter", "A0", 10, 5) == (
        found.kind,
        found.format,
        found.variant,
        found.num_classes,
        found.parameters,
    )
    expected = {
        "verdict": "pass",
        "precision": "int8",
        "targets": ["sm86"],
        "convolutions": {"total": 22},
        "damaged_files": [],
        "unlisted_files": [],
        "files": ["engine.json", "parity.json"],
        "engine": {"status": "built"},
    }
    assert expected == {key: document[key] for key in expected}
    assert () == found.notes


DEFERRED = {
    "status": "deferred", "backend": "tensorrt", "targets": ["sm87"], "devices": ["orin-nano"],
    "reason": "orin-nano needs full TensorRT", "build_with": "repvgg-export build BUNDLE",
    "commands": {"10.3": "trtexec --onnx=model.int8.onnx"}, "warnings": [],
}  # fmt: skip
NOTE = (
    "the engine for orin-nano is deferred: orin-nano needs full TensorRT; on the device: "
    "repvgg-export build BUNDLE"
)


def test_a_deferred_engine_says_for_what_and_how(tmp_path):
    """Status, devices, reason and commands; a sentence for people."""
    found = inspect_file(bundle(tmp_path / "b", **DEFERRED))
    assert {k: v for k, v in DEFERRED.items() if k != "warnings"} == found.to_json()["engine"]
    assert (NOTE,) == found.notes


def test_an_engine_beside_a_deferred_one_is_told_apart(tmp_path):
    """What is built stands first, what waits is marked."""
    engine = {"status": "built", "targets": ["sm86"], "backend": "tensorrt-rtx"}
    found = inspect_file(bundle(tmp_path / "b", **engine, deferred=DEFERRED))
    told = found.to_json()["engine"]
    assert ("built", "tensorrt-rtx", ["sm87"], ["orin-nano"]) == tuple(
        told[key] for key in ("status", "backend", "deferred_targets", "deferred_devices")
    )
    assert (["sm86"], (NOTE,)) == (found.to_json()["targets"], found.notes)


def test_damaged_files_of_a_bundle_are_listed(tmp_path):
    """Altered and missing ones, with a note."""
    path = bundle(tmp_path / "b")
    (path / "engine.json").write_text("{}")
    found = inspect_file(path)
    assert ["engine.json"] == found.details["damaged_files"]
    assert ("missing or not what the manifest says: engine.json",) == found.notes


def test_files_that_a_bundle_does_not_list_are_named(tmp_path):
    """Those with names of a bundle's own; what else lies there is nobody's business."""
    path = bundle(tmp_path / "b")
    for name in ("model.fp8.onnx", "notes.txt"):
        (path / name).write_text("")
    found = inspect_file(path)
    assert ["model.fp8.onnx"] == found.details["unlisted_files"]
    assert ("not among the files of the manifest: model.fp8.onnx",) == found.notes


def test_a_bundle_with_odd_entries_is_described_all_the_same(tmp_path):
    """What is of another type than expected counts as absent."""
    with BundleWriter(tmp_path / "b") as writer:
        writer.write_text("parity.json", '{"verdict": 3, "stages": "none"}')
        writer.write_text("engine.json", "not JSON")
        writer.publish({"model": ["A0"], "spec": None, "weights": 1})
    found = inspect_file(tmp_path / "b")
    assert (None, None, []) == (found.variant, found.details["targets"], found.details["stages"])


# --- what cannot be read -----------------------------------------------------------------------

NOTHING = (
    "nothing that inspect knows (a checkpoint, an ONNX, a bundle, an engine or a calibration table)"
)


def refused(path):
    """Why."""
    with pytest.raises(InputError) as caught:
        inspect_file(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"a": 1, "method": "full"}', "is JSON but no calibration table"),
        (b'{"method": "full", "tensors": {', "is JSON but no calibration table"),
        (b"\x80\x02 half a pickle", "is damaged, truncated or not a file of weights"),
        (b"\x40" + bytes(7) + b'{"half', "is damaged, truncated or not a safetensors file"),
        (b"TRT-100300-EntropyCalibration2\nx", "calibration cache line 2"),
        (b"TRT-100300-\xff\xfe", "is not text from byte 11 on"),
        (b"\x08\x08\xff\xff", "is damaged, truncated or not an ONNX model"),
        (b"\x08\x08", "is not an ONNX model, or one without nodes"),
        (b"PK\3\4 half a zip", "is damaged, truncated or not a file of weights"),
    ],
)
def test_unreadable_files_are_refused_in_one_line(tmp_path, content, message):
    """The file is named, with what is wrong."""
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        inspect_file(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_that_hold_no_file_are_refused(tmp_path):
    """Missing, a folder that is no bundle, a zero byte, a manifest without its folder."""
    (tmp_path / "manifest.json").write_text("[]")
    for path, message in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path, "is not a bundle: manifest.json is no JSON object"),
        (tmp_path / "a\0b", "does not exist"),
        (tmp_path / "manifest.json", "is a bundle's manifest; inspect its folder"),
    ):
        with pytest.raises(InputError, match=message):
            inspect_file(path)


@pytest.mark.parametrize(
    "content",
    [
        b"# RepVGG\n" * 50,
        b"\x89PNG\r\n\x1a\n" + bytes(50),
        b'{"verdict": "pass", "stages": []}',
        b'{"bundle": "build/A0-int8", "top1": 0.98}',
        b"{ not JSON at all",
    ],
)
def test_what_is_none_of_the_kinds_is_not_called_a_damaged_one(tmp_path, content):
    """Notes, a picture, the records of a bundle, what `evaluate --json` prints."""
    path = tmp_path / "file"
    path.write_bytes(content)
    assert f"{path} is {NOTHING}" == refused(path)


def test_a_name_says_what_content_no_longer_can(tmp_path):
    """A file of weights whose beginning was overwritten is still told as one."""
    for name in ("w.pth", "w.pt", "w.safetensors"):
        (tmp_path / name).write_bytes(bytes(50))
        assert "is damaged, truncated or not a" in refused(tmp_path / name)


def test_a_folder_of_images_is_not_called_a_broken_bundle(tmp_path):
    """One that has a bundle's records but no manifest is."""
    (tmp_path / "cat").mkdir()
    assert f"{tmp_path} is {NOTHING}" == refused(tmp_path)
    (tmp_path / "parity.json").write_text("{}")
    assert refused(tmp_path).startswith(f"{tmp_path} is not a bundle: manifest.json cannot be read")


def test_a_reference_archive_is_no_checkpoint(tmp_path):
    """Nor is any other zip that torch did not write; no torch is needed to tell."""
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        archive.writestr("images.npy", b"x")
    assert f"{tmp_path / 'r.npz'} is {NOTHING}" == refused(tmp_path / "r.npz")


@given(content=st.binary(min_size=1, max_size=100))
def test_no_bytes_break_the_inspection(tmp_path_factory, content):
    """Whatever the file holds, it is described or refused."""
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(content)
    try:
        inspect_file(path)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_tables_show_names_with_brackets_as_they_are(tmp_path, monkeypatch):
    """A path in brackets is no markup."""
    from rich.console import Console

    # A long name would be folded somewhere.
    monkeypatch.chdir(tmp_path)
    path = Path("[bold]w.pth")
    torch.save({"x": torch.ones(2)}, path)
    console = Console(width=200, record=True, file=io.StringIO())
    for part in tables(inspect_file(path)):
        console.print(part)
    assert "[bold]w.pth" in console.export_text()
