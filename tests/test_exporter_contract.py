"""The graph contract: what a plain RepVGG may look like, and every way in which a graph may not."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from exporter.contract import (
    BlockConvolution,
    ContractVerdict,
    judge,
    require,
    require_blocks,
)
from exporter.errors import GateFailedError
from models.variants import VARIANTS, Squeeze, Variant

SMALL = Variant(
    name="B1g2", num_blocks=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25), groups=2
)
CLASSES = 10
Mutation = Callable[[onnx.ModelProto], None]


def parameter(name: str, *shape: int) -> TensorProto:
    """A tensor without data: the contract reads shapes, so B3 costs no memory."""
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)


def plain(variant: Variant = SMALL, classes: int = CLASSES) -> onnx.ModelProto:
    nodes, parameters, current = [], [], "images"
    for layer in variant.layers:
        name = layer.name
        parameters += [
            parameter(f"{name}.weight", *layer.weight_shape),
            parameter(f"{name}.bias", layer.out_channels),
        ]
        conv = helper.make_node(
            "Conv",
            [current, f"{name}.weight", f"{name}.bias"],
            [f"{name}.conv.output"],
            name=f"{name}.conv",
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
            strides=[layer.stride] * 2,
            dilations=[1, 1],
            group=layer.groups,
        )
        current = f"{name}.output"
        relu = helper.make_node("Relu", conv.output, [current], name=f"{name}.relu")
        nodes += [conv, relu]
    nodes += [
        helper.make_node("GlobalAveragePool", [current], ["pooled"], name="head.pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="head.flatten", axis=1),
        helper.make_node(
            "Gemm",
            ["flat", "linear.weight", "linear.bias"],
            ["logits"],
            name="linear",
            transB=1,
        ),
    ]
    parameters += [
        parameter("linear.weight", classes, variant.feature_channels),
        parameter("linear.bias", classes),
    ]
    graph = helper.make_graph(
        nodes,
        "plain",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        parameters,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def set_attribute(model: onnx.ModelProto, name: str, key: str, value: object) -> None:
    target = node(model, name)
    for attribute in list(target.attribute):
        if attribute.name == key:
            target.attribute.remove(attribute)
    target.attribute.append(helper.make_attribute(key, value))


def set_shape(model: onnx.ModelProto, name: str, *shape: int) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    del tensor.dims[:]
    tensor.dims.extend(shape)


def insert_behind(model: onnx.ModelProto, name: str, new: onnx.NodeProto) -> None:
    """Put ``new`` into the chain behind the node ``name``; its first output is rewired."""
    nodes = list(model.graph.node)
    index = [n.name for n in nodes].index(name)
    old = nodes[index].output[0]
    new.input[0], new.output[0] = old, f"{old}.more"
    for later in nodes[index + 1 :]:
        for position, source in enumerate(later.input):
            if source == old:
                later.input[position] = new.output[0]
    nodes.insert(index + 1, new)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def drop(model: onnx.ModelProto, name: str) -> None:
    """Take a node out of the chain."""
    gone = node(model, name)
    for later in model.graph.node:
        for position, source in enumerate(later.input):
            if source == gone.output[0]:
                later.input[position] = gone.input[0]
    model.graph.node.remove(gone)


def verdict(change: Mutation | None = None, variant: Variant = SMALL) -> ContractVerdict:
    model = plain(variant)
    if change:
        change(model)
    return judge(model, variant, CLASSES)


PLAIN_NAMES = [name for name, variant in VARIANTS.items() if variant.squeeze is Squeeze.NONE]


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_every_published_variant_passes(name: str) -> None:
    """A graph with exactly a variant's operators and shapes has no violation."""
    variant = VARIANTS[name]
    found, n = judge(plain(variant, 1000), variant, 1000), len(variant.layers)
    assert ContractVerdict(convolutions=n, violations=(), blocks=n) == found
    assert found.passed


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_a_variant_is_no_other_variant(name: str) -> None:
    """Each variant's graph breaks the contract of all twelve others."""
    model = plain(VARIANTS[name], 1000)
    passed = [n for n in PLAIN_NAMES if judge(model, VARIANTS[n], 1000).passed]
    assert [name] == passed


