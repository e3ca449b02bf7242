"""Climbing the ladder, and dialling layers into half, with quantizers of known quality."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.sensitivity import StageEffect
from exporter.errors import GateFailedError
from exporter.parity import Gate, StageResult
from exporter.parity.comparison import Comparison
from exporter.quantization.quantizers import LayerEffects, Quantized
from exporter.spec import Recipe
from exporter.stages.ladder import climb
from exporter.stages.mixed_precision import keep_enough, predicted, unmixed

GATE = Gate(min_sqnr_db=30.0)


class Known:
    """Its graphs carry their own SQNR: by recipe, plus ``gain`` for each layer in half."""

    def __init__(self, sqnr: dict[Recipe, float | None], gain: float = 1.0) -> None:
        self.sqnr, self.gain = sqnr, gain
        self.made: list[tuple[str, ...]] = []

    def make(self, recipe: Recipe, kept_half: Sequence[str] = ()) -> Quantized:
        self.made.append(tuple(kept_half))
        found = self.sqnr[recipe]
        if found is None:
            raise GateFailedError(f"{recipe} cannot be made")
        graph = onnx.ModelProto(doc_string=str(found + self.gain * len(kept_half)))
        return Quantized(model=graph, graph=graph, table=None)

    def effects(self, _made: Quantized) -> LayerEffects:
        layers = tuple(
            StageEffect(name=f"layer{index}", power=1.0 + index, macs=100) for index in range(6)
        )
        return LayerEffects(layers=layers, signal=1e4)


def score(graph: onnx.ModelProto) -> StageResult:
    sqnr = float(graph.doc_string)
    found = Comparison(max_abs=0.1, relative=0.1, sqnr_db=sqnr, cosine=1.0, top1_agreement=1.0)
    status = "fail" if GATE.violations(found) else "pass"
    return StageResult(stage="int8", status=status, comparison=found, gate=GATE)


def silent(_fraction: float) -> None:
    return


def test_every_rung_is_scored_and_the_best_is_chosen() -> None:
    """The order is that of the climb; the highest SQNR wins, wherever it stands."""
    sqnr = {Recipe.MINMAX: 20.0, Recipe.MSE: 35.0, Recipe.FULL: 31.0}
    shares: list[float] = []
    found = climb(Known(sqnr), list(sqnr), score, shares.append)
    assert ["minmax", "mse", "full"] == [rung.recipe for rung in found.rungs]
    assert [False, True, False] == [rung.chosen for rung in found.rungs]
    assert ["fail", "pass", "pass"] == [rung.to_json()["status"] for rung in found.rungs]
    assert (Recipe.MSE, 35.0) == (found.recipe, found.result.comparison.sqnr_db)
    assert 1.0 == shares[-1]


def test_a_rung_that_cannot_be_made_is_recorded_with_its_reason() -> None:
    """The others are still tried; only if none is left the climb fails."""
    found = climb(
        Known({Recipe.EQUALIZE: None, Recipe.MSE: 28.0}),
        (Recipe.EQUALIZE, Recipe.MSE),
        score,
        silent,
    )
    row = found.rungs[0].to_json()
    assert ("fail", "equalize cannot be made", None) == (
        row["status"],
        row["reason"],
        row["sqnr_db"],
    )
    assert Recipe.MSE is found.recipe
    with pytest.raises(GateFailedError, match="equalize cannot be made"):
        climb(Known({Recipe.EQUALIZE: None}), (Recipe.EQUALIZE,), score, silent)


@given(st.integers(0, 5), st.floats(0.5, 4.0))
def test_just_enough_layers_are_kept(needed: int, gain: float) -> None:
    """The fewest layers that pass, most sensitive first, found without trying every number."""
    quantizer = Known({Recipe.FULL: 30.0 - needed * gain}, gain)
    start = quantizer.make(Recipe.FULL)
    points = predicted(quantizer, start)
    found = keep_enough(
        quantizer, Recipe.FULL, unmixed(points, score(start.graph)), score=score, gate=GATE
    )
    kept = found.precision.kept
    assert len(kept) in (needed, needed + 1)
    assert kept == tuple(f"layer{5 - index}" for index in range(len(kept)))
    assert found.result.status == "pass" or len(kept) == 0
    assert len(quantizer.made) <= 1 + 4


def test_all_layers_in_half_is_no_int8_and_never_chosen() -> None:
    """Where only that would pass, nothing is returned; the best that was tried speaks."""
    quantizer = Known({Recipe.FULL: 20.0}, gain=10 / 6)
    start = quantizer.make(Recipe.FULL)
    points = predicted(quantizer, start)
    assert 0.0 == points[-1].int8_share
    found = keep_enough(
        quantizer, Recipe.FULL, unmixed(points, score(start.graph)), score=score, gate=GATE
    )
    assert (None, ()) == (found.quantized, found.precision.kept)
    assert "fail" == found.result.status
    assert pytest.approx(20 + 5 * 10 / 6) == found.result.comparison.sqnr_db
    document = found.precision.to_json()
    assert [0, 1, 2, 3, 4, 5, 6] == [point["kept"] for point in document["curve"]]
    assert 20.0 == document["curve"][0]["sqnr_db"]
    assert document["curve"][-1]["sqnr_db"] is None
    assert {"min_sqnr_db": 30.0} == document["wanted"]
