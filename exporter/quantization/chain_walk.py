"""Which nodes of a graph are the stages of a chain, its gates and its classifier: structure only.

A graph is a chain if one walk from its input to its output passes nothing but

    stages       Conv [Relu],   Conv gate [Relu]   or   Conv Relu gate
    gate(z)      Mul(z, Sigmoid(Conv1x1(Relu(Conv1x1(pool(z))))))
    head         pool (Flatten, Reshape, Squeeze)* Gemm   or   MatMul [Add]
    pool         GlobalAveragePool, ReduceMean over both sides, AveragePool as large as its input

where every tensor has no reader but the next node (of z: the pooling and the Mul) and every weight
is a constant that one node reads. Then each per-channel rescaling is exact. Anything else is no
chain: a second reader or weights shared by two layers would have to follow the rescaling, and Clip,
Sigmoid or HardSwish do not commute with it.

Behind the pooling a Reshape needs no look at its target: a Gemm reads a matrix, and the matrix with
C columns that has the elements of ``[N, C, 1, 1]`` in their order is ``[N, C]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from exporter.graph import attributes

_FLOAT = onnx.TensorProto.FLOAT
_Size = tuple[int, int] | None
"""Rows and columns of a tensor, None where the graph leaves them open."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateNodes:
    """The two convolutions of a squeeze-and-excitation block, and its place."""

    down: onnx.NodeProto
    up: onnx.NodeProto
    after_relu: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageNodes:
    """A convolution and what follows it; ``output`` is the tensor that the next node reads."""

    conv: onnx.NodeProto
    gate: GateNodes | None
    relu: bool
    output: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChainNodes:
    """``classifier`` is a Gemm or MatMul; ``add`` is the Add behind a MatMul."""

    stages: tuple[StageNodes, ...]
    classifier: onnx.NodeProto
    add: onnx.NodeProto | None


def walk(model: onnx.ModelProto) -> ChainNodes | None:
    """The nodes of ``model`` (not copies of them) as a chain, or None where it is none."""
    graph = _Graph(model)
    inputs = [value for value in model.graph.input if value.name not in graph.constants]
    if len(inputs) != 1 or len(model.graph.output) != 1 or not graph.has_unique_names:
        return None
    tensor, size = inputs[0].name, _image_size(inputs[0])
    stages: list[StageNodes] = []
    while (conv := graph.next(tensor, "Conv")) is not None:
        size = graph.convolved(conv, size)
        stage = _stage(graph, conv, size)
        if stage is None:
            return None
        stages.append(stage)
        tensor = stage.output
    head = _head(graph, tensor, size)
    if head is None or not stages or head[1] != model.graph.output[0].name:
        return None
    return replace(head[0], stages=tuple(stages))


class _Graph:
    """Readers and constants of a graph by tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        nodes = model.graph.node
        self.constants = {t.name for t in model.graph.initializer}
        self._shapes = {
            t.name: tuple(t.dims) for t in model.graph.initializer if t.data_type == _FLOAT
        }
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            # Shape reads a tensor's size, which no rescaling changes.
            for name in dict.fromkeys(node.input) if node.op_type != "Shape" else ():
                self._readers.setdefault(name, []).append(node)
        names = [node.name for node in nodes]
        self.has_unique_names = len(set(names)) == len(names)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return self._readers.get(tensor, [])

    def next(self, tensor: str, *ops: str) -> onnx.NodeProto | None:
        """The only reader of ``tensor`` if it is one of ``ops`` and has it as its first input."""
        readers = self.readers(tensor)
        fits = len(readers) == 1 and readers[0].op_type in ops and readers[0].input[0] == tensor
        return readers[0] if fits else None

    def shape(self, node: onnx.NodeProto, place: int) -> tuple[int, ...] | None:
        """The shape of an operand that is a float constant of ``node`` alone."""
        name = node.input[place]
        return self._shapes.get(name) if len(self.readers(name)) == 1 else None

    def has_bias(self, node: onnx.NodeProto, size: int) -> bool:
        """Whether the third operand is ``size`` constants, or absent."""
        return len(node.input) < 3 or self.shape(node, 2) == (size,)

    def is_convolution(self, conv: onnx.NodeProto) -> bool:
        """Whether ``conv`` is two-dimensional with weights and paddings that the graph states."""
        shape = self.shape(conv, 1)
        padding = attributes(conv).get("auto_pad", b"NOTSET")
        if shape is None or len(shape) != 4 or padding != b"NOTSET":
            return False
        return self.has_bias(conv, shape[0])

    def is_pointwise(self, conv: onnx.NodeProto) -> bool:
        """Whether ``conv`` is a matrix on the channels of a ``[N, C, 1, 1]`` tensor."""
        found = attributes(conv)
        plain = found.get("group", 1) == 1 and not any(found.get("pads", ()))
        return plain and self.is_convolution(conv) and (self.shape(conv, 1) or ())[2:] == (1, 1)

    def convolved(self, conv: onnx.NodeProto, size: _Size) -> _Size:
        """The size of ``conv``'s result for an input of ``size``."""
        kernel = (self.shape(conv, 1) or ())[2:]
        if size is None or len(kernel) != 2:
            return None
        found = attributes(conv)
        top, left, bottom, right = found.get("pads", (0, 0, 0, 0))
        rows, columns = (
            (side + margin - gap * (taps - 1) - 1) // step + 1
            for side, margin, gap, taps, step in zip(
                size,
                (top + bottom, left + right),
                found.get("dilations", (1, 1)),
                kernel,
                found.get("strides", (1, 1)),
                strict=True,
            )
        )
        return rows, columns