CHANGES: dict[str, tuple[Mutation, str]] = {
    "kernel 1x1": (
        lambda m: set_shape(m, "stage2.0.weight", 32, 8, 1, 1),
        "node stage2.0.conv: weight shape is (32, 8, 1, 1), expected (32, 8, 3, 3)",
    ),
    "kernel 5x5": (
        lambda m: set_shape(m, "stage0.weight", 16, 3, 5, 5),
        "node stage0.conv: weight shape is (16, 3, 5, 5), expected (16, 3, 3, 3)",
    ),
    "kernel_shape": (
        lambda m: set_attribute(m, "stage0.conv", "kernel_shape", [5, 5]),
        "node stage0.conv: kernel_shape is [5, 5], expected [3, 3]",
    ),
    "pads": (
        lambda m: set_attribute(m, "stage1.0.conv", "pads", [1, 1, 0, 0]),
        "node stage1.0.conv: pads is [1, 1, 0, 0], expected [1, 1, 1, 1]",
    ),
    "stride": (
        lambda m: set_attribute(m, "stage2.1.conv", "strides", [2, 2]),
        "node stage2.1.conv: strides is [2, 2], expected [1, 1]",
    ),
    "uneven stride": (
        lambda m: set_attribute(m, "stage2.0.conv", "strides", [2, 1]),
        "node stage2.0.conv: strides is [2, 1], expected [2, 2]",
    ),
    "dilation": (
        lambda m: set_attribute(m, "stage3.1.conv", "dilations", [2, 2]),
        "node stage3.1.conv: dilations is [2, 2], expected [1, 1]",
    ),
    "group": (
        lambda m: set_attribute(m, "stage2.0.conv", "group", 1),
        "node stage2.0.conv: group is 1, expected 2",
    ),
    "auto_pad": (
        lambda m: set_attribute(m, "stage3.0.conv", "auto_pad", "SAME_UPPER"),
        "node stage3.0.conv: auto_pad is b'SAME_UPPER', expected b'NOTSET'",
    ),
    "no bias": (
        lambda m: node(m, "stage1.0.conv").input.pop(),
        "node stage1.0.conv: bias shape is None, expected (16,)",
    ),
    "computed weight": (
        lambda m: node(m, "stage1.0.conv").input.__setitem__(1, "elsewhere"),
        "node stage1.0.conv: weight shape is None, expected (16, 16, 3, 3)",
    ),
    "extra Identity": (
        lambda m: insert_behind(
            m, "stage2.0.relu", helper.make_node("Identity", ["x"], ["y"], name="same")
        ),
        "node same is Identity, expected Conv",
    ),
    "extra Add": (
        lambda m: insert_behind(
            m, "stage2.1.conv", helper.make_node("Add", ["x", "stage1.0.output"], ["y"], name="sum")
        ),
        "node sum is Add, expected Relu",
    ),
    "missing Relu": (
        lambda m: drop(m, "stage3.0.relu"),
        "node stage3.1.conv is Conv, expected Relu",
    ),
    "missing layer": (
        lambda m: [drop(m, "stage3.1.conv"), drop(m, "stage3.1.relu")],
        "node head.pool is GlobalAveragePool, expected Conv",
    ),
    "missing classifier": (
        lambda m: drop(m, "linear"),
        "the graph ends before Gemm (16 of 17 nodes)",
    ),
    "node behind the end": (
        lambda m: m.graph.node.append(
            helper.make_node("Softmax", ["logits"], ["probabilities"], name="softmax")
        ),
        "node softmax (Softmax) is one too many",
    ),
    "wrong head": (
        lambda m: setattr(node(m, "head.pool"), "op_type", "GlobalMaxPool"),
        "node head.pool is GlobalMaxPool, expected GlobalAveragePool",
    ),
    "flatten axis": (
        lambda m: set_attribute(m, "head.flatten", "axis", 2),
        "node head.flatten: axis is 2, expected 1",
    ),
    "classes": (
        lambda m: set_shape(m, "linear.weight", 11, 128),
        "node linear: weight shape is (11, 128), expected (10, 128)",
    ),
    "transB": (
        lambda m: set_attribute(m, "linear", "transB", 0),
        "node linear: weight shape is (10, 128), expected (128, 10)",
    ),
    "classifier bias": (
        lambda m: node(m, "linear").input.pop(),
        "node linear: bias shape is None, expected (10,)",
    ),
    "alpha": (
        lambda m: set_attribute(m, "linear", "alpha", 2.0),
        "node linear: alpha is 2.0, expected 1.0",
    ),
    "beta": (
        lambda m: set_attribute(m, "linear", "beta", 0.0),
        "node linear: beta is 0.0, expected 1.0",
    ),
    "transA": (
        lambda m: set_attribute(m, "linear", "transA", 1),
        "node linear: transA is 1, expected 0",
    ),
    "branch": (
        lambda m: node(m, "stage2.2.conv").input.__setitem__(0, "stage2.0.output"),
        "node stage2.2.conv does not read stage2.1.output",
    ),
    "relu skipped": (
        lambda m: node(m, "stage2.1.conv").input.__setitem__(0, "stage2.0.conv.output"),
        "node stage2.1.conv does not read stage2.0.output",
    ),
    "early output": (
        lambda m: setattr(m.graph.output[0], "name", "flat"),
        "the output flat is not the last node's",
    ),
    "second output": (
        lambda m: m.graph.output.append(
            helper.make_tensor_value_info("stage2.0.output", TensorProto.FLOAT, None)
        ),
        "the graph has 2 outputs, expected 1",
    ),
    "second input": (
        lambda m: m.graph.input.append(
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1])
        ),
        "the graph has 2 inputs, expected 1",
    ),
}
# A block of three in stage 2 so that a branch can skip one.
BRANCHED = Variant(
    name="B1g2", num_blocks=(1, 3, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.25), groups=2
)


