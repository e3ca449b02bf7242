"""A convolutional chain on paper: what equalization, rounding and sensitivity work on.

    x_0 = image,   y_l = W_l * x_l + b_l,   logits = V mean(x_L) + v,
    x_{l+1} = relu(gate(y_l))   or   gate(relu(y_l))

``*`` is a convolution with groups, stride, padding and dilation; ``relu`` and ``gate`` may be
absent. The gate is a squeeze-and-excitation block, ``gate(z) = z sigmoid(U relu(D mean(z) + d) +
u)``, and ``mean`` averages over the positions of an image. *Boundary* l is the tensor x_l that
stage l reads; boundary L is read by the classifier.

Everything after y_l commutes with a positive scale per channel. ``relu(y / s) = relu(y) / s``, so
that on both sides of the ReLU the gate reads z / s where it read z. Then ``(D s) mean(z / s) =
D mean(z)``: the gate's value stays what it was when the columns of D take the scale up, and what
it multiplies is divided by s. So for s > 0

    W_l[c] / s_c,   b_l[c] / s_c,   D[:, c] s_c,   W_{l+1}[:, c] s_c   (or V[:, c] s_c)

compute the same logits with ``x_{l+1}[c]`` divided by s_c. That needs the next stage to be the
only reader of the tensor and no other nonlinearity in between, which the caller, who knows the
graph, states in ``scalable``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]


class ChainError(ValueError):
    """The stages do not form a chain, or a request does not fit them; the message names which."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gate:
    """A squeeze-and-excitation block: ``down`` ``[R, C]``, ``up`` ``[C, R]`` and their biases.

    It reads the convolution's result, or that of the ReLU behind it if ``after_relu``.
    """

    down: Array
    down_bias: Array
    up: Array
    up_bias: Array
    after_relu: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConvStage:
    """One convolution and what follows it up to the next.

    ``weight`` is ``[O, I / groups, kh, kw]``, ``padding`` is (top, left, bottom, right).
    ``scalable`` says that the stage's output may be rescaled per channel: its only reader is the
    next stage, and nothing but ``gate`` and ``relu`` lies between.
    """

    name: str
    weight: Array
    bias: Array
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    gate: Gate | None = None
    relu: bool = True
    scalable: bool = True

    def __post_init__(self) -> None:
        if self.weight.ndim != 4 or self.weight.size == 0:
            raise ChainError(f"{self.name}: weight must be [O, I/g, kh, kw], not {self._shape()}")
        if self.bias.shape != self.weight.shape[:1]:
            raise ChainError(f"{self.name}: bias {list(self.bias.shape)} for {self._shape()}")
        if self.groups < 1 or len(self.weight) % self.groups:
            raise ChainError(f"{self.name}: {self.groups} groups do not divide {self._shape()}")
        if not (np.isfinite(self.weight).all() and np.isfinite(self.bias).all()):
            raise ChainError(f"{self.name}: a weight or bias is NaN or infinite")
        if self.gate is not None:
            self._require_gate(self.gate)

    def _require_gate(self, gate: Gate) -> None:
        if gate.down.shape != gate.up.shape[::-1]:
            raise ChainError(f"{self.name}: the gate's two matrices do not fit each other")
        if len(gate.up) != len(self.weight):
            raise ChainError(f"{self.name}: the gate has {len(gate.up)} channels")
        if (gate.up_bias.shape, gate.down_bias.shape) != (gate.up.shape[:1], gate.down.shape[:1]):
            raise ChainError(f"{self.name}: the gate's biases do not fit its matrices")
        parts = (gate.down, gate.down_bias, gate.up, gate.up_bias)
        if not all(np.isfinite(part).all() for part in parts):
            raise ChainError(f"{self.name}: a weight or bias of the gate is NaN or infinite")

    def _shape(self) -> list[int]:
        return list(self.weight.shape)

    @property
    def in_channels(self) -> int:
        """Channels that the stage reads."""
        return int(self.weight.shape[1]) * self.groups

    @property
    def out_channels(self) -> int:
        """Channels that the stage writes."""
        return len(self.weight)

    def by_group(self, weight: Array | None = None) -> Array:
        """The weight (or another array of its shape) as ``[g, O / g, I / g, kh * kw]``."""
        source = self.weight if weight is None else weight
        return source.reshape(self.groups, -1, source.shape[1], source.shape[2] * source.shape[3])

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of ``height`` x ``width``.

        Raises:
            ChainError: if the kernel does not fit into the padded input.
        """
        top, left, bottom, right = self.padding
        kernel_height, kernel_width = self.weight.shape[2:]
        rows = height + top + bottom - self.dilation[0] * (kernel_height - 1) - 1
        columns = width + left + right - self.dilation[1] * (kernel_width - 1) - 1
        if rows < 0 or columns < 0:
            raise ChainError(f"{self.name}: its kernel does not fit into {height} x {width}")
        return rows // self.stride[0] + 1, columns // self.stride[1] + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Classifier:
    """``weight`` ``[K, C]`` and ``bias`` ``[K]`` behind the average over all positions."""

    weight: Array
    bias: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """Stages in the order of the data, and the classifier. Every instance is consistent.

    Raises:
        ChainError: for no stages, a repeated name, or neighbours whose channels do not match.
    """

    stages: tuple[ConvStage, ...]
    classifier: Classifier

    def __post_init__(self) -> None:
        if not self.stages:
            raise ChainError("a chain needs at least one convolution")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ChainError("two stages have the same name")
        for left, right in zip(self.stages, self.stages[1:], strict=False):
            if left.out_channels != right.in_channels:
                raise ChainError(
                    f"{left.name} writes {left.out_channels} channels, "
                    f"{right.name} reads {right.in_channels}"
                )
        if self.classifier.weight.shape[1:] != (self.stages[-1].out_channels,):
            raise ChainError(f"the classifier does not fit {names[-1]}")


def rescale(chain: Chain, scales: Sequence[Float64Array | None]) -> Chain:
    """The chain with output channel c of stage l divided by ``scales[l][c]``; None leaves a stage.

    Computes the same logits in exact arithmetic, and bit for bit where scales are powers of two
    and nothing over- or underflows. Weights come back in float64.

    Raises:
        ChainError: not one entry per stage; a scale that is not positive and finite; a scale other
            than 1 at a boundary that is not scalable.
    """
    if len(scales) != len(chain.stages):
        raise ChainError(f"{len(scales)} scales for {len(chain.stages)} stages")
    incoming = np.ones(chain.stages[0].in_channels)
    stages = []
    for stage, given in zip(chain.stages, scales, strict=True):
        outgoing = np.ones(stage.out_channels) if given is None else np.asarray(given, np.float64)
        _require_scales(stage, outgoing)
        stages.append(_rescale_stage(stage, incoming, outgoing))
        incoming = outgoing
    classifier = replace(chain.classifier, weight=chain.classifier.weight * incoming)
    return Chain(stages=tuple(stages), classifier=classifier)


def _require_scales(stage: ConvStage, scales: Float64Array) -> None:
    if scales.shape != (stage.out_channels,):
        raise ChainError(f"{stage.name}: {list(scales.shape)} scales for {stage.out_channels}")
    if not np.all(np.isfinite(scales) & (scales > 0)):
        raise ChainError(f"{stage.name}: scales must be positive and finite")
    if not stage.scalable and np.any(scales != 1):
        raise ChainError(
            f"{stage.name}: its output has another reader or a nonlinearity that does not commute "
            "with scaling; leave this boundary unscaled"
        )


def _rescale_stage(stage: ConvStage, incoming: Float64Array, outgoing: Float64Array) -> ConvStage:
    by_input = incoming.reshape(stage.groups, 1, -1, 1)
    weight = (stage.by_group() * by_input).reshape(stage.weight.shape)
    gate = stage.gate
    if gate is not None:
        gate = replace(gate, down=gate.down * outgoing)
    return replace(
        stage,
        weight=weight / outgoing[:, None, None, None],
        bias=stage.bias / outgoing,
        gate=gate,
    )
