"""Normalization inside the graph: what it computes, how it is read back, and how it comes off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calibration.images import Preprocess
from exporter.errors import GateFailedError, InputError
from exporter.graph import graph_sha256
from exporter.graph.prologue import (
    Prologue,
    normalized,
    read_prologue,
    require_prologue,
    with_prologue,
    without_prologue,
)
from exporter.pixel_input import Layout, recorded_layout
from exporter.precision import BFLOAT16, HALF, to_type
from exporter.running.onnx_runner import OnnxRunner

OPERATORS = {Layout.NHWC: ("Cast", "Sub", "Mul", "Transpose"), Layout.NCHW: ("Cast", "Sub", "Mul")}
MEANS = st.tuples(*[st.floats(-2, 2)] * 3)
STDS = st.tuples(*[st.floats(0.01, 4)] * 3)
IMAGENET = Preprocess()


def network(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A padded 3x3 convolution and a ReLU, or other ``nodes``, on images of any size."""
    kernel = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        list(nodes)
        or [
            helper.make_node("Conv", ["images", "kernel"], ["c"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], "relu"),
        ],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, ["n", "c", "h", "w"])],
        [] if nodes else [numpy_helper.from_array(kernel, "kernel")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def identity() -> onnx.ModelProto:
    return network(helper.make_node("Identity", ["images"], ["r"]))


def prologue(layout: Layout, preprocess: Preprocess = IMAGENET) -> Prologue:
    return Prologue(layout=layout, preprocess=preprocess)


def pixels_of(count: int, height: int, width: int) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(count).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("layout", Layout)
def test_every_pixel_value_becomes_what_the_preprocessing_makes_of_it(layout: Layout) -> None:
    """All 256 values of all channels, to 1e-6 with ImageNet's constants."""
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    found = OnnxRunner(with_prologue(identity(), prologue(layout)))(layout.arranged(pixels))
    np.testing.assert_allclose(found, IMAGENET.normalize(pixels), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(MEANS, STDS, st.sampled_from(Layout), st.tuples(st.integers(1, 3), *[st.integers(1, 9)] * 2))
def test_the_graph_on_pixels_is_the_graph_on_normalized_images(
    mean, std, layout: Layout, size: tuple[int, int, int]
) -> None:
    """Whatever mean, std, layout and size: within the bound of the module's docstring."""
    preprocess = Preprocess(mean=mean, std=std)
    pixels = pixels_of(*size)
    images = preprocess.normalize(pixels)
    own = prologue(layout, preprocess)
    bound = 8 * 2**-24 * (255 + abs(own.subtracted)) * own.factor
    found = OnnxRunner(with_prologue(identity(), own))(layout.arranged(pixels))
    assert (abs(found - images) <= bound[:, None, None]).all()
    model = network()
    expected = OnnxRunner(model)(images)
    (given_pixels,) = own.pixels((images,))
    np.testing.assert_array_equal(layout.arranged(pixels), given_pixels)
    found = OnnxRunner(with_prologue(model, own))(given_pixels)
    # 27 products of inputs that are off by the bound, and weights below 4.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=27 * 4 * bound.max())


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(
    "made",
    [network, lambda: to_type(HALF, network()), lambda: to_type(BFLOAT16, network())],
    ids=["float", "half", "bfloat16"],
)
def test_what_is_put_on_comes_off_byte_for_byte(
    layout: Layout, made: Callable[[], onnx.ModelProto]
) -> None:
    """The network itself is not touched: the hash that a calibration table is bound to stays."""
    model = made()
    before = graph_sha256(model)
    preceded = with_prologue(model, prologue(layout))
    assert before == graph_sha256(model) == graph_sha256(without_prologue(preceded))
    read_back = onnx.ModelProto.FromString(preceded.SerializeToString())
    assert before == graph_sha256(without_prologue(read_back))
    assert without_prologue(model) is model


@pytest.mark.parametrize("layout", Layout)
def test_the_prologue_reads_back(layout: Layout) -> None:
    """Operators, data type, layout, mean and std; the input keeps its name and turns uint8."""
    model = with_prologue(network(), prologue(layout))
    require_prologue(model, prologue(layout))
    found = read_prologue(model)
    assert found is not None
    assert {
        "operators": list(OPERATORS[layout]),
        "dtype": "uint8",
        "layout": str(layout),
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    } == found.to_json()
    count = len(OPERATORS[layout])
    assert OPERATORS[layout] == tuple(node.op_type for node in model.graph.node[:count])
    assert OPERATORS[layout] == prologue(layout).operators
    (port,) = model.graph.input
    assert ("images", TensorProto.UINT8) == (port.name, port.type.tensor_type.elem_type)
    extents = [dim.dim_param or dim.dim_value for dim in port.type.tensor_type.shape.dim]
    assert list(layout.shape(("n", 3, "h", "w"))) == extents
    assert normalized("images") == model.graph.node[count].input[0]


def test_graphs_without_a_prologue_have_none() -> None:
    """A float graph; one with two inputs; half graphs, which begin with a Cast too."""
    assert read_prologue(network()) is None
    assert read_prologue(to_type(HALF, network())) is None
    two = network()
    two.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    assert read_prologue(two) is None


def mutated(change: Callable[[onnx.GraphProto], object], layout: Layout) -> onnx.ModelProto:
    model = with_prologue(network(), prologue(layout))
    change(model.graph)
    return model


def constant(graph: onnx.GraphProto, index: int) -> onnx.TensorProto:
    """The second operand of a node of the prologue."""
    name = graph.node[index].input[1]
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def nudge(graph: onnx.GraphProto, index: int) -> None:
    """The last bit of one number."""
    tensor = constant(graph, index)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[1] = np.nextafter(values.flat[1], np.float32(1e9))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("index", "words"), [(1, "subtracts"), (2, "multiplies by")])
def test_a_changed_constant_fails_the_check(layout: Layout, index: int, words: str) -> None:
    """One bit of one number is enough."""
    model = mutated(lambda graph: nudge(graph, index), layout)
    with pytest.raises(GateFailedError, match=rf"the graph's prologue {words} \[.*asks for \["):
        require_prologue(model, prologue(layout))


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph.node.pop(2),
        lambda graph: graph.node[3].attribute[0].ints.__setitem__(3, 3),
        lambda graph: graph.node[-2].input.__setitem__(0, "images.prologue.mul"),
        lambda graph: setattr(graph.input[0].type.tensor_type, "elem_type", TensorProto.INT8),
        lambda graph: constant(graph, 1).CopyFrom(
            numpy_helper.from_array(np.zeros(4, np.float32), "images.prologue.sub.constant")
        ),
        lambda graph: graph.initializer.remove(constant(graph, 2)),
    ],
    ids=["node", "axes", "reader", "type", "shape", "operand"],
)
def test_a_changed_structure_fails_the_check(change: Callable[[onnx.GraphProto], object]) -> None:
    """A node too few, other axes, a reader in between, another type, operands that do not fit."""
    model = mutated(change, Layout.NHWC)
    assert read_prologue(model) is None
    with pytest.raises(
        GateFailedError,
        match=r"does not begin with the prologue Cast, Sub, Mul, Transpose for nhwc pixels, but",
    ):
        require_prologue(model, prologue(Layout.NHWC))