@pytest.mark.parametrize("what", CHANGES)
def test_a_violation_is_named_with_its_node(what: str) -> None:
    """The verdict says which node is wrong, what was found and what was expected."""
    change, expected = CHANGES[what]
    variant = BRANCHED if what == "branch" else SMALL
    found = verdict(change, variant)
    assert not found.passed
    assert expected in found.violations


def test_a_single_attribute_is_a_single_violation() -> None:
    """A wrong stride is reported once, and the convolutions are counted all the same."""
    change, expected = CHANGES["stride"]
    assert ContractVerdict(convolutions=7, violations=(expected,), blocks=7) == verdict(change)


def test_a_gemm_without_transb_passes() -> None:
    """A classifier stored as [features, classes] is the same classifier."""

    def transposed(model: onnx.ModelProto) -> None:
        node(model, "linear").ClearField("attribute")
        set_shape(model, "linear.weight", 128, CLASSES)

    assert verdict(transposed).passed


def test_defaults_need_not_be_written() -> None:
    """Attributes that equal ONNX's defaults may be absent."""

    def bare(model: onnx.ModelProto) -> None:
        node(model, "head.flatten").ClearField("attribute")
        conv = node(model, "stage3.1.conv")
        for attribute in list(conv.attribute):
            if attribute.name in ("strides", "dilations", "group", "kernel_shape"):
                conv.attribute.remove(attribute)

    # stage3.1 is the 6th convolution (index 5), which is not grouped and has stride 1.
    model = plain()
    bare(model)
    layers = {layer.name: layer for layer in SMALL.layers}
    assert (1, 1) == (layers["stage3.1"].groups, layers["stage3.1"].stride)
    assert judge(model, SMALL, CLASSES).passed


def test_a_nameless_node_is_named_by_its_output() -> None:
    """Where a node has no name, its first output stands for it."""

    def nameless(model: onnx.ModelProto) -> None:
        set_attribute(model, "stage2.0.conv", "pads", [0, 0, 0, 0])
        node(model, "stage2.0.conv").name = ""

    (found,) = verdict(nameless).violations
    assert "node stage2.0.conv.output: pads is [0, 0, 0, 0], expected [1, 1, 1, 1]" == found


