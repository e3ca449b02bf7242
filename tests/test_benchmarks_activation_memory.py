"""Liveness: against a hand-computed graph, an allocator that runs step by step, ONNX Runtime."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
BLOCK = """
<ir_version: 8, opset_import: ["" : 17]>
block (float[n, 4, 8, 8] images) => (float[n, 4] logits)
<float[4, 4, 3, 3] w3, float[4, 4, 1, 1] w1, float[4, 4, 3, 3] w>
{
    x = Conv <pads = [1, 1, 1, 1]> (images, w3)
    dense = Conv <pads = [1, 1, 1, 1]> (x, w)
    point = Conv (x, w1)
    both = Add (dense, point)
    all = Add (both, x)
    out = Relu (all)
    mean = GlobalAveragePool (out)
    logits = Flatten (mean)
}
"""
TWO_BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
branches (float[n, 4, 8, 8] images) => (float[n, 4, 1, 1] out)
{
    a = Abs (images)
    a_mean = GlobalAveragePool (a)
    b = Neg (images)
    b_mean = GlobalAveragePool (b)
    out = Add (a_mean, b_mean)
}
"""
S, POOLED = 4 * 8 * 8 * 4, 16
"""Bytes of a feature map and of what the pooling leaves of it."""


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield


@pytest.fixture(scope="module")
def memory(on_path: None) -> ModuleType:
    return import_module("activation_memory")


@pytest.fixture(scope="module")
def block() -> onnx.ModelProto:
    """A residual train-form block with random weights, its nodes named after their outputs."""
    model = onnx.parser.parse_model(BLOCK)
    rng = np.random.default_rng(0)
    # What the text only declares becomes a weight.
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        values = rng.standard_normal(shape, np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, value.name))
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.name = node.output[0]
    return model


def test_a_residual_block_holds_what_was_counted_by_hand(memory, block):
    """x; x, dense; x, dense, point; x, dense, point, both; x, both, all; in place; pooled; flat."""
    found = memory.activation_memory(block, 1)
    assert tuple(node.name for node in block.graph.node) == found.names
    assert (S, 2 * S, 3 * S, 4 * S, 3 * S, S, S + POOLED, 2 * POOLED) == found.held
    assert (4 * S, "both") == (found.peak, found.where)


def test_memory_is_proportional_to_the_batch(memory, block):
    """Every activation has the batch as its first axis."""
    one, many = (memory.activation_memory(block, batch) for batch in (1, 7))
    assert tuple(7 * value for value in one.held) == many.held


def test_the_order_decides_the_peak(memory):
    """Two branches that are pooled before they meet: one after the other, or side by side."""
    model = onnx.parser.parse_model(TWO_BRANCHES)
    for node in model.graph.node:
        node.name = node.output[0]
    after = memory.activation_memory(model, 1)
    beside = memory.activation_memory(model, 1, ["a", "b", "a_mean", "b_mean", "out"])
    assert (S + 2 * POOLED, "b_mean") == (after.peak, after.where)
    assert (2 * S + POOLED, "a_mean") == (beside.peak, beside.where)


def test_an_order_that_is_none_is_refused(memory, block):
    """A node missing, and one before its input."""
    names = [node.name for node in block.graph.node]
    with pytest.raises(ValueError, match="does not name every node of the graph once"):
        memory.activation_memory(block, 1, names[1:])
    with pytest.raises(ValueError, match="dense would run before x is computed"):
        memory.activation_memory(block, 1, [names[1], names[0], *names[2:]])


def test_onnx_runtime_holds_the_computed_bytes_after_every_node(memory, block, tmp_path):
    """Its allocator's own count, without optimizations."""
    profile = import_module("ort_profile")
    onnx.save(block, tmp_path / "block.onnx")
    images = np.zeros((3, 4, 8, 8), np.float32)
    runs = profile.profiled(tmp_path / "block.onnx", images, 2, as_written=True)
    computed = memory.activation_memory(block, 3, [node.name for node in runs[0]])
    assert 2 == len(runs)
    for held in profile.held_by_activations(runs):
        assert list(computed.held) == held


def test_a_profile_without_counters_is_named(on_path):
    """Releases that do not count memory cannot confirm anything."""
    profile = import_module("ort_profile")
    node = profile.NodeRun(
        name="x", op="Conv", seconds=1.0, inputs=(), outputs=(), held_bytes=None, new_bytes=None
    )
    with pytest.raises(profile.MissingCountersError, match="has no memory counters"):
        profile.held_by_activations([[node]])


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[tuple[list[int], bool]], list[int], set[int]]:
    """Each step's inputs, all earlier, and whether it works in place; sizes; outputs."""
    count = draw(st.integers(1, 12))
    steps = []
    sizes: list[int] = []
    for index in range(count):
        reads = draw(st.lists(st.integers(0, index - 1), max_size=3)) if index else []
        in_place = draw(st.booleans()) and len(reads) == 1
        steps.append((reads, in_place))
        sizes.append(sizes[reads[0]] if in_place else draw(st.integers(1, 100)))
    outputs = draw(st.sets(st.integers(0, count - 1)))
    return steps, sizes, outputs


def _by_an_allocator(graph: Any) -> list[int]:
    """Bytes after each step: allocate, count the readers down, free."""
    steps, sizes, outputs = graph
    readers = [sum(reads.count(tensor) for reads, _ in steps) for tensor in range(len(steps))]
    readers = [n + (tensor in outputs) for tensor, n in enumerate(readers)]
    alive: set[int] = set()
    held = []
    for index, (reads, in_place) in enumerate(steps):
        for tensor in reads:
            readers[tensor] -= 1
        if in_place and readers[reads[0]] == 0 and index not in outputs:
            alive.discard(reads[0])
        alive.add(index)
        held.append(sum(sizes[tensor] for tensor in alive))
        alive = {tensor for tensor in alive if readers[tensor]}
    return held


@given(graphs())
def test_the_profile_is_what_an_allocator_holds(graph):
    """For any graph, in-place steps, unread tensors and outputs in the middle included."""
    memory = import_module("activation_memory")
    steps, sizes, outputs = graph
    made = [
        memory.Step(
            name=str(i), reads=tuple(map(str, reads)), computes=(str(i),), in_place=in_place
        )
        for i, (reads, in_place) in enumerate(steps)
    ]
    named = {str(i): size for i, size in enumerate(sizes)}
    found = memory.profile(made, named, frozenset(map(str, outputs)))
    assert _by_an_allocator(graph) == list(found.held)
    assert max(sizes) <= found.peak <= sum(sizes)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=10))
def test_a_chain_needs_the_largest_pair_of_neighbours(sizes):
    """Each layer's input and output, nothing else."""
    memory = import_module("activation_memory")
    names = [str(index) for index in range(len(sizes))]
    steps = [
        memory.Step(name=name, reads=tuple(names[max(index - 1, 0) : index]), computes=(name,))
        for index, name in enumerate(names)
    ]
    found = memory.profile(steps, dict(zip(names, sizes, strict=True)), frozenset(names[-1:]))
    assert max(a + b for a, b in pairwise(sizes)) == found.peak
