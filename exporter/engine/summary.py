"""What an engine really contains, and the gate that judges it.

A plan that builds is not yet the plan that was asked for: a builder may run quantized convolutions
in float and say nothing. The figures here come from the builder's own layer table.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from exporter.errors import GateFailedError
from exporter.spec import Precision

BUILT = "built"
"""The ``status`` of an engine that is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvolutionCounts:
    """Convolution kernels by the data type they multiply in.

    ``float`` holds everything that is of no other type here, so all but ``total`` add up to it.
    """

    total: int
    int8: int
    half: int
    float: int
    bf16: int = 0
    fp8: int = 0

    def to_json(self) -> dict[str, int]:
        """The figures under the names of ``engine.json``."""
        return asdict(self)

    def in_precision(self, precision: Precision) -> int:
        """How many run in the data type that ``precision`` asks for."""
        return self.to_json()[_COUNTED_AS[precision]]


def count_words(counts: Mapping[str, int]) -> str:
    """``22 INT8, 0 half, 0 float`` from the figures of ``engine.json``.

    bfloat16 and FP8 are named only where there are any; engines of older versions list neither.
    """
    rest = {key: label for key, label in _RARE.items() if counts.get(key)}
    labels = {"int8": "INT8", "half": "half", "float": "float", **rest}
    return ", ".join(f"{counts[key]} {label}" for key, label in labels.items())