def test_an_empty_graph_is_a_verdict() -> None:
    """A graph without nodes, inputs and outputs fails the contract instead of crashing it."""
    assert not judge(onnx.ModelProto(), SMALL, CLASSES).passed


def test_require_returns_the_verdict_of_a_good_graph() -> None:
    """A plain graph comes back with its number of convolutions."""
    expected = ContractVerdict(convolutions=7, violations=(), blocks=7)
    assert expected == require(plain(), SMALL, CLASSES)


def test_require_names_the_first_violation_and_counts_the_rest() -> None:
    """The error is one sentence: variant, first offending node, how many more."""
    model = plain()
    set_attribute(model, "stage1.0.conv", "pads", [0, 0, 0, 0])
    set_attribute(model, "stage2.0.conv", "strides", [1, 1])
    set_attribute(model, "head.flatten", "axis", 0)
    with pytest.raises(GateFailedError) as caught:
        require(model, SMALL, CLASSES)
    assert (
        "the graph is not a plain RepVGG-B1g2: node stage1.0.conv: pads is [0, 0, 0, 0], "
        "expected [1, 1, 1, 1] (and 2 more)"
    ) == str(caught.value)


def test_require_counts_nothing_more_for_one_violation() -> None:
    """A single violation has no "and 0 more"."""
    model = plain()
    set_attribute(model, "stage1.0.conv", "pads", [0, 0, 0, 0])
    with pytest.raises(GateFailedError, match=r"expected \[1, 1, 1, 1\]$"):
        require(model, SMALL, CLASSES)


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, Mutation]:  # noqa: PLR0911, one kind a return
    """One random change that makes a plain graph something else, and its description."""
    names = [n.name for n in plain().graph.node]
    convs = [name for name in names if name.endswith(".conv")]
    kind = draw(st.sampled_from(["attribute", "shape", "insert", "drop", "op", "wire", "swap"]))
    if kind == "attribute":
        name = draw(st.sampled_from(convs))
        now = {a.name: helper.get_attribute_value(a) for a in node(plain(), name).attribute}
        key = draw(st.sampled_from(sorted(now)))
        size = {"pads": 4, "group": 0}.get(key, 2)
        values = st.integers(1, 5) if size == 0 else st.lists(st.integers(0, 5), min_size=size,
                                                              max_size=size)  # fmt: skip
        value = draw(values.filter(lambda value: value != now[key]))
        return f"{name} {key}={value}", lambda m: set_attribute(m, name, key, value)
    if kind == "shape":
        tensor = draw(st.sampled_from(list(plain().graph.initializer)))
        dims = list(tensor.dims)
        axis = draw(st.integers(0, len(dims) - 1))
        dims[axis] = draw(st.integers(1, 200).filter(lambda size: size != dims[axis]))
        return f"{tensor.name} {dims}", lambda m: set_shape(m, tensor.name, *dims)
    name = draw(st.sampled_from(names))
    if kind == "insert":
        op = draw(st.sampled_from(["Identity", "Relu", "Cast", "Dropout", "Sigmoid", "Add"]))
        new = helper.make_node(op, ["x"], ["y"], name="new")
        return f"{op} behind {name}", lambda m: insert_behind(m, name, new)
    if kind == "drop":
        return f"without {name}", lambda m: drop(m, name)
    if kind == "op":
        old = node(plain(), name).op_type
        ops = ["Conv", "Relu", "Gemm", "Flatten", "LeakyRelu", "MaxPool", "MatMul", "Identity"]
        op = draw(st.sampled_from(ops).filter(lambda op: op != old))
        return f"{name} is {op}", lambda m: setattr(node(m, name), "op_type", op)
    index = draw(st.integers(1, len(names) - 1))
    if kind == "wire":
        sources = ["images", *(n.output[0] for n in plain().graph.node)]
        source = draw(st.sampled_from(sources[:index]))
        return (
            f"{names[index]} reads {source}",
            lambda m: m.graph.node[index].input.__setitem__(0, source),
        )
    other = draw(st.integers(0, index - 1))

    def swap(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        nodes[index], nodes[other] = nodes[other], nodes[index]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    return f"{names[index]} and {names[other]} swapped", swap


@given(mutations())
@settings(max_examples=300, deadline=None)
def test_any_single_mutation_is_a_violation(mutation: tuple[str, Mutation]) -> None:
    """No single change of an attribute, shape, operator or wire leaves the contract intact."""
    what, change = mutation
    assert not verdict(change).passed, what


BLOCKS = """
<ir_version: 8, opset_import: ["" : 17]>
custom (float[batch,4,8,8] image) => (float[batch,4,8,8] output) {
    ["a.rbr_reparam.conv"] x = Conv <pads = [2,2,2,2], dilations = [2,2]> (image, "a.weight", ab)
    ["a.act.relu"] y = Relu (x)
    ["b.rbr_reparam.conv"] z = Conv <pads = [1,1,1,1], group = 2> (y, "b.weight", bb)
    ["side.conv"] s = Conv (y, sw, sb)
    ["add"] t = Add (z, s)
    ["relu"] output = Relu (t)
}
"""
BLOCK_SHAPES = {
    "a.weight": (4, 4, 3, 3), "ab": (4,), "b.weight": (4, 2, 3, 3), "bb": (4,),
    "sw": (4, 4, 1, 1), "sb": (4,),
}  # fmt: skip
EXPECTED = {
    "a": BlockConvolution(
        weight="a.weight", weight_shape=(4, 4, 3, 3), strides=(1, 1), pads=(2, 2, 2, 2),
        dilations=(2, 2), groups=1,
    ),
    "b": BlockConvolution(
        weight="b.weight", weight_shape=(4, 2, 3, 3), strides=(1, 1), pads=(1, 1, 1, 1),
        dilations=(1, 1), groups=2,
    ),
}  # fmt: skip


def custom(text: str = BLOCKS) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for name, shape in BLOCK_SHAPES.items():
        zeros = [0.0] * math.prod(shape)
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, shape, zeros))
    return model


