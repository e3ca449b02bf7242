"""A bfloat16 graph computed where no such kernels exist: in float32, rounded where it rounds.

A tensor core multiplies two bfloat16 numbers exactly (8 + 8 bits of mantissa are no more than the
24 of float32), adds up in float32, and rounds what is stored. So does the graph made here::

    y = bf16(f(x, w))        f in float32, for every tensor y that the given graph holds in bfloat16

Weights become the float32 numbers that they are. A fused engine stores less than the graph does:

1. ReLU, Flatten and the like give numbers that they read, or zero; rounding before or after them is
   the same, so a convolution with its bias and ReLU in one kernel gives what is computed here.
2. The order of additions is not told; it moves a sum by 2^-24 of its terms, which now and then tips
   a rounding to the other side.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

_NARROW = TensorProto.BFLOAT16


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 graph that computes what ``model`` computes in bfloat16.

    Inputs and outputs are those of ``model``, which must be float32; so are all the names.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    narrow = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == _NARROW}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        rounds = _widen(node)
        for index, name in enumerate(node.output):
            if name not in narrow:
                continue
            stored = f"{name}.stored"
            if rounds:
                node.output[index] = stored
            else:
                node.output[index] = f"{name}.exact"
                nodes.append(_cast(f"{name}.exact", stored, _NARROW))
            nodes.append(_cast(stored, name, TensorProto.FLOAT))
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def _widen(node: onnx.NodeProto) -> bool:
    """Write float32 for bfloat16 in the attributes; a Cast stays, for it rounds: then True."""
    for attribute in node.attribute:
        if (node.op_type, attribute.name, attribute.i) == ("Cast", "to", _NARROW):
            return True
        if attribute.name == "dtype" and attribute.i == _NARROW:
            attribute.i = TensorProto.FLOAT
        _widen_tensor(attribute.t)
    return False


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == _NARROW:
        values = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.rounding", to=to)
