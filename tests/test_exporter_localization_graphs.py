"""Which layer is named when a stage parts from the last good one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporter.calibrator import observe_boundaries, table_by
from exporter.graph import quantizable
from exporter.localization.graphs import GraphPair, localize
from exporter.precision import BFLOAT16, HALF, to_type
from exporter.quantization.half_nodes import in_half
from exporter.quantize import FP8, INT8, EightBits, quantize
from exporter.running.onnx_runner import Batch, OnnxRunner

DEPTH, WIDTH = 6, 8
LAYERS = [f"block{index}.conv" for index in range(DEPTH)]


def chain(seed: int) -> onnx.ModelProto:
    """Six convolutions with ReLUs, pooling and a classifier; biases that matter."""
    random = np.random.default_rng(seed)
    nodes, stored, last, channels = [], [], "images", 3
    for index in range(DEPTH):
        name = f"block{index}"
        weight = random.standard_normal((WIDTH, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        bias = 0.3 * random.standard_normal(WIDTH)
        stored += [(f"{name}.weight", weight), (f"{name}.bias", bias)]
        nodes += [
            helper.make_node(
                "Conv", [last, f"{name}.weight", f"{name}.bias"], [f"{name}.conv.output"],
                name=f"{name}.conv", pads=[1, 1, 1, 1],
            ),
            helper.make_node(
                "Relu", [f"{name}.conv.output"], [f"{name}.output"], name=f"{name}.relu"
            ),
        ]  # fmt: skip
        last, channels = f"{name}.output", WIDTH
    stored += [("linear.weight", random.standard_normal((5, WIDTH))), ("linear.bias", np.zeros(5))]
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node(
            "Gemm", ["flat", "linear.weight", "linear.bias"], ["logits"], name="linear", transB=1
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in stored],
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    onnx.checker.check_model(model)
    return model


def images(seed: int, count: int = 4) -> Batch:
    """The first of them are the same for every ``count``: INT8 is calibrated on what it meets."""
    random = np.random.default_rng(seed + 1)
    return (random.standard_normal((32, 3, 12, 12)).astype(np.float32)[:count],)


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def quantized(
    model: onnx.ModelProto, keep: tuple[str, ...] = (), kind: EightBits = INT8
) -> onnx.ModelProto:
    batch = images(0, 32)
    observers = observe_boundaries(model, [batch])
    data = {"sha256": "0" * 64, "images": 32}
    return quantize(
        model, table_by("minmax", observers, model, data, None), keep_float=keep, kind=kind
    )


def mixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """INT8 with two layers in half."""
    kept = (LAYERS[1], LAYERS[2])
    return in_half(quantized(model, kept), kept)


STAGES: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "simplified": copied,
    "fp16": partial(to_type, HALF),
    "bf16": partial(to_type, BFLOAT16),
    "int8": quantized,
    "fp8": partial(quantized, kind=FP8),
    "int8, two layers in half": mixed,
}


def damage(model: onnx.ModelProto, layer: int, kind: str) -> onnx.ModelProto:
    """A copy in which one layer's parameters are wrong, whatever they are stored as."""
    wrong = copied(model)
    values = {tensor.name: tensor for tensor in wrong.graph.initializer}
    (node,) = [node for node in wrong.graph.node if node.name == LAYERS[layer]]
    stem = f"block{layer}"
    found = {
        "weight": next(
            n for n in (f"{stem}.weight.int8", f"{stem}.weight.fp8", node.input[1]) if n in values
        ),
        "bias": node.input[2],
    }
    name = found["bias" if kind == "zeroed bias" else "weight"]
    if kind == "doubled scale":
        name = f"{stem}.weight.scale" if f"{stem}.weight.scale" in values else name
    array = numpy_helper.to_array(values[name]).copy()
    if kind == "flipped weight":
        # One weight of a float layer; of one of 8 bits those of an output channel.
        where = np.unravel_index(np.abs(array.astype(np.float64)).argmax(), array.shape)
        where = where[:1] if array.dtype.itemsize == 1 else where
        array[where] = -array[where]
    elif kind == "zeroed bias":
        array[:] = 0
    else:
        array = array * array.dtype.type(2)
    values[name].CopyFrom(numpy_helper.from_array(array, name))
    return wrong


@settings(max_examples=40, deadline=None)
@given(
    stage=st.sampled_from(sorted(STAGES)),
    layer=st.integers(0, DEPTH - 1),
    kind=st.sampled_from(["flipped weight", "zeroed bias", "doubled scale"]),
    seed=st.integers(0, 20),
)
def test_the_layer_that_is_named_is_the_damaged_one(
    stage: str, layer: int, kind: str, seed: int
) -> None:
    """Whatever is broken, wherever, at whatever precision: that layer and no other deviates."""
    # Beside the rounding of 4 significant bits a missing bias is not seen.
    assume((stage, kind) != ("fp8", "zeroed bias"))
    model = chain(seed)
    bad = damage(STAGES[stage](model), layer, kind)
    found = localize(stage, GraphPair(reference="onnx", good=model, bad=bad), images(0))
    assert found is not None
    assert [LAYERS[layer]] == [row.name for row in found.rows if row.deviates]