def same_figures(
    per_target: Mapping[str, Mapping[str, Any]],
) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Neighbours with equal figures of ``engine.json`` together: one plan has one layer table."""
    groups = itertools.groupby(per_target, key=per_target.__getitem__)
    return [(tuple(targets), figures) for figures, targets in groups]


_COUNTED_AS = {
    Precision.FP32: "float",
    Precision.FP16: "half",
    Precision.BF16: "bf16",
    Precision.INT8: "int8",
    Precision.FP8: "fp8",
}
_RARE = {"bf16": "bfloat16", "fp8": "FP8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFigures:
    """What the engine does on one compute capability.

    ``epilogue_fused`` counts the convolutions whose own kernel also adds the bias, applies the ReLU
    and, where the next convolution is quantized, requantizes. ``other_kernels`` counts all kernels
    that are not convolutions.
    """

    convolutions: ConvolutionCounts
    epilogue_fused: int
    other_kernels: int

    def to_json(self) -> dict[str, object]:
        """The figures under the names of ``engine.json``."""
        return {
            "convolutions": self.convolutions.to_json(),
            "epilogue_fused": self.epilogue_fused,
            "other_kernels": self.other_kernels,
        }


class EngineTyping(str, Enum):
    """Who chose the data types of an engine.

    ``STRONG``: the graph. ``WEAK``: the builder, by its timings, among those that it may.
    ``IMPLICIT``: the builder, which may use INT8 where a calibration cache has a scale.
    """

    STRONG = "strong"
    WEAK = "weak"
    IMPLICIT = "implicit"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSummary:
    """The verdict on one plan; ``to_json`` is ``engine.json``.

    ``per_target`` maps ``sm86`` and so on to its figures and is never empty. Memory figures are
    those that the builder states, in bytes, None where it states none. ``dla_layers`` counts the
    parts of the network that run on a DLA; what is in them no figure tells.
    """

    backend: str
    version: str
    per_target: Mapping[str, TargetFigures]
    plan_bytes: int
    activation_memory_bytes: int | None = None
    weights_memory_bytes: int | None = None
    dla_layers: int = 0
    typing: EngineTyping = EngineTyping.STRONG
    warnings: tuple[str, ...] = field(default=())

    @property
    def targets(self) -> tuple[str, ...]:
        """The compute capabilities the plan was built for."""
        return tuple(self.per_target)

    @property
    def worst_target(self) -> str:
        """The target with the fewest convolutions in 8, then 16 bits, then fused epilogues."""

        def rank(target: str) -> tuple[int, int, int, int]:
            figures = self.per_target[target]
            counts = figures.convolutions
            eight, sixteen = counts.int8 + counts.fp8, counts.half + counts.bf16
            return eight, sixteen, figures.epilogue_fused, -figures.other_kernels

        return min(self.per_target, key=rank)

    @property
    def convolutions(self) -> ConvolutionCounts:
        """Convolution counts of the worst target."""
        return self.per_target[self.worst_target].convolutions

    @property
    def epilogue_fused(self) -> int:
        """Fused epilogues of the worst target."""
        return self.per_target[self.worst_target].epilogue_fused

    @property
    def other_kernels(self) -> int:
        """Kernels that are not convolutions, of the worst target."""
        return self.per_target[self.worst_target].other_kernels

    def to_json(self) -> dict[str, object]:
        """The content of ``engine.json``: strings, numbers, lists and dicts only."""
        return {
            "status": BUILT,
            "backend": self.backend,
            "version": self.version,
            "targets": list(self.targets),
            **self.per_target[self.worst_target].to_json(),
            "plan_bytes": self.plan_bytes,
            "activation_memory_bytes": self.activation_memory_bytes,
            "weights_memory_bytes": self.weights_memory_bytes,
            "dla_layers": self.dla_layers,
            "typing": str(self.typing),
            "per_target": {name: figures.to_json() for name, figures in self.per_target.items()},
            "warnings": list(self.warnings),
        }


_LABELS = {
    Precision.INT8: "INT8",
    Precision.FP8: "FP8",
    Precision.FP16: "half",
    Precision.BF16: "bfloat16",
    Precision.FP32: "float",
}
_SCALARS = (
    "give every activation QuantizeLinear/DequantizeLinear a scale of shape [] (shape [1] silently "
    "costs {}) and quantize input and weights of every convolution"
)
_ADVICE = {
    Precision.INT8: _SCALARS.format("INT8"),
    Precision.FP8: _SCALARS.format("FP8"),
    Precision.FP16: "make weights, biases and activations of every convolution half",
    Precision.BF16: "make weights, biases and activations of every convolution bfloat16",
    Precision.FP32: "build fp32 from the float graph",
}
_TIMED = (
    "the builder chose by its own timings: build again on an idle GPU without --timing-cache, or "
    "with --optimization-level 5"
)


def _advice(precision: Precision, typing: EngineTyping) -> str:
    """What to do now; a builder that chooses types by itself is not to be told about the graph."""
    if typing is EngineTyping.IMPLICIT:
        return (
            f"{_TIMED}, look in the build log for tensors without a scale, or, unless it is for a "
            "DLA, use --quantization explicit"
        )
    if typing is EngineTyping.WEAK and precision is Precision.FP16:
        return f"{_TIMED}; from TensorRT 10 on --typing strong binds it to the graph"
    return _ADVICE[precision]


def check_engine(
    summary: EngineSummary,
    precision: Precision,
    expected_convolutions: int,
    *,
    computed_weights: int = 0,
    pointwise: int = 0,
    allow_emulated: bool = False,
) -> None:
    """Return only if all convolutions of the network run in ``precision`` on every target.

    ``computed_weights`` of them have weights that the network computes; these cannot be quantized
    and stay float in INT8 and FP8 engines. ``pointwise`` of them are 1x1 outside the blocks; a
    builder may run these as matrix products, which its layer table does not count as convolutions.
    With ``allow_emulated`` half convolutions pass for quantized ones. Of a network that runs on a
    DLA in part, only the convolutions on the GPU are judged.

    Raises:
        GateFailedError: naming the first target that fails and its counts, if the number of
            convolutions is not ``expected_convolutions`` or not all run in the data type asked for.
    """
    spared = computed_weights if precision.is_quantized else 0
    fewest = 0 if summary.dla_layers else expected_convolutions - pointwise
    for target, figures in summary.per_target.items():
        counts = figures.convolutions
        if not fewest <= counts.total <= expected_convolutions:
            raise GateFailedError(
                f"the engine for {target} has {counts.total} convolution kernels where the network "
                f"has {expected_convolutions} convolutions: its layer table cannot vouch for "
                f"{precision}; see the build log"
            )
        found, wanted = counts.in_precision(precision), max(0, counts.total - spared)
        emulated = allow_emulated and precision is Precision.INT8
        if emulated:
            found += counts.half
        # Which of the spared ones a DLA or a half kernel took cannot be told.
        passes = found >= wanted if emulated or summary.dla_layers else found == wanted
        if not passes:
            raise GateFailedError(
                f"on {target} only {found} of {wanted} convolutions run in "
                f"{_LABELS[precision]} ({count_words(counts.to_json())}): "
                f"{_advice(precision, summary.typing)}"
            )
