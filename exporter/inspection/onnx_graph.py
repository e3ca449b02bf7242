"""Describe an ONNX graph: operators, the variant its weights fit, contract, prologue, Q/DQ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from exporter.bundle import file_sha256
from exporter.contract import judge
from exporter.errors import InputError
from exporter.graph import attributes
from exporter.graph.prologue import read_prologue, without_prologue
from exporter.inspection.finding import OWN_FORMAT, Inspection, Kind
from models.variants import VARIANTS, Variant

_FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.BFLOAT16,
}
Tensors = Mapping[str, onnx.TensorProto]
Makers = Mapping[str, onnx.NodeProto]


def inspect_onnx(path: Path) -> Inspection:
    """Read a graph and hold it against the variants.

    Raises:
        InputError: if it is no ONNX model, or a damaged one, or its external data is missing.
    """
    model = _load(path)
    try:
        return _described(path, model)
    except Exception as error:
        # Nodes without inputs, names that are no text, attributes of another type: onnx loads all
        # that, and whoever reads it stumbles in a way of its own.
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} is a damaged ONNX model ({reason})") from error


def _described(path: Path, model: onnx.ModelProto) -> Inspection:
    tensors = _constants(model)
    makers = {output: node for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    names = [name for node in layers for name in _parameters(node, makers, tensors)]
    weights = {name: tensors[name] for name in names}
    variant = _variant(weights)
    num_classes = _num_classes(model, makers, tensors, variant)
    quantization = _quantization(model, tensors)
    prologue = read_prologue(model)
    plain = without_prologue(model)
    verdict, violations = _verdict(plain, variant, num_classes, quantization)
    flat = quantization["flat_activation_scales"]
    notes = (
        f"activation scales of shape [1], which silently cost INT8 in TensorRT-RTX: "
        f"{', '.join(flat[:3])}{f' and {len(flat) - 3} more' if len(flat) > 3 else ''}; "
        "make them scalars",
    )
    return Inspection(
        path=path,
        kind=Kind.ONNX,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        format=OWN_FORMAT if "stage0.bias" in tensors else "unknown",
        form="deploy" if variant else None,
        variant=variant.name if variant else None,
        num_classes=num_classes,
        parameters=sum(math.prod(tensor.dims) for tensor in weights.values()),
        nan_count=sum(_nan_count(tensor) for tensor in tensors.values()),
        details={
            "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
            "producer": f"{model.producer_name} {model.producer_version}".strip(),
            "inputs": _shapes(model.graph.input),
            "outputs": _shapes(model.graph.output),
            "nodes": dict(Counter(node.op_type for node in model.graph.node).most_common()),
            "contract": verdict,
            "violations": violations,
            "prologue": prologue.to_json() if prologue else None,
            "quantization": quantization,
        },
        notes=notes if flat else (),
    )


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except Exception as error:
        # protobuf raises its own errors, external data OSError or onnx's: all mean one thing.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged, truncated or not an ONNX model ({reason})") from error
    if not model.graph.node:
        raise InputError(f"{path} is not an ONNX model, or one without nodes")
    return model


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers and the outputs of Constant nodes, by name."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        value = attributes(node).get("value") if node.op_type == "Constant" else None
        if isinstance(value, onnx.TensorProto):
            found[node.output[0]] = value
    return found


def _parameters(node: onnx.NodeProto, makers: Makers, tensors: Tensors) -> list[str]:
    """What a Conv or Gemm multiplies with and adds, behind a DequantizeLinear or a Cast too."""
    names = []
    for given in node.input[1:3]:
        name = given
        seen = {name}
        while name in makers and makers[name].op_type in ("DequantizeLinear", "Cast"):
            name = makers[name].input[0]
            if name in seen:
                raise ValueError(f"{name} is computed from itself")
            seen.add(name)
        names += [name] if name in tensors else []
    return names


def _variant(weights: Tensors) -> Variant | None:
    """The variant with exactly these kernels, in this order."""
    kernels = [tuple(tensor.dims) for tensor in weights.values() if len(tensor.dims) == 4]
    for variant in VARIANTS.values():
        expected: list[tuple[int, ...]] = []
        for layer in variant.layers:
            squeezed = layer.squeeze_channels
            expected.append(layer.weight_shape)
            if squeezed:
                expected += [(squeezed, layer.out_channels, 1, 1)]
                expected += [(layer.out_channels, squeezed, 1, 1)]
        if kernels == expected:
            return variant
    return None


def _num_classes(
    model: onnx.ModelProto, makers: Makers, tensors: Tensors, variant: Variant | None
) -> int | None:
    heads = [node for node in model.graph.node if node.op_type == "Gemm"]
    if variant is None or len(heads) != 1:
        return None
    dims = [list(tensors[name].dims) for name in _parameters(heads[0], makers, tensors)]
    if not dims or len(dims[0]) != 2:
        return None
    return int(dims[0][0 if attributes(heads[0]).get("transB", 0) else 1])


def _quantization(model: onnx.ModelProto, tensors: Tensors) -> dict[str, Any]:
    """Counts, and the activation scales that are not scalars."""
    nodes = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    flat = [
        node.input[1]
        for node in nodes
        if node.input[0] not in tensors
        and node.input[1] in tensors
        and list(tensors[node.input[1]].dims) == [1]
    ]
    counts = Counter(node.op_type for node in nodes)
    return {
        "quantize": counts["QuantizeLinear"],
        "dequantize": counts["DequantizeLinear"],
        "flat_activation_scales": list(dict.fromkeys(flat)),
    }


def _verdict(
    model: onnx.ModelProto,
    variant: Variant | None,
    num_classes: int | None,
    quantization: Mapping[str, Any],
) -> tuple[str, list[str]]:
    """The graph contract, which speaks of the float graph alone, and what breaks it."""
    if variant is None or num_classes is None:
        return "not judged: the weights fit no variant", []
    if quantization["dequantize"] or any(node.op_type == "Cast" for node in model.graph.node):
        return "not judged: the contract is for the float graph", []
    verdict = judge(model, variant, num_classes)
    return ("pass" if verdict.passed else "fail"), list(verdict.violations)


def _shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values
    }


def _nan_count(tensor: onnx.TensorProto) -> int:
    if tensor.data_type not in _FLOATS:
        return 0
    return int(np.isnan(numpy_helper.to_array(tensor).astype(np.float64)).sum())