def _image_size(value: onnx.ValueInfoProto) -> _Size:
    sides = [dim.dim_value for dim in value.type.tensor_type.shape.dim][2:]
    return (sides[0], sides[1]) if len(sides) == 2 and all(sides) else None


def _stage(graph: _Graph, conv: onnx.NodeProto, size: _Size) -> StageNodes | None:
    if not graph.is_convolution(conv):
        return None
    tensor, relu = conv.output[0], False
    found = _gate(graph, tensor, size, after_relu=False)
    if found is not None:
        tensor = found[1]
    if (node := graph.next(tensor, "Relu")) is not None:
        tensor, relu = node.output[0], True
        if found is None and (found := _gate(graph, tensor, size, after_relu=True)) is not None:
            tensor = found[1]
    gate = found[0] if found is not None else None
    return StageNodes(conv=conv, gate=gate, relu=relu, output=tensor)


def _gate(
    graph: _Graph, tensor: str, size: _Size, *, after_relu: bool
) -> tuple[GateNodes, str] | None:
    """The gate that reads ``tensor``, and its result."""
    readers = {node.op_type: node for node in graph.readers(tensor)}
    product = readers.pop("Mul", None)
    if product is None or len(graph.readers(tensor)) != 2 or len(readers) != 1:
        return None
    (pool,) = readers.values()
    if not _is_pool(pool, size, keepdims=1):
        return None
    passed = [pool]
    for op in ("Conv", "Relu", "Conv", "Sigmoid", "Mul"):
        readers_behind = graph.readers(passed[-1].output[0])
        if [node.op_type for node in readers_behind] != [op]:
            return None
        passed += readers_behind
    _, down, _, up, sigmoid, last = passed
    if last is not product or {*last.input} != {tensor, sigmoid.output[0]}:
        return None
    if not (graph.is_pointwise(down) and graph.is_pointwise(up)):
        return None
    return GateNodes(down=down, up=up, after_relu=after_relu), last.output[0]


def _is_pool(node: onnx.NodeProto, size: _Size, *, keepdims: int) -> bool:
    """Whether ``node`` averages over all positions of a tensor of ``size``."""
    found = attributes(node)
    if node.op_type == "GlobalAveragePool":
        return keepdims == 1
    if node.op_type == "ReduceMean":
        axes = sorted(axis % 4 for axis in found.get("axes", ()))
        return axes == [2, 3] and found.get("keepdims", 1) == keepdims
    if node.op_type != "AveragePool" or any(found.get("pads", ())) or keepdims != 1:
        return False
    automatic = found.get("auto_pad", b"NOTSET") != b"NOTSET"
    return not automatic and size is not None and tuple(found["kernel_shape"]) == size


def _head(graph: _Graph, tensor: str, size: _Size) -> tuple[ChainNodes, str] | None:
    """The classifier behind the average of ``tensor``, as a chain without stages; the logits."""
    features, is_matrix = _features(graph, tensor, size)
    node = graph.next(features, "Gemm", "MatMul")
    if node is None or (node.op_type == "MatMul" and not is_matrix):
        return None
    classes = _classes(graph, node)
    logits = node.output[0]
    readers = graph.readers(logits)
    add = readers[0] if node.op_type == "MatMul" and len(readers) == 1 else None
    if add is not None:
        bias = [place for place, name in enumerate(add.input) if name != logits]
        if add.op_type != "Add" or [graph.shape(add, place) for place in bias] != [(classes,)]:
            return None
        logits = add.output[0]
    return (ChainNodes(stages=(), classifier=node, add=add), logits) if classes else None


def _features(graph: _Graph, tensor: str, size: _Size) -> tuple[str, bool]:
    """The flat average of ``tensor``, and whether it is a matrix whoever reads it; "" if none is.

    A MatMul reads tensors of any rank, and of the three operators only Flatten makes a matrix.
    """
    pool = graph.next(tensor, "GlobalAveragePool", "ReduceMean", "AveragePool")
    if pool is not None and _is_pool(pool, size, keepdims=0):
        return pool.output[0], True
    if pool is None or not _is_pool(pool, size, keepdims=1):
        return "", False
    flat, is_matrix = pool.output[0], False
    while (node := graph.next(flat, "Flatten", "Reshape", "Squeeze")) is not None:
        flat, is_matrix = node.output[0], node.op_type == "Flatten"
    return flat, is_matrix


def _classes(graph: _Graph, node: onnx.NodeProto) -> int:
    """How many outputs the Gemm or MatMul has; 0 if it is not ``V x`` or ``V x + v``."""
    found = attributes(node)
    shape = graph.shape(node, 1)
    if shape is None or len(shape) != 2 or found.get("transA", 0):
        return 0
    if (found.get("alpha", 1.0), found.get("beta", 1.0)) != (1.0, 1.0):
        return 0
    classes = shape[0] if found.get("transB", 0) else shape[1]
    return classes if graph.has_bias(node, classes) else 0
