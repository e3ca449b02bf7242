"""How large the files of a bundle will be, from the numbers of the network alone.

Let k be the weights of the 3x3 kernels, c their output channels and r all other parameters (biases,
gates, classifier). The graphs hold

    float32   4 (k + r)                                                                          (1)
    half      2 (k + r)                                                                          (2)
    int8      k + 5 c + 4 r          a float32 scale and an int8 zero point a channel            (3)
    in half   k + 3 c + 2 r          the same with half scales                                   (4)

and about 300 bytes a node. An engine holds the weights of its graph and the code of its kernels.
Measured on TensorRT-RTX 1.7 (A0 and B1g4, one to six targets, docs/engines.md): 0.5 MB of code at
fp32, fp16 and bf16; 3.2 and 4.1 MB at int8 and fp8, where each convolution has a kernel of its own
after it, and 4.3 MB (A0) where INT8 is computed in half (sm75), with two. Engines of full TensorRT
are not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from models.variants import Variant

_NODE_BYTES = 300
_CODE_BYTES = 500_000
_INT8_CODE_BYTES = 125_000
_EMULATED_CODE_BYTES = 170_000
ONE_BYTE = ("int8", "fp8")
TWO_BYTES = ("fp16", "bf16")
"""Precisions by the size of a weight; those of one byte need scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCount:
    """The numbers k, c and r of a network, and how many 3x3 convolutions it has."""

    kernels: int
    channels: int
    others: int
    convolutions: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.kernels + self.others


def count_weights(variant: Variant, num_classes: int) -> WeightCount:
    """The numbers of a published variant in deploy form."""
    kernels = sum(prod(layer.weight_shape) for layer in variant.layers)
    return WeightCount(
        kernels=kernels,
        channels=sum(layer.out_channels for layer in variant.layers),
        others=variant.deploy_parameters(num_classes) - kernels,
        convolutions=len(variant.layers),
    )


def graph_bytes(count: WeightCount, precision: str, *, half_scales: bool = False) -> int:
    """Size of the ONNX whose convolutions are in ``precision``, by (1) to (4)."""
    if precision in ONE_BYTE:
        width = 2 if half_scales else 4
        weights = count.kernels + (width + 1) * count.channels + width * count.others
        return weights + _NODE_BYTES * 5 * count.convolutions
    width = 2 if precision in TWO_BYTES else 4
    return width * count.parameters + _NODE_BYTES * count.convolutions


def engine_bytes(
    graph: int, precision: str, convolutions: int, *, half_scales: bool = False
) -> int:
    """Size of an engine built from a graph of ``graph`` bytes: an estimate, see above."""
    each = _EMULATED_CODE_BYTES if half_scales else _INT8_CODE_BYTES
    code = each * convolutions if precision in ONE_BYTE else 0
    return graph + _CODE_BYTES + code
