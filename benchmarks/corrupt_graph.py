"""ONNX graphs made wrong: shapes, types, operators, wiring, attributes, files outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

import numpy as np
import onnx
from corruption import Corruption
from onnx import TensorProto, helper

_EXTENTS = (-1, 0, 1, 3, 2**20, 2**31, 2**40, 2**60, 2**63 - 1)
_OPERATORS = (
    "Relu", "Add", "Identity", "Loop", "Nothing", "", "Softmax", "Conv", "Reshape", "Cast",
    "QuantizeLinear", "DequantizeLinear", "\n\n\n\n",
)  # fmt: skip
_TYPES = (0, 1, 2, 3, 7, 8, 9, 10, 11, 16, 17, 23, 99)
_PLACES = (
    "/etc/passwd", "../../../etc/passwd", "missing.bin", "", "\n\n\n", "/dev/zero",
)  # fmt: skip
_NUMBERS = (-(2**63), -1, 0, 1, 7, 2**31, 2**62)

Change = Callable[[onnx.ModelProto, Random], None]


def graph_changed(data: bytes, random: Random) -> bytes:
    """One to three of the changes below; what is left is still a ModelProto."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice(_CHANGES)(model, random)
    return bytes(model.SerializeToString())


def _a_tensor(model: onnx.ModelProto, random: Random) -> TensorProto:
    return random.choice(list(model.graph.initializer) or [model.graph.initializer.add()])


def _a_node(model: onnx.ModelProto, random: Random) -> onnx.NodeProto:
    return random.choice(list(model.graph.node) or [model.graph.node.add()])


def _extents(model: onnx.ModelProto, random: Random) -> None:
    tensor = _a_tensor(model, random)
    if tensor.dims and random.random() < 0.7:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(_EXTENTS)
    else:
        del tensor.dims[:]
        tensor.dims.extend(random.choice(((), (2**60,), (1,) * 3000, (2**31, 2**31))))


def _tensor_type(model: onnx.ModelProto, random: Random) -> None:
    _a_tensor(model, random).data_type = random.choice(_TYPES)


