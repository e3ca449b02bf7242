"""The stage ledger: does every step still compute what was trained?

Every stage's outputs are compared with those of the original module on the same real images, by the
figures of :mod:`exporter.parity.comparison`.

Where there are several outputs, each must pass, and the stage's figures are those of the worst.

Where the gates come from:

* float32 stages, relative <= 1e-4: they differ only in rounding and in the order of additions. A
  relative rounding of 2^-24 in sums of up to 9 * 1280 terms, through 28 layers, stays near
  2^-24 sqrt(11520) sqrt(28) = 3.4e-5 of the range even if nothing cancels; measured: below 1e-6.
* fp16, SQNR >= 50 dB: one rounding to half costs 2^-11, 74 dB; two roundings a layer (weights,
  activations) in 28 layers cost at most 10 log10(56) = 17 dB of that, leaving 57.
* bf16, SQNR >= 32 dB: one rounding to bfloat16 costs 2^-8, 56 dB, 18 less than half's; the same two
  roundings a layer leave 39, and the gate stands as far below as that of fp16.
* fp8, SQNR >= 20 dB and agreement >= 95 %: one rounding to E4M3 costs 2^-4, 32 dB, of which the
  same sum of errors would leave 15 after 28 layers. Networks whose errors do not all add up keep
  more: 27 to 31 dB and 97 to 100 % (docs/precisions.md), and a scale that clips half the range
  brings them below the gate.
* int8, SQNR >= 25 dB and agreement >= 98 %: a uniform 8-bit quantizer of a ReLU activation gives
  about 40 dB, a per-channel weight about 30; 25 dB is what is left where both are healthy, and
  below it top-1 begins to move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.parity.comparison import Comparison, FloatArray, accuracy, compare

ORIGINAL = "original"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What a comparison must satisfy; None means that the figure is not gated.

    ``max_top1_drop`` is a fraction: 0.002 allows 0.2 points of accuracy to be lost.
    """

    max_relative: float | None = None
    min_sqnr_db: float | None = None
    min_top1_agreement: float | None = None
    max_top1_drop: float | None = None

    def violations(self, comparison: Comparison, top1_drop: float | None = None) -> list[str]:
        """Every way in which ``comparison`` falls short, with both figures.

        ``top1_drop`` is the accuracy that was lost, None without labels.
        """
        found = []
        if self.max_relative is not None and not comparison.relative <= self.max_relative:
            found.append(
                f"largest difference is {comparison.relative:.2g} of the output's range, "
                f"allowed {self.max_relative:g}"
            )
        if self.min_sqnr_db is not None and not comparison.sqnr_db >= self.min_sqnr_db:
            found.append(f"SQNR is {comparison.sqnr_db:.1f} dB, required {self.min_sqnr_db:g} dB")
        wanted, agreement = self.min_top1_agreement, comparison.top1_agreement
        if wanted is not None and agreement is not None and not agreement >= wanted:
            found.append(f"top-1 agreement is {100 * agreement:.1f} %, required {100 * wanted:g} %")
        allowed = self.max_top1_drop
        # A fraction of images is no exact decimal number.
        if allowed is not None and top1_drop is not None and not top1_drop <= allowed + 1e-9:
            found.append(f"top-1 fell by {100 * top1_drop:.2f} points, allowed {100 * allowed:g}")
        return found

    def to_json(self) -> dict[str, float]:
        """The gated figures only."""
        return {key: value for key, value in asdict(self).items() if value is not None}


_FLOAT = Gate(max_relative=1e-4)
GATES: Mapping[str, Gate] = {
    "reparameterized": _FLOAT,
    "onnx": _FLOAT,
    "simplified": _FLOAT,
    "fp16": Gate(min_sqnr_db=50.0, min_top1_agreement=0.98),
    "bf16": Gate(min_sqnr_db=32.0, min_top1_agreement=0.98),
    "int8": Gate(min_sqnr_db=25.0, min_top1_agreement=0.98),
    "fp8": Gate(min_sqnr_db=20.0, min_top1_agreement=0.95),
}
"""The default gate of each stage."""