@settings(max_examples=20, deadline=None)
@given(stage=st.sampled_from(sorted(STAGES)), seed=st.integers(0, 200))
def test_no_layer_of_a_healthy_graph_deviates(stage: str, seed: int) -> None:
    """Rounding alone is named as such, with every layer's figure."""
    model = chain(seed)
    pair = GraphPair(reference="onnx", good=model, bad=STAGES[stage](model))
    found = localize(stage, pair, images(0))
    assert found is not None
    assert (None, [*LAYERS, "linear"]) == (found.first, [row.name for row in found.rows])
    assert found.sentence.startswith("no single layer deviates: the errors of 7 add up")


def test_damage_in_front_is_not_blamed_on_the_layers_behind() -> None:
    """Layers 2 and 4 are broken: both deviate, the first is named, 3 and 5 are exact."""
    model = chain(0)
    bad = damage(damage(model, 4, "zeroed bias"), 2, "doubled scale")
    pair = GraphPair(reference="onnx", good=model, bad=bad)
    found = localize("simplified", pair, images(0))
    assert found is not None
    assert [LAYERS[2], LAYERS[4]] == [row.name for row in found.rows if row.deviates]
    assert {200.0} == {row.sqnr_db for row in found.rows if not row.deviates}
    assert "the first layer that deviates is block2.conv: its own error is " in found.sentence
    assert LAYERS[2] == found.to_json()["layer"]
    json.dumps(found.to_json(), allow_nan=False)


def test_an_operation_that_is_no_layer_is_named_too() -> None:
    """A ReLU turned into a sigmoid."""
    model = chain(3)
    bad = copied(model)
    next(node for node in bad.graph.node if node.name == "block3.relu").op_type = "Sigmoid"
    found = localize("simplified", GraphPair(reference="onnx", good=model, bad=bad), images(3))
    assert found is not None
    assert found.first is not None
    assert ("block3.relu", "Relu") == (found.first.name, found.first.operator)


def test_the_explained_noise_of_int8_is_what_quantizing_makes() -> None:
    """The formula of the module's docstring is at most 1 dB above every layer's error, 6 below."""
    model = chain(1)
    pair = GraphPair(reference="onnx", good=model, bad=quantized(model))
    found = localize("int8", pair, images(0, 32))
    assert found is not None
    differences = [row.sqnr_db - row.explained_db for row in found.rows]
    assert len(quantizable(model)) == len(differences)
    assert -1 < min(differences), differences
    assert max(differences) < 6, differences


def test_products_of_matrices_are_judged_too() -> None:
    """A MatMul over tokens [n, 5, 8]: healthy within its formula, and named once it is broken."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((8, 12)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "w"], ["logits"], name="product")],
        "tokens",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 5, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5, 12])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    batch = (random.standard_normal((4, 5, 8)).astype(np.float32),)
    table = table_by(
        "minmax", observe_boundaries(model, [batch]), model, {"sha256": "0" * 64, "images": 4}, None
    )
    good = quantize(model, table)
    found = localize("int8", GraphPair(reference="onnx", good=model, bad=good), batch)
    assert found is not None
    (row,) = found.rows
    assert not row.deviates
    assert abs(row.sqnr_db - row.explained_db) < 3
    scale = next(tensor for tensor in good.graph.initializer if tensor.name == "w.scale")
    scale.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(scale), "w.scale"))
    found = localize("int8", GraphPair(reference="onnx", good=model, bad=good), batch)
    assert found is not None
    assert found.first is not None
    assert "product" == found.first.name


def test_graphs_without_a_common_tensor_are_not_compared() -> None:
    """Nothing is claimed about them."""
    model, other = chain(0), chain(0)
    for node in other.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = f"other.{name}"
        for index, name in enumerate(node.input):
            if name.endswith("output") or name in ("pooled", "flat"):
                node.input[index] = f"other.{name}"
    other.graph.output[0].name = "other.logits"
    OnnxRunner(other).run(images(0))
    assert (
        localize("simplified", GraphPair(reference="onnx", good=model, bad=other), images(0))
        is None
    )


def test_a_graph_that_cannot_run_leaves_the_error_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Localization explains a failure; it never replaces it."""
    model, bad = chain(0), chain(0)
    bad.graph.initializer[0].dims[0] = 4
    bad.graph.initializer[0].raw_data = bad.graph.initializer[0].raw_data[: 4 * 4 * 27]
    assert (
        localize("simplified", GraphPair(reference="onnx", good=model, bad=bad), images(0)) is None
    )
