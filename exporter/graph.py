"""Questions about an ONNX graph that several stages ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

QUANTIZED_OPS = ("Conv", "Gemm")
"""The operators that have INT8 kernels."""


def boundary_tensors(model: onnx.ModelProto) -> tuple[str, ...]:
    """What an INT8 kernel reads: the first input of every Conv and Gemm, in order, each once."""
    names = (node.input[0] for node in model.graph.node if node.op_type in QUANTIZED_OPS)
    return tuple(dict.fromkeys(names))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes that ``node`` carries, by name; defaults are not filled in."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of ``model`` whose only outputs are the tensors ``names``."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return exposed