UNTRAINED_GATE = Gate(min_sqnr_db=3.0)
"""Of int8 and fp8 for random weights: they make no decisions that could be kept, and noise grows
with depth.

Measured at int8 with plain scales on A0 to B3: 17 to 24 dB, on D2se's 48 gated layers 5.8. A graph
that is broken is near 0 dB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One row of the ledger, by ``images``; ``top1`` is the accuracy (0 to 1) on all there are.

    ``outputs`` holds every output's figures where there are several; ``comparison`` is the worst.
    """

    stage: str
    status: str
    reference: str = ORIGINAL
    reason: str | None = None
    comparison: Comparison | None = None
    gate: Gate = Gate()
    top1: float | None = None
    images: int | None = None
    outputs: Mapping[str, Comparison] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row as parity.json holds it; figures are null where nothing was compared."""
        figures = self.comparison.to_json() if self.comparison else {}
        keys = ("max_abs", "relative", "sqnr_db", "cosine", "kl_nats", "top1_agreement")
        breakdown = {name: comparison.to_json() for name, comparison in self.outputs.items()}
        return {
            "stage": self.stage,
            "reference": self.reference,
            "status": self.status,
            "reason": self.reason,
            "images": self.images,
            **{key: figures.get(key) for key in keys},
            "top1": self.top1,
            "tolerance": self.gate.to_json(),
            **({"outputs": breakdown} if breakdown else {}),
        }


def judge(
    stage: str,
    reference: FloatArray,
    output: FloatArray,
    *,
    gate: Gate | None = None,
    labels: npt.NDArray[np.int64] | None = None,
    classifier: bool = True,
) -> StageResult:
    """Compare one stage's output with the original's and pass or fail it.

    A ``classifier``'s outputs are logits ``[N, num_classes]``; ``labels`` is ``[N]`` class indices,
    for its accuracy. ``gate`` defaults to the stage's own.
    """
    gate = GATES[stage] if gate is None else gate
    gate = gate if classifier else replace(gate, min_top1_agreement=None)
    if output.shape != reference.shape:
        reason = f"output shape is {list(output.shape)}, expected {list(reference.shape)}"
        return StageResult(stage=stage, status="fail", reason=reason, gate=gate)
    for what, values in (("of the original's", reference), ("of", output)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            reason = f"{bad} {what} {values.size} outputs are NaN or Inf"
            return StageResult(stage=stage, status="fail", reason=reason, gate=gate)
    comparison = compare(reference, output, classifier=classifier)
    top1, before = accuracy(output, labels), accuracy(reference, labels)
    drop = None if top1 is None or before is None else before - top1
    violations = gate.violations(comparison, drop)
    return StageResult(
        stage=stage,
        status="fail" if violations else "pass",
        reason="; ".join(violations) or None,
        comparison=comparison,
        gate=gate,
        top1=top1,
    )


def judge_outputs(
    stage: str,
    reference: Mapping[str, FloatArray],
    outputs: Mapping[str, FloatArray],
    *,
    gate: Gate | None = None,
    labels: npt.NDArray[np.int64] | None = None,
    classifier: bool = True,
) -> StageResult:
    """:func:`judge` every output; with several, the worst speaks for the stage.

    ``labels`` belong to the first output.
    """
    if reference.keys() != outputs.keys():
        odd = ", ".join(sorted(reference.keys() ^ outputs.keys()))
        reason = f"the outputs are not the original's: {odd}"
        return StageResult(stage=stage, status="fail", reason=reason, gate=gate or GATES[stage])
    rows: dict[str, StageResult] = {}
    for name, expected in reference.items():
        own_labels = labels if classifier and not rows else None
        rows[name] = judge(
            stage, expected, outputs[name], gate=gate, labels=own_labels, classifier=classifier
        )
    if len(rows) == 1:
        return next(iter(rows.values()))
    worst = min(rows, key=lambda name: _rank(rows[name]))
    words = rows[worst].reason
    return replace(
        rows[worst],
        reason=f"output {worst}: {words}" if words else None,
        top1=next(iter(rows.values())).top1,
        outputs={name: row.comparison for name, row in rows.items() if row.comparison},
    )


def _rank(row: StageResult) -> tuple[bool, float]:
    """Failures first, what could not be compared before the rest, then by SQNR."""
    return row.status != "fail", row.comparison.sqnr_db if row.comparison else -math.inf


def not_run(stage: str, reason: str) -> StageResult:
    """A row for a stage that did not run."""
    return StageResult(stage=stage, status="not_run", reason=reason, gate=GATES.get(stage, Gate()))
