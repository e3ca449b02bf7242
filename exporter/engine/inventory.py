"""From the layer table of a plan to the figures of ``engine.json``.

**One layer table holds for every target of a plan.** The builder optimizes the network once, for
what all targets of the plan can do, and then generates code for each: a plan for sm75 and sm86
together has the table of sm75, and the kernels that sm86 alone would get are not in it.

Pure functions of the values that `build_log` and `inspector` read.
"""

from __future__ import annotations

import re

from exporter.engine.build_log import Layer, OnnxNode
from exporter.engine.summary import ConvolutionCounts, TargetFigures

_CONVOLUTION_KERNELS = frozenset({"correlation", "runtime_fusion"})
"""Layer types that run a convolution; grouped ones are a ``runtime_fusion``."""

_FUSION = "fusion"
_MULTIPLYING = re.compile(r"xmma|fprop|conv|gemm", re.IGNORECASE)
"""A fusion of full TensorRT is elementwise unless its kernel multiplies."""

_FIGURES = {"Int8": "int8", "Half": "half", "BFloat16": "bf16", "FP8": "fp8"}
"""Where a data type is counted; float is what is left."""

_NOT_KERNELS = frozenset({"signal", "wait", "shape_call", "NoOp", "Constant", "DLA"})
"""Layer types that synchronize streams, compute shapes on the host, or run on no GPU at all."""


def convolution_layers(layers: tuple[Layer, ...], nodes: tuple[OnnxNode, ...]) -> tuple[Layer, ...]:
    """The kernels that run the network's convolutions.

    A layer is one if its type runs convolutions and an ONNX Conv is among its origins: the
    classifier may be a ``runtime_fusion`` too, and a cast before a convolution carries its name.
    """
    names = {node.name for node in nodes if node.op == "Conv"}
    return tuple(layer for layer in layers if _multiplies(layer) and layer.onnx_names & names)


def _multiplies(layer: Layer) -> bool:
    """Whether the layer's type runs convolutions, in TensorRT-RTX or in full TensorRT."""
    if layer.type == _FUSION:
        return _MULTIPLYING.search(layer.tactic) is not None
    return layer.type in _CONVOLUTION_KERNELS or layer.type.endswith("Convolution")


def _datatype(layer: Layer) -> str:
    """The type a convolution multiplies in, ``mixed`` if activation and weights differ.

    The activation is the first input. The weights are the largest other operand: an input where
    they are computed at run time, else a constant, in an order that depends on the layer type. An
    activation whose type is not told is taken to be of the weights' type: kernels of full TensorRT
    multiply equal types only.
    """
    rest = (*layer.inputs[1:], *layer.constants)
    if not layer.inputs or not rest:
        return "mixed"
    activation = layer.inputs[0].datatype
    weights = max(rest, key=lambda tensor: tensor.elements).datatype
    return weights if weights and activation in (weights, "") else "mixed"


def _is_fused(convolution: Layer, layers: tuple[Layer, ...], nodes: tuple[OnnxNode, ...]) -> bool:
    """Whether the kernel does its whole epilogue: bias, ReLU and, if asked for, requantizing.

    1. A ReLU that reads the ONNX convolution's output is among the kernel's origins, and
    2. no kernel that reads the result stems from that convolution, its ReLU or a QuantizeLinear.
    """
    convs = [n for n in nodes if n.op == "Conv" and n.name in convolution.onnx_names]
    results = {tensor for node in convs for tensor in node.outputs}
    relus = {n.name for n in nodes if n.op == "Relu" and results & set(n.inputs)}
    if not relus & convolution.onnx_names:
        return False
    leftover = relus | {n.name for n in convs} | {n.name for n in nodes if n.op == "QuantizeLinear"}
    outputs = {tensor.name for tensor in convolution.outputs}
    readers = (
        layer
        for layer in layers
        if not _multiplies(layer) and outputs & {t.name for t in layer.inputs}
    )
    return not any(leftover & reader.onnx_names for reader in readers)


def figures(layers: tuple[Layer, ...], nodes: tuple[OnnxNode, ...]) -> TargetFigures:
    """Count the layer table of one plan.

    A convolution counts as INT8 (half, ...) only if activation and weights are both Int8 (Half)
    where its kernel reads them: fake quantization around a float kernel counts as float.
    """
    convolutions = convolution_layers(layers, nodes)
    types = [_datatype(layer) for layer in convolutions]
    known = {figure: types.count(name) for name, figure in _FIGURES.items()}
    return TargetFigures(
        convolutions=ConvolutionCounts(
            total=len(types), float=len(types) - sum(known.values()), **known
        ),
        epilogue_fused=sum(_is_fused(layer, layers, nodes) for layer in convolutions),
        other_kernels=sum(layer.type not in _NOT_KERNELS for layer in layers) - len(convolutions),
    )


def _quantized(nodes: tuple[OnnxNode, ...]) -> int:
    """How many convolutions of the network read a dequantized activation."""
    real = {t for node in nodes if node.op == "DequantizeLinear" for t in node.outputs}
    return sum(node.op == "Conv" and node.inputs[0] in real for node in nodes if node.inputs)


def findings(layers: tuple[Layer, ...], nodes: tuple[OnnxNode, ...]) -> tuple[str, ...]:
    """Sentences for people about what the table shows beyond its counts."""
    if not layers:
        return ("the builder gives no layer table: what the engine contains is unknown",)
    found = []
    counted = figures(layers, nodes)
    counts = counted.convolutions
    onnx_convolutions = sum(node.op == "Conv" for node in nodes)
    if counts.total != onnx_convolutions:
        found.append(
            f"the network has {onnx_convolutions} convolutions, the engine {counts.total} "
            "convolution kernels"
        )
    types = {_datatype(layer) for layer in convolution_layers(layers, nodes)}
    odd = sorted(types - {*_FIGURES, "Float"})
    if odd:
        found.append(f"convolutions in {', '.join(odd)} are counted as float")
    emulated = _quantized(nodes) - counts.int8
    if emulated > 0:
        found.append(
            f"{emulated} of {_quantized(nodes)} quantized convolutions do not run in INT8, so INT8 "
            "saves no time in them: measure on the device whether fp16 is faster"
        )
    separate = counts.total - counted.epilogue_fused
    if (counts.int8 or counts.fp8) and separate:
        found.append(
            f"{separate} of {counts.total} convolutions leave bias, ReLU or requantization to a "
            f"separate kernel: measure on the device whether {'INT8' if counts.int8 else 'FP8'} is "
            "faster than fp16"
        )
    return tuple(found)
