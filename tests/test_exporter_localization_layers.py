"""Figures of single layers, tensor by tensor between two graphs; the images that differ most."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporter.localization.layers import layer_sites, measure_layers, spread
from exporter.localization.probe import (
    Noise,
    Probe,
    as_they_are,
    exposed,
    float_tensors,
    forced,
    places,
)
from exporter.parity.worst_images import worst_images
from exporter.precision import HALF, to_type
from exporter.quantization.half_nodes import in_half
from exporter.running.onnx_runner import OnnxRunner

IMAGES = np.random.default_rng(0).standard_normal((5, 2, 6, 6)).astype(np.float32)


def two_layers(first: np.ndarray, second: np.ndarray) -> onnx.ModelProto:
    """images -> Conv a -> Relu -> Conv b, both 1x1."""
    nodes = [
        helper.make_node("Conv", ["images", "a.weight"], ["a.output"], name="a"),
        helper.make_node("Relu", ["a.output"], ["a.relu"], name="a.relu"),
        helper.make_node("Conv", ["a.relu", "b.weight"], ["logits"], name="b"),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 2, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(second), 6, 6])],
        [
            numpy_helper.from_array(values.astype(np.float32)[..., None, None], name)
            for name, values in (("a.weight", first), ("b.weight", second))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


FIRST, SECOND = np.array([[1.0, 2.0], [0.5, -1.0], [4.0, 0.25]]), np.array([[1.0, 3.0, -2.0]])
EXACT = two_layers(FIRST, SECOND)


def test_a_layer_delivers_what_is_behind_its_relu() -> None:
    """The sites are the layers in order, each with the tensor that the next one reads."""
    sites = layer_sites(EXACT)
    assert [("a", "a.relu"), ("b", "logits")] == [(s.node.name, s.tensor) for s in sites]


def test_own_error_is_apart_from_what_a_layer_inherits() -> None:
    """a is 10 % too large, b is right: both deliver 20 dB, but b's own result is exact."""
    wrong = two_layers(1.1 * FIRST, SECOND)
    table = measure_layers(EXACT, EXACT, wrong, "int8", (IMAGES,))
    a, b = table.rows
    assert pytest.approx(20.0, abs=1e-3) == a.sqnr_db == a.own_sqnr_db
    assert pytest.approx(20.0, abs=1e-3) == b.sqnr_db
    assert 200.0 == b.own_sqnr_db
    assert (5, None) == (table.images, table.reason)
    json.dumps(table.to_json(), allow_nan=False)


def test_channel_maxima_before_and_after_rescaling() -> None:
    """Channel 2 of a is divided by 4 and given back in b: the ranges say so, SQNR stays exact."""
    scales = np.array([1.0, 1.0, 4.0])
    rescaled = two_layers(FIRST / scales[:, None], SECOND * scales)
    table = measure_layers(EXACT, rescaled, None, "int8", (IMAGES,))
    maxima = np.maximum(0, np.einsum("oc,nchw->nohw", FIRST, IMAGES)).max(axis=(0, 2, 3))
    before, after = table.rows[0].activations.before, table.rows[0].activations.after
    assert before is not None
    assert pytest.approx(sorted(maxima), rel=1e-5) == [
        before.smallest, before.median, before.largest,
    ]  # fmt: skip
    assert pytest.approx(max(maxima / scales), rel=1e-5) == after.largest
    weights = table.rows[1].weights
    assert weights.before is not None
    assert (1.0, 2.0, 3.0) == (
        weights.before.smallest, weights.before.median, weights.before.largest,
    )  # fmt: skip
    assert (1.0, 3.0, 8.0) == (
        weights.after.smallest, weights.after.median, weights.after.largest,
    )  # fmt: skip
    assert table.rows[0].sqnr_db is None


def test_layers_in_half_are_called_so() -> None:
    """The data type is that of the multiplication."""
    model = two_layers(FIRST, SECOND / 3)
    table = measure_layers(model, model, in_half(model, ("b",)), "int8", (IMAGES,))
    assert ["float", "half"] == [row.computed_in for row in table.rows]
    assert 200.0 == table.rows[0].sqnr_db
    assert 55 < (table.rows[1].own_sqnr_db or 0) < 90


