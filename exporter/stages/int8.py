"""INT8 from the first rung to the row in the ledger: climb, keep layers in half if asked, judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from exporter.errors import InputError
from exporter.localization.graphs import GraphPair
from exporter.parity import Gate, StageResult
from exporter.quantization.quantizers import Quantized, Quantizer
from exporter.running.onnx_runner import OnnxRunner
from exporter.spec import Recipe
from exporter.stages.judge import Judge
from exporter.stages.ladder import climb
from exporter.stages.mixed_precision import keep_enough, predicted, unmixed

STAGE = "int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Request:
    """``recipe`` None is the fullest that the network allows, AUTO the best by measurement.

    ``dial`` keeps as many layers in half as the gate needs.
    """

    recipe: Recipe | None
    gate: Gate
    dial: bool
    title: str


def choose(
    quantizer: Quantizer, request: Int8Request, judge: Judge, progress: Callable[[float], None]
) -> tuple[Quantized, tuple[str, ...]]:
    """The graphs to publish and the layers they keep in half; their row is in ``judge``'s ledger.

    Raises:
        InputError: if the recipe does not fit the network.
        GateFailedError: if the gate cannot be passed; with the ledger as evidence.
    """

    def score(graph: onnx.ModelProto) -> StageResult:
        return judge.score(STAGE, OnnxRunner(graph).run, request.gate)

    climbed = climb(quantizer, _recipes(quantizer, request), score, progress)
    made, result, mixed = climbed.quantized, climbed.result, None
    failed = result.status == "fail"
    advice = "--min-sqnr keeps the most sensitive layers in half" if not request.dial else ""
    if quantizer.predicts or (failed and request.dial):
        points = predicted(quantizer, made)
        mixed = unmixed(points, result)
    if failed and request.dial and mixed is not None:
        kept = keep_enough(quantizer, climbed.recipe, mixed, score=score, gate=request.gate)
        made, result, mixed = kept.quantized or made, kept.result, kept.precision
        advice = "no choice of layers in half passes either: use --precision fp16"
    judge.record_int8(climbed.rungs, mixed)
    if quantizer.rescales:
        # Equalization changes no float result: the graph that is published is judged anew.
        judge.recheck("simplified", OnnxRunner(made.model).run)
    pair = GraphPair(reference="simplified", good=made.model, bad=made.graph)
    judge.add(result, advice, pair)
    return made, mixed.kept if mixed else ()


def _recipes(quantizer: Quantizer, request: Int8Request) -> tuple[Recipe, ...]:
    known = quantizer.recipes
    if request.recipe is Recipe.AUTO:
        return known
    recipe = request.recipe or quantizer.default
    if recipe not in known:
        raise InputError(
            f"recipe {recipe} rescales a chain of convolutions, which {request.title} is not; "
            f"use --recipe {quantizer.default}"
        )
    return (recipe,)
