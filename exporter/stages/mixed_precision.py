"""Keeping just enough layers in half: the dial between INT8 and what the user demands.

Layers are kept in the order of :func:`calibration.sensitivity.pareto`, error power in the outputs
per multiply-accumulate. Its predictions are optimistic (errors of layers are not independent), but
the order holds, so the point to publish is found by bisection with a measurement at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibration.sensitivity import ParetoPoint, first_passing, pareto
from exporter.parity import Gate, StageResult
from exporter.parity.ledger import CurvePoint, MixedPrecision
from exporter.quantization.quantizers import Quantized, Quantizer
from exporter.spec import Recipe
from exporter.stages.ladder import Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The list, and the graphs of the first point that passes, with their score.

    ``quantized`` is None if none does; ``result`` is then the best score of those that were tried.
    """

    precision: MixedPrecision
    quantized: Quantized | None
    result: StageResult


def predicted(quantizer: Quantizer, made: Quantized) -> tuple[ParetoPoint, ...]:
    """The list for ``made``, which keeps no layer in half, from all in INT8 to none."""
    effects = quantizer.effects(made)
    if not effects.layers or not effects.signal > 0:
        return ()
    return pareto(effects.layers, effects.signal)


def unmixed(points: tuple[ParetoPoint, ...], result: StageResult) -> MixedPrecision:
    """The list with nothing kept; ``result`` is the score of that."""
    curve = [CurvePoint(point=p, result=None if p.kept else result) for p in points]
    return MixedPrecision(curve=tuple(curve))


def keep_enough(
    quantizer: Quantizer, recipe: Recipe, start: MixedPrecision, *, score: Score, gate: Gate
) -> Kept:
    """Quantize anew with ever more layers in half until ``score`` passes, in few steps.

    ``start`` is :func:`unmixed` with a score that fails.
    """
    points = [row.point for row in start.curve]
    measured = {row.point.kept: row.result for row in start.curve if row.result}
    passing: list[Quantized] = []

    def passes(point: ParetoPoint) -> bool:
        if point.kept not in measured:
            made = quantizer.make(recipe, point.kept)
            measured[point.kept] = score(made.graph)
            if measured[point.kept].status == "pass":
                # Bisection only goes down from here: the last one that passes is the answer.
                passing[:] = [made]
        return measured[point.kept].status == "pass"

    # With no layer left in INT8 it would be an fp16 engine by another name.
    chosen = first_passing([point for point in points if point.int8_share > 0], passes)
    kept = chosen.kept if chosen else max(measured, key=len)
    return Kept(
        precision=MixedPrecision(
            curve=tuple(CurvePoint(point=p, result=measured.get(p.kept)) for p in points),
            kept=kept if chosen else (),
            wanted=gate,
        ),
        quantized=passing[0] if chosen else None,
        result=measured[kept],
    )