def _tensor_bytes(model: onnx.ModelProto, random: Random) -> None:
    tensor = _a_tensor(model, random)
    raw = tensor.raw_data
    tensor.raw_data = random.choice(
        (b"", raw[:-1], raw[: len(raw) // 2], raw + b"xxxx", bytes(len(raw)), b"\xff" * len(raw))
    )


def _number(model: onnx.ModelProto, random: Random) -> None:
    """NaN, an infinity, zero or a negative number where a weight or a scale was."""
    tensor = _a_tensor(model, random)
    if tensor.data_type == TensorProto.FLOAT and len(tensor.raw_data) >= 4:
        value = random.choice((np.nan, np.inf, 0.0, -1.0, 1e-40, 3e38))
        tensor.raw_data = np.float32(value).tobytes() + tensor.raw_data[4:]


def _outside(model: onnx.ModelProto, random: Random) -> None:
    """Data that is said to lie in another file."""
    tensor = _a_tensor(model, random)
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    length = random.choice(("-1", "4", "x", str(2**60)))
    for key, value in (("location", random.choice(_PLACES)), ("length", length)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _operator(model: onnx.ModelProto, random: Random) -> None:
    node = _a_node(model, random)
    if random.random() < 0.8:
        node.op_type = random.choice(_OPERATORS)
    else:
        node.domain = random.choice(("com.microsoft", "nobody", "\n\n\n\n"))


def _wiring(model: onnx.ModelProto, random: Random) -> None:
    node = _a_node(model, random)
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    ends = node.input if random.random() < 0.6 else node.output
    how = random.randrange(4)
    if how == 0 and ends:
        ends[random.randrange(len(ends))] = random.choice([*names, "", "nowhere", "\ud7ff\n\n\n\n"])
    elif how == 1 and ends:
        del ends[random.randrange(len(ends)) :]
    elif how == 2:
        ends.append(random.choice([*names, ""]))
    else:
        model.graph.node.append(node)


def _left_out(model: onnx.ModelProto, random: Random) -> None:
    graph = model.graph
    part = random.choice((graph.node, graph.initializer, graph.input, graph.output))
    if part:
        del part[random.randrange(len(part))]


def _attribute(model: onnx.ModelProto, random: Random) -> None:
    found = [a for node in model.graph.node for a in node.attribute]
    if not found:
        return
    attribute = random.choice(found)
    if attribute.ints and random.random() < 0.7:
        attribute.ints[random.randrange(len(attribute.ints))] = random.choice(_NUMBERS)
    else:
        name = attribute.name
        value = random.choice((*_NUMBERS, 1.5, float("nan"), "text", [1, 2], [], None))
        attribute.CopyFrom(helper.make_attribute(name, 0 if value in ([], None) else value))


def _port(model: onnx.ModelProto, random: Random) -> None:
    """Type, rank or extent of an input or output."""
    ports = [*model.graph.input, *model.graph.output]
    if not ports:
        return
    tensor = random.choice(ports).type.tensor_type
    how = random.randrange(3)
    if how == 0:
        tensor.elem_type = random.choice((0, 2, 7, 8, 10, 11, 99))
    elif how == 1 and tensor.shape.dim:
        random.choice(list(tensor.shape.dim)).dim_value = random.choice(_EXTENTS)
    else:
        tensor.shape.dim.add().dim_param = random.choice(("", "N", "\n\n\n\n", "x" * 5000))


def _versions(model: onnx.ModelProto, random: Random) -> None:
    if random.random() < 0.5 or not model.opset_import:
        model.ir_version = random.choice((-1, 0, 1, 3, 99, 2**62))
    else:
        model.opset_import[0].version = random.choice((-1, 0, 1, 7, 99, 2**62))


def _large_constant(model: onnx.ModelProto, random: Random) -> None:
    """A node that makes a tensor out of a few bytes: of 4 MB, or more than there is.

    What lies between is a network that computes as it says, and takes what it takes.
    """
    shape = random.choice(((2**20,), (2**40,), (2**62,), (1, 3, 2**20, 2**20)))
    model.graph.initializer.append(helper.make_tensor("large_shape", 7, [len(shape)], shape))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["large_shape"], ["large"]))
    first = model.graph.node[0]
    model.graph.node.append(helper.make_node("Add", ["large", first.output[0]], ["larger"]))
    model.graph.output.append(helper.make_tensor_value_info("larger", 1, None))


def _text(model: onnx.ModelProto, random: Random) -> None:
    """Names with line ends, colours and great length."""
    words = random.choice(("a\nb\nc\nd\ne", "\x1b[31m[red]", "x" * 100_000, "", "/"))
    place = random.choice((model.graph.node, model.graph.initializer, model.graph.output))
    if place:
        random.choice(list(place)).name = words
    model.producer_name = words


_CHANGES: tuple[Change, ...] = (
    _extents, _tensor_type, _tensor_bytes, _number, _outside, _operator, _wiring, _left_out,
    _attribute, _port, _versions, _large_constant, _text,
)  # fmt: skip


def nested(data: bytes, random: Random) -> bytes:
    """Graphs in attributes of nodes in graphs, as far as protobuf reads them and further."""
    graph = b""
    for _ in range(random.choice((3, 30, 33, 34, 1000))):
        attribute = _field(1, b"then_branch") + _field(6, graph) + b"\xa0\x01\x05"
        graph = _field(1, _field(4, b"If") + _field(1, b"c") + _field(5, attribute))
    # A part that is there twice is one, put together.
    return data + _field(7, graph)


def _field(number: int, content: bytes) -> bytes:
    """A field of protobuf that has a length."""
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes((size & 127 | 128,)), size >> 7
    return bytes((number << 3 | 2,)) + length + bytes((size,)) + content


GRAPH: Mapping[str, Corruption] = {"graph changed": graph_changed, "graphs nested": nested}
