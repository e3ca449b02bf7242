"""Shapes and bytes of everything in an ONNX graph, at a fixed batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphTensor:
    """An input of the graph, or what a node computes; ``shape`` has the batch in front."""

    shape: tuple[int, ...]
    item_bytes: int

    @property
    def bytes(self) -> int:
        """The whole tensor's."""
        return math.prod(self.shape) * self.item_bytes


def graph_tensors(model: onnx.ModelProto, batch: int) -> dict[str, GraphTensor]:
    """By name; the first axis of every input is the batch.

    Raises:
        ValueError: naming a tensor whose shape or type ONNX does not infer.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    graph = onnx.shape_inference.infer_shapes(fixed).graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        if all(shape) and kind.elem_type:
            item = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
            found[value.name] = GraphTensor(shape=shape, item_bytes=item)
    for node in graph.node:
        if missing := [name for name in node.output if name and name not in found]:
            raise ValueError(f"ONNX does not infer the shape of {missing[0]}, from {node.name}")
    return found