def test_every_fused_block_is_one_convolution_and_the_rest_is_listed() -> None:
    """Blocks and the ReLU behind a block are no extras; everything else is counted."""
    verdict = require_blocks(custom(), EXPECTED, "Net")
    assert (3, 2, ()) == (verdict.convolutions, verdict.blocks, verdict.violations)
    assert {"Add": 1, "Conv": 1, "Relu": 1} == verdict.extras
    assert {
        "verdict": "pass", "convolutions": 3, "blocks": 2,
        "allowed_extras": {"Add": 1, "Conv": 1, "Relu": 1},
    } == verdict.to_json()  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"b.weight", bb', "sw2, bb", "block b is 0 convolutions, expected 1"),
        ("(y, sw, sb)", '(y, "b.weight", sb)',
         "block b is 2 convolutions (b.rbr_reparam.conv, side.conv), expected 1"),
        ("dilations = [2,2]", "dilations = [1,1]", "dilations is [1, 1], expected [2, 2]"),
        ("pads = [1,1,1,1], group", "pads = [1,1,0,0], group", "pads is [1, 1, 0, 0], expected"),
        ("group = 2", "group = 4", "block b: node b.rbr_reparam.conv: group is 4, expected 2"),
        ("pads = [2,2,2,2],", "pads = [2,2,2,2], strides = [2,1],", "strides is [2, 1], expected"),
        ("ab)", "sw)", "block a: node a.rbr_reparam.conv: bias shape is (4, 4, 1, 1), expected"),
        ('["a.act.relu"] y = Relu (x)', '["bn"] y = BatchNormalization (x, ab, ab, ab, ab)',
         "node bn is a BatchNormalization behind a fused block"),
    ],
)  # fmt: skip
def test_a_block_that_is_not_there_is_named(before: str, after: str, said: str) -> None:
    """Missing, doubled and changed blocks fail the gate, each with its block's name."""
    assert before in BLOCKS
    model = custom(BLOCKS.replace(before, after))
    with pytest.raises(GateFailedError, match="the graph is not the reparameterized Net: ") as info:
        require_blocks(model, EXPECTED, "Net")
    assert said in str(info.value)
