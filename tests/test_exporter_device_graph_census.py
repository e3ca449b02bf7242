"""Counting convolutions in an ONNX file without the onnx package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporter.device.graph_census import GraphCensus, read_census
from exporter.errors import InputError
from exporter.graph import pointwise_convolutions


def chain(kernels: list[tuple[int, bool]]) -> onnx.ModelProto:
    """One Conv a pair (kernel size, whether a DequantizeLinear feeds its data and weight)."""
    nodes, constants, tensor = [], [], "images"
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "scale")
    for number, (size, quantized) in enumerate(kernels):
        weight = f"weight{number}"
        kind = np.int8 if quantized else np.float32
        constants.append(numpy_helper.from_array(np.ones((3, 3, size, size), kind), weight))
        if quantized:
            names = (f"q{number}", f"dq{number}")
            nodes.append(helper.make_node("QuantizeLinear", [tensor, "scale"], [names[0]]))
            nodes.append(helper.make_node("DequantizeLinear", [names[0], "scale"], [names[1]]))
            nodes.append(helper.make_node("DequantizeLinear", [weight, "scale"], [f"w{number}"]))
            tensor, weight = names[1], f"w{number}"
        pads = [size // 2] * 4
        nodes.append(helper.make_node("Conv", [tensor, weight], [f"c{number}"], pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"r{number}"]))
        tensor = f"r{number}"
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8])
        for name in ("images", tensor)
    ]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], [scale, *constants])
    return helper.make_model(graph)


@given(kernels=st.lists(st.tuples(st.sampled_from([1, 3]), st.booleans()), min_size=1, max_size=6))
def test_the_census_is_what_onnx_counts(
    tmp_path_factory: pytest.TempPathFactory, kernels: list[tuple[int, bool]]
):
    """Convolutions, quantized and pointwise ones are counted as the onnx package sees them."""
    model = chain(kernels)
    path = tmp_path_factory.mktemp("census") / "model.onnx"
    onnx.save(model, path)

    census = read_census(path)

    assert census == GraphCensus(
        convolutions=sum(node.op_type == "Conv" for node in model.graph.node),
        quantized=sum(quantized for _, quantized in kernels),
        pointwise=sum(size == 1 for size, _ in kernels),
    )
    if not any(quantized for _, quantized in kernels):
        assert pointwise_convolutions(model) == census.pointwise


def test_unpacked_dimensions_are_read(tmp_path: Path):
    """Writers may store the dims of a tensor one by one; onnx itself does."""
    model = chain([(1, False)])
    assert b"\x08\x03\x08\x03\x08\x01\x08\x01" in model.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert 1 == read_census(path).pointwise


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x3a\xff\x01abc", b"\xff" * 12])
def test_what_is_no_graph_is_refused_by_name(tmp_path: Path, content: bytes):
    """The sentence names the file."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx cannot be read as ONNX: "):
        read_census(path)


def test_a_cut_file_is_refused(tmp_path: Path):
    """Half a graph is not counted."""
    data = chain([(3, False)] * 3).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="it is cut off"):
        read_census(path)
