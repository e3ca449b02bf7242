"""How far a figure may be from the baseline's before it counts, kind by kind.

A figure f is worse than its baseline b by d = b - f where more is better, d = f - b where less is;
it has regressed if d > margin. Sizes have relative margins: d / b.

Where the defaults come from. ONNX Runtime picks its kernels by the CPU, so figures that are exact
on one machine move on another:

* SQNR is compared up to ``ROUNDING_DB`` only: above it lies float32 rounding, in an order of
  additions that is the kernels' own, and 132 dB are as good as 110.
* int8 and the like, 1 dB: what different CPUs give differs by less (measured; docs/ci.md).
* fp16, 6 dB: with arithmetic purely in half the figure is 5 dB below what a CPU gives that computes
  partly in float32 (docs/known.md).
* agreement and top-1, one point: a few images at the border between two classes.
* an engine's contents depend on TensorRT's release alone; its bytes may vary by a little.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

ROUNDING_DB = 100.0
_HALF_STAGES = ("fp16",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Decibels, fractions of images, counts, and fractions of a size."""

    sqnr_db: float = 1.0
    half_sqnr_db: float = 6.0
    top1_agreement: float = 0.01
    top1: float = 0.01
    int8_convolutions: float = 0
    epilogue_fused: float = 0
    other_kernels: float = 0
    plan_bytes: float = 0.02
    model_bytes: float = 0.01

    def of(self, figure: str, stage: str) -> float:
        """The margin of a figure of one stage."""
        if figure == "sqnr_db" and stage in _HALF_STAGES:
            return self.half_sqnr_db
        return float(getattr(self, figure))

    def with_values(self, values: Mapping[str, float]) -> Margins:
        """Some of them replaced."""
        return replace(self, **values)

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


KINDS = tuple(item.name for item in fields(Margins))
