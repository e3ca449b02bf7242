"""How many convolutions a graph holds, read from the ONNX file without the onnx package.

An ONNX file is a protobuf message. A field starts with the number ``(field << 3) | type``; type 0
is a number (7 bits a byte, the top bit says that more follow), 2 is a length and so many bytes, 1
and 5 are 8 and 4 bytes. The fields read here, from onnx.proto::

    ModelProto  7 graph                       NodeProto    1 input   2 output   4 op_type
    GraphProto  1 node   5 initializer        TensorProto  1 dims    8 name

Everything else is skipped by its length, so weights are not copied.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError

_GRAPH = 7
_NODE, _INITIALIZER = 1, 5
_INPUT, _OUTPUT, _OP_TYPE = 1, 2, 4
_DIMS, _NAME = 1, 8

Bytes = memoryview
Field = tuple[int, int | Bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphCensus:
    """Convolutions of one graph.

    ``quantized`` read what a DequantizeLinear delivers, ``pointwise`` have a constant 1x1 kernel.
    """

    convolutions: int
    quantized: int
    pointwise: int


def read_census(path: Path) -> GraphCensus:
    """Count the convolutions of the graph in the file ``path``.

    Raises:
        InputError: if it is no ONNX file, or cut off.
    """
    try:
        with path.open("rb") as file:
            # Not closed by hand: the pieces that an error's traceback holds would forbid it.
            return _count(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as ONNX: {error}") from error


def _count(data: Bytes) -> GraphCensus:
    nodes: list[tuple[str, list[str], list[str]]] = []
    kernels: dict[str, list[int]] = {}
    for number, graph in _fields(data):
        if number != _GRAPH or isinstance(graph, int):
            continue
        for kind, part in _fields(graph):
            if isinstance(part, int):
                continue
            if kind == _NODE:
                nodes.append(_node(part))
            elif kind == _INITIALIZER:
                name, dims = _tensor(part)
                kernels[name] = dims
    if not nodes:
        raise ValueError("it holds no graph")
    makers = {name: (op, inputs) for op, inputs, outputs in nodes for name in outputs}

    def dequantized_from(tensor: str) -> str | None:
        op, inputs = makers.get(tensor, ("", []))
        return inputs[0] if op == "DequantizeLinear" else None

    convolutions = [inputs for op, inputs, _ in nodes if op == "Conv"]
    weights = [dequantized_from(inputs[1]) or inputs[1] for inputs in convolutions]
    return GraphCensus(
        convolutions=len(convolutions),
        quantized=sum(dequantized_from(inputs[0]) is not None for inputs in convolutions),
        pointwise=sum(kernels.get(name, [])[2:] == [1, 1] for name in weights),
    )


def _node(data: Bytes) -> tuple[str, list[str], list[str]]:
    op, inputs, outputs = "", [], []
    for number, value in _fields(data):
        if isinstance(value, int):
            continue
        if number == _INPUT:
            inputs.append(_text(value))
        elif number == _OUTPUT:
            outputs.append(_text(value))
        elif number == _OP_TYPE:
            op = _text(value)
    return op, inputs, outputs


def _tensor(data: Bytes) -> tuple[str, list[int]]:
    name, dims = "", []
    for number, value in _fields(data):
        if number == _DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == _NAME and not isinstance(value, int):
            name = _text(value)
    return name, dims


def _text(value: Bytes) -> str:
    return bytes(value).decode("utf-8")


def _packed(data: Bytes) -> list[int]:
    numbers, at = [], 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return numbers


def _fields(data: Bytes) -> Iterator[Field]:
    """Number and value of each field: an integer, or the bytes of whatever has a length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {at} is no protobuf field")
        if at + length > len(data):
            raise ValueError("it is cut off")
        if kind == 2:
            yield key >> 3, data[at : at + length]
        at += length


def _varint(data: Bytes, at: int) -> tuple[int, int]:
    """The number that starts at byte ``at``, and where it ends."""
    number = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("it is cut off")
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return number, at
        shift += 7
        if shift > 63:
            raise ValueError(f"byte {at} is no protobuf number")
