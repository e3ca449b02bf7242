"""Climbing the INT8 ladder: every recipe that the network allows, judged on the same images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import onnx

from exporter.errors import GateFailedError
from exporter.parity import StageResult
from exporter.parity.ledger import Rung
from exporter.quantization.quantizers import Quantized, Quantizer
from exporter.spec import Recipe

Score = Callable[[onnx.ModelProto], StageResult]
"""Judges a Q/DQ graph against the original network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Climb:
    """Every rung's score, and the graphs of the chosen one."""

    rungs: tuple[Rung, ...]
    recipe: Recipe
    quantized: Quantized

    @property
    def result(self) -> StageResult:
        """The chosen rung's score."""
        found = next(rung.result for rung in self.rungs if rung.chosen)
        assert found is not None
        return found


def climb(
    quantizer: Quantizer,
    recipes: Sequence[Recipe],
    score: Score,
    progress: Callable[[float], None],
) -> Climb:
    """Make every one of ``recipes``, from plain to full, and choose the highest SQNR.

    A rung that passes its gate goes before one that does not.

    Raises:
        GateFailedError: if no rung could be made; the message is the last one's.
    """
    rungs: list[Rung] = []
    best: tuple[int, Quantized] | None = None
    failure: GateFailedError | None = None
    for recipe in recipes:
        start = time.perf_counter()
        try:
            made = quantizer.make(recipe)
        except GateFailedError as error:
            failure = error
            taken = time.perf_counter() - start
            rungs.append(Rung(recipe=str(recipe), seconds=taken, reason=str(error)))
            continue
        taken = time.perf_counter() - start
        rungs.append(Rung(recipe=str(recipe), seconds=taken, result=score(made.graph)))
        if best is None or _rank(rungs[-1]) > _rank(rungs[best[0]]):
            best = len(rungs) - 1, made
        progress(len(rungs) / len(recipes))
    if best is None:
        assert failure is not None, "a ladder has rungs"
        raise failure
    index, quantized = best
    rungs[index] = replace(rungs[index], chosen=True)
    return Climb(rungs=tuple(rungs), recipe=recipes[index], quantized=quantized)


def _rank(rung: Rung) -> tuple[bool, float]:
    result = rung.result
    if result is None or result.comparison is None:
        return False, float("-inf")
    return result.status == "pass", result.comparison.sqnr_db
