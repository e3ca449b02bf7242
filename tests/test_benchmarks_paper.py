"""The paper's comparison: published counts, Winograd, turns, layers, and the committed page."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from exporter.running.onnx_runner import OnnxRunner
from models.repvgg import RepVGG
from models.variants import VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[1]
TINY = Variant(name="tiny", num_blocks=(1, 2, 2, 1), width_multiplier=(0.25,) * 4, groups=2)
LAYERS = """
<ir_version: 8, opset_import: ["" : 17]>
layers (float[n, 8, 10, 10] images) => (float[n, 5] logits)
<float[6, 8, 3, 3] plain, float[6, 3, 3, 3] grouped, float[6, 6, 3, 3] halved,
 float[6, 6, 3, 3] dilated, float[6, 6, 1, 1] point, float[5, 6] last, float[5] bias>
{
    a = Conv <pads = [1, 1, 1, 1]> (images, plain)
    b = Conv <pads = [1, 1, 1, 1], group = 2> (a, grouped)
    c = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (b, halved)
    d = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (c, dilated)
    e = Conv (d, point)
    f = GlobalAveragePool (e)
    g = Flatten (f)
    logits = Gemm <transB = 1> (g, last, bias)
}
"""


def _layers_model(text: str = LAYERS) -> onnx.ModelProto:
    """Nodes named after their outputs; what the text only declares becomes a weight of zeros."""
    model = onnx.parser.parse_model(text)
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        zeros = np.zeros(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(zeros, value.name))
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name = node.output[0]
    return model


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        yield


@pytest.fixture(scope="module")
def networks(on_path: None) -> ModuleType:
    return import_module("paper_networks")


@pytest.fixture(scope="module")
def paper(on_path: None) -> ModuleType:
    return import_module("paper")


@pytest.fixture(scope="module")
def result(paper: ModuleType) -> Any:
    return json.loads((paper.RESULTS / "paper.json").read_text("utf-8"))


def _counts(build: Any) -> tuple[int, float]:
    """Parameters and 10^9 multiply-accumulates at 224 x 224, counted by torch without computing."""
    with torch.device("meta"):
        module = build().eval()
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(images)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return parameters, counter.get_total_flops() / 2e9


def test_vgg_16_has_the_published_counts(networks):
    """138.36 million parameters, 15.47 G multiply-accumulates."""
    parameters, gmacs = _counts(networks.VGG16)
    assert 138_357_544 == parameters
    assert 15.47 == pytest.approx(gmacs, abs=0.005)


def test_resnet_50_has_the_published_counts(networks):
    """25.56 million parameters; 4.09 G with the stride in the 3x3, 3.86 G with it in the 1x1."""
    parameters, gmacs = _counts(networks.ResNet50)
    assert 25_557_032 == parameters
    assert 4.09 == pytest.approx(gmacs, abs=0.005)
    original = _counts(lambda: networks.ResNet50(stride_in_3x3=False))
    assert (25_557_032, pytest.approx(3.86, abs=0.005)) == original


def test_random_weights_fill_every_tensor_and_do_not_change(networks):
    """Twice the same numbers, finite, no BatchNorm that does nothing."""
    first, second = (networks.with_random_weights(lambda: RepVGG(TINY)) for _ in range(2))
    for (name, one), other in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
        assert torch.isfinite(one).all(), name
    assert 0.05 < float(first.stage1[0].rbr_dense.bn.running_mean.std())
    with torch.no_grad():
        logits = first(torch.randn(2, 3, 64, 64))
    assert 0.01 < float(logits.std()) < 100


def test_both_forms_of_a_network_compute_the_same(networks):
    """The graphs that are compared for speed are one function."""
    images = torch.randn(2, 3, 64, 64).numpy()
    outputs = [
        OnnxRunner(
            networks.float_graph(
                networks.PaperNetwork(name="tiny", form=form, build=lambda: RepVGG(TINY)), (64, 64)
            )
        )(images)
        for form in (networks.TRAIN, networks.DEPLOY)
    ]
    np.testing.assert_allclose(*outputs, atol=1e-4 * np.abs(outputs[1]).max())


def test_layers_cost_what_the_formulas_say(on_path):
    """Output pixels x output channels x taps; bytes of input, weights and output."""
    costs = import_module("convolution_cost")
    plain, grouped, halved, dilated, point, last = costs.layers_of(_layers_model(), 2)
    assert ["3x3", "3x3 2 groups", "3x3 stride 2", "3x3", "1x1", "linear"] == [
        layer.kind for layer in (plain, grouped, halved, dilated, point, last)
    ]
    assert 2 * 100 * 6 * 8 * 9 == plain.macs
    assert 2 * 100 * 6 * 3 * 9 == grouped.macs
    assert 2 * 25 * 6 * 6 * 9 == halved.macs == dilated.macs
    assert (2 * 25 * 6 * 6, 2 * 5 * 6) == (point.macs, last.macs)
    assert 4 * (2 * 8 * 100 + 6 * 8 * 9 + 2 * 6 * 100) == plain.bytes
    assert plain.macs / plain.bytes == plain.intensity


def test_winograd_saves_five_ninths_of_3x3_with_stride_1(on_path):
    """16 multiplications for 4 outputs of 9 taps; stride, dilation and 1x1 save nothing."""
    costs = import_module("convolution_cost")
    layers = costs.layers_of(_layers_model(), 1)
    assert [True, True, False, False, False, False] == [layer.winograd for layer in layers]
    for layer in layers:
        tile = Fraction(16, 4 * 9) if layer.winograd else 1
        assert layer.macs * tile == layer.multiplications


def test_a_matmul_is_no_layer_of_these_networks(on_path):
    """What cannot be counted is refused by name."""
    costs = import_module("convolution_cost")
    text = LAYERS.replace("float[5, 6] last", "float[6, 5] last").replace("<transB = 1>", "")
    with pytest.raises(ValueError, match="logits is a Gemm of another kind"):
        costs.layers_of(_layers_model(text), 1)


@pytest.mark.parametrize("name", ["A0", "A2", "B1g4", "B1"])
def test_table_4_agrees_with_the_variants(name, on_path):
    """Parameters cut to two digits, FLOPs and Wino MULs rounded to one, grouped layers included."""
    row = import_module("paper_table4").TABLE_4[name]
    variant = VARIANTS[name]
    assert row.parameters_m == math.floor(variant.deploy_parameters() / 1e4) / 100
    assert row.flops_g == round(variant.macs() / 1e9, 1)
    wino, side = float(variant.feature_channels * 1000), 224
    for layer in variant.layers:
        side = -(-side // layer.stride)
        macs = side * side * math.prod(layer.weight_shape)
        wino += macs * (4 / 9 if layer.stride == 1 else 1)
    assert row.wino_muls_g == round(wino / 1e9, 1)


def test_table_4_agrees_with_the_papers_text(on_path):
    """A2 is 83 % faster than ResNet-50 (section 4.1)."""
    table = import_module("paper_table4").TABLE_4
    ratio = table["A2"].images_per_second / table["ResNet-50"].images_per_second
    assert 83 == int(100 * ratio - 100)


def test_turns_rotate_and_the_first_run_does_not_count(on_path):
    """Each round starts one graph further on; a graph runs once before the clock is read."""
    timing = import_module("paper_timing")
    now, calls = [0.0], []

    def step(name: str, seconds: float) -> Any:
        def run() -> None:
            calls.append(name)
            now[0] += 100 * seconds if calls[-2:-1] != [name] else seconds

        return run

    steps = {"slow": step("slow", 2.0), "fast": step("fast", 1.0), "third": step("third", 3.0)}
    turns = timing.in_turns(steps, 4, 3, clock=lambda: now[0])
    each = 1 + timing.RUNS
    assert ["slow", "fast", "third"] == calls[0 : 3 * each : each]
    assert ["fast", "third", "slow"] == calls[3 * each : 6 * each : each]
    assert [[2.0] * timing.RUNS] * 3 == turns.seconds["slow"]
    ratio = turns.ratio("fast", "slow")
    assert (2.0, 2.0, 2.0, 3) == (ratio.median, ratio.low, ratio.high, ratio.rounds)
    latency = turns.latency("fast")
    assert (1000.0, 4.0) == (latency.p50_ms, latency.images_per_second)


def test_nodes_find_their_layers_in_any_order(on_path):
    """By shapes; what is no product is left out."""
    layers, run = _layers_and_nodes()
    swapped = [run[1], run[0], *run[2:]]
    found = import_module("paper_layers").matched(layers, swapped)
    assert {0: "b", 1: "a", 2: "c", 3: "d", 4: "e", 6: "logits"} == {
        position: layer.name for position, layer in found.items()
    }


def test_a_node_without_a_layer_is_named(on_path):
    """And a layer without a node."""
    match = import_module("paper_layers").matched
    layers, run = _layers_and_nodes()
    with pytest.raises(ValueError, match="node a of the optimized graph is none of the layers"):
        match(layers[1:], run)
    with pytest.raises(ValueError, match="no node of the optimized graph computes a"):
        match(layers, run[1:])


def _layers_and_nodes() -> tuple[Any, list[Any]]:
    costs, profile = import_module("convolution_cost"), import_module("ort_profile")
    layers = costs.layers_of(_layers_model(), 1)
    nodes = []
    for layer in layers:
        convolution = len(layer.weight) == 4
        if not convolution:
            nodes.append(("pool", "GlobalAveragePool", ((1, 6, 5, 5),), ((1, 6, 1, 1),)))
        inputs = (layer.input, layer.weight if convolution else (5,))
        op = "Conv" if convolution else "Gemm"
        nodes.append((layer.name, op, inputs, (layer.output,)))
    return layers, [
        profile.NodeRun(
            name=name, op=op, seconds=1.0, inputs=i, outputs=o, held_bytes=0, new_bytes=0
        )
        for name, op, i, o in nodes
    ]


def test_the_page_is_the_committed_result(paper, result):
    """docs/paper.md and results/paper.txt say exactly what results/paper.json holds."""
    assert paper.page(result) == (paper.DOCS / "paper.md").read_text("utf-8")
    assert paper.text(result) == (paper.RESULTS / "paper.txt").read_text("utf-8")
    assert (paper.DOCS / "paper.svg").read_text("utf-8").startswith("<?xml")


def test_the_committed_result_is_of_the_full_comparison(paper, result):
    """All networks at 224 x 224, with the published counts; ratios are of the times beside them."""
    assert "python benchmarks/paper.py" == result["command"]
    assert [*paper.FULL.image_size] == result["image_size"]
    table = import_module("paper_table4").TABLE_4
    plain = import_module("paper_tables").plain_keys(result)
    assert list(paper.FULL.models) == list(plain)
    for name, key in plain.items():
        one = result["networks"][key]
        assert table[name].parameters_m == pytest.approx(one["parameters"] / 1e6, abs=0.01)
        if name != paper.REFERENCE:
            assert table[name].flops_g == round(one["macs"] / 1e9, 1)
            assert table[name].wino_muls_g == round(one["multiplications"] / 1e9, 1)
    assert {"A0", "A2", "B1g4", "B1"} == set(result["train"])
    for name, by_batch in result["train"].items():
        train, deploy = (result["networks"][f"{name} {form}"] for form in ("train", "deploy"))
        assert train["memory"]["computed"] >= 2 * deploy["memory"]["computed"]
        assert {"1", "8"} == set(by_batch)


def test_quick_figures_do_not_replace_the_result(paper, capsys):
    """--quick without --out is a usage error."""
    with pytest.raises(SystemExit) as ended:
        paper.main(["--quick"])
    assert 2 == ended.value.code
    assert "--quick needs --out: its figures are no result" in capsys.readouterr().err


def test_unequal_bytes_are_an_error(on_path, monkeypatch, tmp_path):
    """The measurement fails with the first node that holds something else than computed."""
    memory = import_module("paper_memory")
    model = _layers_model()
    names = [node.name for node in model.graph.node]
    onnx.save(model, tmp_path / "layers.onnx")
    held = list(import_module("activation_memory").activation_memory(model, 1).held)
    held[1] += 4
    monkeypatch.setattr(memory, "_child", lambda *_: {"order": names, "held": held, "peak": 1})
    with pytest.raises(
        memory.MemoryMismatchError,
        match=f"layers.onnx, b: computed {held[1] - 4} bytes, ONNX Runtime holds {held[1]}",
    ):
        memory.measure(tmp_path / "layers.onnx", 1, (10, 10))


@pytest.mark.slow
def test_the_papers_resnet_50_has_its_stride_in_the_1x1(networks):
    """Only then are FLOPs and Wino MULs 3.9 and 2.8, and parameters 25.53 with BatchNorm folded."""
    costs = import_module("convolution_cost")
    original = networks.PaperNetwork(
        name="ResNet-50", form=None, build=lambda: networks.ResNet50(stride_in_3x3=False)
    )
    graph = networks.float_graph(original, (224, 224))
    layers = costs.layers_of(graph, 1)
    row = import_module("paper_table4").TABLE_4["ResNet-50"]
    parameters = sum(math.prod(tensor.dims) for tensor in graph.graph.initializer)
    assert row.parameters_m == math.floor(parameters / 1e4) / 100
    assert row.flops_g == round(sum(layer.macs for layer in layers) / 1e9, 1)
    assert row.wino_muls_g == round(float(sum(layer.multiplications for layer in layers)) / 1e9, 1)


@pytest.mark.slow
def test_the_quick_comparison_writes_page_picture_and_results(paper, tmp_path):
    """Real sessions and fresh processes: two networks in every column, and their files."""
    assert 0 == paper.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "paper.json").read_text("utf-8"))
    assert ["A0 train", "A0 deploy", "ResNet-50"] == list(found["networks"])
    for one in found["networks"].values():
        # The planned memory stands beside the logits of two images.
        assert 0 < one["memory"]["default"] <= one["memory"]["computed"] + 2 * 4 * 1000
        assert {"1", "2"} == set(one["latency"])
    assert 22 == found["int8"]["A0"]["onnxruntime"]["int8_convolutions"]
    assert 23 == len(found["layers"]["A0"]["layers"])
    assert 54 == len(found["layers"]["ResNet-50"]["layers"])
    assert paper.page(found) == (tmp_path / "paper.md").read_text("utf-8")
    assert "</svg>" in (tmp_path / "paper.svg").read_text("utf-8")
