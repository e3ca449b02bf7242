"""What each layer of a float graph costs: multiply-accumulates, Winograd multiplications, bytes.

A convolution with a kernel [O, C/g, kh, kw] and an output of h x w pixels has

    MACs = h w O (C/g) kh kw        for one image.

Winograd's F(2x2, 3x3) (Lavin and Gray, CVPR 2016) computes 4 outputs of a 3x3 convolution from 16
multiplications a channel pair instead of 36, if stride and dilation are 1. The RepVGG paper's "Wino
MULs" (section 2.4) therefore count 4/9 of the MACs of such a layer and all MACs of every other;
grouped convolutions are among them. Whether a library uses Winograd is another question: ONNX
Runtime's CPU kernels do not (microsoft/onnxruntime#12834).

The bytes of a layer are those of its input, weights and output, each moved once. MACs over bytes is
its arithmetic intensity; a layer of low intensity waits for memory, whatever its kernels do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import onnx
from graph_tensors import graph_tensors

from exporter.graph import attributes, quantizable

WINOGRAD_SAVING = Fraction(4, 9)
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A Conv or Gemm; ``input`` and ``output`` are shapes with the batch in front."""

    name: str
    kernel: tuple[int, int]
    stride: int
    dilation: int
    groups: int
    weight: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]

    @property
    def kind(self) -> str:
        """``3x3``, ``3x3 stride 2``, ``3x3 4 groups``, ``linear``."""
        if len(self.weight) == 2:
            return "linear"
        words = [f"{self.kernel[0]}x{self.kernel[1]}"]
        words += [f"stride {self.stride}"] if self.stride > 1 else []
        words += [f"{self.groups} groups"] if self.groups > 1 else []
        return " ".join(words)

    @property
    def macs(self) -> int:
        """For the whole batch."""
        return math.prod(self.output) * math.prod(self.weight[1:])

    @property
    def winograd(self) -> bool:
        """Whether F(2x2, 3x3) can compute it."""
        return self.kernel == (3, 3) and self.stride == self.dilation == 1

    @property
    def multiplications(self) -> Fraction:
        """With Winograd where it can be used."""
        return self.macs * (WINOGRAD_SAVING if self.winograd else Fraction(1))

    @property
    def bytes(self) -> int:
        """Input, weights and output in float32."""
        return _FLOAT_BYTES * sum(math.prod(s) for s in (self.input, self.weight, self.output))

    @property
    def intensity(self) -> float:
        """Multiply-accumulates a byte."""
        return self.macs / self.bytes


def layers_of(model: onnx.ModelProto, batch: int) -> tuple[Layer, ...]:
    """Every product with constant weights, in the graph's order.

    Raises:
        ValueError: if there is one that is neither a 2-D convolution nor a Gemm with transB; if
            ONNX does not infer the shape of a tensor.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    tensors = graph_tensors(model, batch)
    found = []
    for node in quantizable(model):
        weight, given = weights[node.input[1]], attributes(node)
        is_gemm = node.op_type == "Gemm" and given.get("transB", 0) == 1
        if not is_gemm and not (node.op_type == "Conv" and len(weight) == 4):
            raise ValueError(f"{node.name} is a {node.op_type} of another kind")
        found.append(
            Layer(
                name=node.name,
                kernel=(1, 1) if is_gemm else (weight[2], weight[3]),
                stride=max(given.get("strides", [1])),
                dilation=max(given.get("dilations", [1])),
                groups=given.get("group", 1),
                weight=weight,
                input=tensors[node.input[0]].shape,
                output=tensors[node.output[0]].shape,
            )
        )
    return tuple(found)