def test_a_graph_that_cannot_run_here_leaves_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says why there is no SQNR."""
    odd = two_layers(FIRST, SECOND)
    odd.graph.node[2].op_type, odd.graph.node[2].domain = "Conv", "nobody.has.this"
    odd.opset_import.append(helper.make_opsetid("nobody.has.this", 1))
    table = measure_layers(EXACT, EXACT, odd, "fp8", (IMAGES,))
    assert (table.reason or "").startswith("ONNX Runtime refuses the graph: ")
    assert [None, None] == [row.sqnr_db for row in table.rows]
    assert table.rows[0].activations.after.largest > 0


@settings(deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_a_spread_is_ordered_and_counts_the_dead(channels: list[float]) -> None:
    """Channels that are always 0 are counted apart and decide nothing."""
    maxima = np.array(channels)
    found = spread(maxima)
    assert found.smallest <= found.median <= found.largest == maxima.max()
    assert int((maxima == 0).sum()) == found.dead
    assert (found.smallest > 0) == (found.dead < len(maxima))


def test_input_channels_of_grouped_and_depthwise_weights() -> None:
    """Each group's own input channels, in order."""
    weight = np.array([[[[1.0]]], [[[-2.0]]], [[[3.0]]], [[[4.0]]]], dtype=np.float32)
    node = helper.make_node("Conv", ["images", "w"], ["logits"], name="c", group=2)
    graph = helper.make_graph(
        [node],
        "grouped",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 2, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (row,) = measure_layers(model, model, None, "fp32", (IMAGES,)).rows
    assert (2.0, 4.0) == (row.weights.after.smallest, row.weights.after.largest)


def test_forced_operations_see_the_given_tensors_only() -> None:
    """b computes from what is given for a, whatever a made of the images."""
    at = as_they_are(["a.relu", "logits"])
    given = {
        "a.relu": np.ones((5, 3, 6, 6), np.float32),
        "logits": np.zeros((5, 1, 6, 6), np.float32),
    }
    found = Probe(EXACT, at, given=True).run((IMAGES,), given)
    np.testing.assert_allclose(found["logits"], SECOND.sum(), rtol=1e-6)
    exact = Probe(EXACT, at).run((IMAGES,))
    np.testing.assert_array_equal(exact["a.relu"], found["a.relu"])
    names = [value.name for value in forced(EXACT, at).graph.input]
    assert ["images", "a.relu.given", "logits.given"] == names
    assert ["a.relu", "logits"] == [value.name for value in exposed(EXACT, at).graph.output]


def test_tensors_are_found_in_half_graphs() -> None:
    """Under their own name inside, as ``T.half`` where only that is computed."""
    tensors = ["a.output", "a.relu", "logits"]
    assert tensors == list(float_tensors(EXACT))
    half = {place.tensor: place for place in places(tensors, to_type(HALF, EXACT))}
    assert ("logits.half", TensorProto.FLOAT16) == (
        half["logits"].found, half["logits"].data_type,
    )  # fmt: skip
    mixed = {place.tensor: place.found for place in places(tensors, in_half(EXACT, ("a",)))}
    assert {"a.output": "a.output.half", "a.relu": "a.relu.half", "logits": "logits"} == mixed


def test_noise_adds_up_over_batches_and_never_hides_what_is_not_finite() -> None:
    """SQNR of two batches is that of both together; NaN and another shape are all noise."""
    whole, parts = Noise(), Noise()
    r, y = IMAGES, 1.01 * IMAGES
    whole.add(r, y)
    for index in range(len(r)):
        parts.add(r[index], y[index])
    assert pytest.approx(40.0, abs=1e-3) == whole.sqnr_db
    assert pytest.approx(whole.sqnr_db) == parts.sqnr_db
    parts.add(r, np.full_like(r, np.nan))
    assert -200.0 == parts.sqnr_db
    whole.add(r, y[:, :1])
    assert -200.0 == whole.sqnr_db
    assert OnnxRunner(EXACT).run((IMAGES,))["logits"].shape == (5, 1, 6, 6)


def logits(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_changed_answers_come_first_then_the_largest_difference() -> None:
    """Image 2 changes its answer by a hair; image 1 differs most and keeps it."""
    reference = logits((3, 0, 0), (5, 0, 0), (1, 0.99, 0), (2, 0, 0))
    output = logits((3, 0, 0), (4, 0, 0), (1, 1.01, 0), (2, 0, 0.5))
    found = worst_images(
        "int8", reference, output, names=["a", "b", "c", "d"], labels=np.array([0, 1, 2, 0]),
        class_names=["cat", "dog", "owl"], classifier=True, count=3,
    )  # fmt: skip
    assert ("int8", 1, [2, 1, 3]) == (found.stage, found.changed, [row.index for row in found.rows])
    first = found.rows[0]
    assert ("c", "owl") == (first.name, first.label)
    assert ("cat", "dog") == (first.original[0].name, first.precision[0].name)
    assert (
        pytest.approx(np.exp(1) / (np.exp(1) + np.exp(0.99) + 1)) == first.original[0].probability
    )
    assert 3 == len(first.original) == len(first.precision)
    json.dumps(found.to_json(), allow_nan=False)


def test_networks_that_are_no_classifier_have_no_answers() -> None:
    """Feature maps are ranked by their largest difference."""
    output = IMAGES.copy()
    output[3] += 0.5
    found = worst_images(
        "fp16", IMAGES, output, names=list("abcde"), labels=None, class_names=None,
        classifier=False, count=1,
    )  # fmt: skip
    (row,) = found.rows
    assert (None, 3, "d", ()) == (found.changed, row.index, row.name, row.original)
    assert pytest.approx(0.5) == row.max_abs


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(2, 4)),
    seed=st.integers(0, 1000),
    count=st.integers(1, 12),
)
def test_the_worst_images_are_those_that_differ_most(
    shape: tuple[int, int], seed: int, count: int
) -> None:
    """No image that is left out goes before one that is shown; ties and equal images included."""
    reference, output = np.random.default_rng(seed).integers(-3, 4, (2, *shape)).astype(np.float32)
    found = worst_images(
        "int8", reference, output, names=[str(n) for n in range(len(reference))], labels=None,
        class_names=None, classifier=True, count=count,
    )  # fmt: skip
    keys = [
        (bool(r.argmax() != y.argmax()), float(np.abs(r - y).max()))
        for r, y in zip(reference, output, strict=True)
    ]
    shown = [row.index for row in found.rows]
    assert min(count, len(keys)) == len(set(shown))
    assert sorted(keys, reverse=True)[: len(shown)] == [keys[index] for index in shown]