def test_the_other_layout_fails_the_check() -> None:
    """Pixels [N, H, W, 3] are no pixels [N, 3, H, W]."""
    model = with_prologue(network(), prologue(Layout.NCHW))
    with pytest.raises(GateFailedError, match="for nhwc pixels, but with Cast, Sub, Mul, Conv"):
        require_prologue(model, prologue(Layout.NHWC))


def test_arrays_that_are_no_pixels_are_refused() -> None:
    """Half a grey value off is too far; what float32 rounds away is not."""
    images = IMAGENET.normalize(pixels_of(2, 4, 4))
    own = prologue(Layout.NHWC)
    own.pixels((images + np.float32(1e-5),))
    for wrong in (images + np.float32(0.5 / 58), images + np.float32(6), images * np.nan):
        with pytest.raises(InputError, match="but these arrays are not normalized ones"):
            own.pixels((wrong,))


def test_images_are_rounded_to_whole_pixels() -> None:
    """The nearest normalized pixels; those that are such already stay bit for bit."""
    images = IMAGENET.normalize(pixels_of(2, 4, 4))
    own = prologue(Layout.NCHW)
    np.testing.assert_array_equal(images, own.whole((images,))[0])
    np.testing.assert_array_equal(images, own.whole((images + np.float32(0.4 / 58),))[0])


@pytest.mark.parametrize("layout", Layout)
def test_layouts_agree_on_arrays_shapes_and_axes(layout: Layout) -> None:
    """Arranged pixels have the layout's shape, and its axes lead back."""
    pixels = pixels_of(2, 5, 7)
    arranged = layout.arranged(pixels)
    assert arranged.shape == layout.shape((2, 3, 5, 7))
    np.testing.assert_array_equal(pixels.transpose(0, 3, 1, 2), arranged.transpose(layout.to_nchw))
    assert (0, 1, 2, 3) == tuple(layout.from_nchw[axis] for axis in layout.to_nchw)


def test_bundles_say_whether_they_take_pixels() -> None:
    """The port has the layout; ports without one, and bundles of older versions, take floats."""
    port = prologue(Layout.NCHW).port("images", ("batch", 3, 8, 9))
    assert ["batch", 3, 8, 9] == port["shape"]
    assert Layout.NCHW is recorded_layout({"inputs": [port]})
    assert recorded_layout({"inputs": [{"name": "images", "shape": []}]}) is None
    assert recorded_layout({}) is None
