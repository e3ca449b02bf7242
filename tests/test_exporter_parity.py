"""The ledger's figures, gates and verdict."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporter.parity import (
    GATES,
    Gate,
    StageResult,
    judge,
    judge_outputs,
    not_run,
)
from exporter.parity.comparison import MAX_SQNR_DB, Comparison, accuracy, compare
from exporter.parity.ledger import Ledger

LOGITS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-100, 100, width=32),
)
PERFECT = Comparison(
    max_abs=0.0, relative=0.0, sqnr_db=200.0, cosine=1.0, top1_agreement=1.0, kl_nats=0.0
)


def array(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_figures_worked_out_by_hand() -> None:
    """r = (3, 4; 0, 12), y = (3, 3; 1, 12).

    sum r^2 = 169, sum (r - y)^2 = 2, range 12; r.y = 165, |y|^2 = 163. The first row's arg max
    moves from class 1 to class 0 (the first of equals), the second's stays.
    """
    found = compare(array([3, 4], [0, 12]), array([3, 3], [1, 12]))
    assert 1.0 == found.max_abs
    assert pytest.approx(1 / 12) == found.relative
    assert pytest.approx(10 * math.log10(169 / 2)) == found.sqnr_db
    assert pytest.approx(165 / math.sqrt(169 * 163)) == found.cosine
    assert 0.5 == found.top1_agreement


def test_kl_worked_out_by_hand() -> None:
    """p = (1/2, 1/2) against q = (1/4, 3/4): 1/2 log(4/3), mean with a row that is equal."""
    r, y = array([0, 0], [1, 5]), array([0, math.log(3)], [1, 5])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert pytest.approx(expected / 2, rel=1e-5) == compare(r, y).kl_nats
    assert compare(r, y, classifier=False).kl_nats is None


@given(LOGITS, st.floats(-50, 50, width=32))
def test_kl_is_zero_between_logits_that_differ_by_a_constant(r: np.ndarray, shift: float) -> None:
    """A constant added to all logits changes no probability; nothing makes KL negative."""
    found = compare(r, (r.astype(np.float64) + shift).astype(np.float32)).kl_nats
    assert found is not None
    assert 0.0 <= found < 1e-4


def test_an_error_of_one_percent_is_40_db() -> None:
    """y = 1.01 r has an SQNR of 40 dB, cosine 1 and full agreement."""
    r = array([100, -200, 300])
    found = compare(r, r * np.float32(1.01))
    assert pytest.approx(40, abs=1e-3) == found.sqnr_db
    assert pytest.approx(1.0) == found.cosine
    assert 1.0 == found.top1_agreement


@given(LOGITS)
def test_identical_outputs_are_perfect(r: np.ndarray) -> None:
    """A copy has no difference: 200 dB, cosine 1, agreement 1, whatever the values."""
    found = compare(r, r.copy())
    assert replace(PERFECT, cosine=found.cosine) == found
    assert pytest.approx(1.0) == found.cosine


@given(LOGITS, st.data(), st.integers(-10, 10))
def test_common_scaling_changes_nothing_but_the_difference(
    r: np.ndarray, data: st.DataObject, exponent: int
) -> None:
    """With both outputs times 2^k, max_abs is times 2^k and all relative figures stay."""
    y = data.draw(hnp.arrays(np.float32, r.shape, elements=st.floats(-100, 100, width=32)))
    # Smaller magnitudes would become subnormal, where scaling rounds.
    assume(
        not np.any((np.abs(r) < 1e-20) & (r != 0)) and not np.any((np.abs(y) < 1e-20) & (y != 0))
    )
    factor = np.float32(2.0**exponent)
    before, after = compare(r, y), compare(r * factor, y * factor)
    assert before.max_abs * float(factor) == pytest.approx(after.max_abs)
    assert before.sqnr_db == pytest.approx(after.sqnr_db)
    assert before.relative == pytest.approx(after.relative)
    assert before.cosine == pytest.approx(after.cosine)
    assert before.top1_agreement == after.top1_agreement


@given(LOGITS, st.integers(0, 2**32 - 1))
def test_more_noise_is_a_lower_sqnr(r: np.ndarray, seed: int) -> None:
    """Twice the same noise costs 6 dB."""
    noise = np.random.default_rng(seed).standard_normal(r.shape)
    assume(np.sum(r.astype(float) ** 2) > 1)
    one = compare(r.astype(np.float64), r + noise)  # type: ignore[arg-type]
    two = compare(r.astype(np.float64), r + 2 * noise)  # type: ignore[arg-type]
    assert one.sqnr_db - 20 * math.log10(2) == pytest.approx(two.sqnr_db, abs=1e-6)
    assert 2 * one.max_abs == pytest.approx(two.max_abs)


@given(LOGITS, st.data())
def test_difference_cosine_and_agreement_are_symmetric(r: np.ndarray, data: st.DataObject) -> None:
    """Swapping reference and output changes neither max_abs nor cosine nor the agreement."""
    y = data.draw(hnp.arrays(np.float32, r.shape, elements=st.floats(-100, 100, width=32)))
    there, back = compare(r, y), compare(y, r)
    assert there.max_abs == back.max_abs
    assert there.cosine == pytest.approx(back.cosine)
    assert there.top1_agreement == back.top1_agreement


@given(LOGITS, st.data())
def test_figures_stay_in_their_ranges(r: np.ndarray, data: st.DataObject) -> None:
    """SQNR within +-200 dB, cosine within [-1, 1], agreement within [0, 1], nothing NaN."""
    y = data.draw(hnp.arrays(np.float32, r.shape, elements=st.floats(-100, 100, width=32)))
    found = compare(r, y)
    assert -MAX_SQNR_DB <= found.sqnr_db <= MAX_SQNR_DB
    assert -1 <= found.cosine <= 1
    assert 0 <= found.top1_agreement <= 1
    assert found.relative >= 0


def test_an_all_zero_reference_has_defined_figures() -> None:
    """Zero against zero is perfect; zero against something is the worst there is."""
    zero, one = array([0, 0]), array([0, 1])
    assert PERFECT == compare(zero, zero)
    found = compare(zero, one)
    assert (1.0, math.inf, -200.0, 0.0) == (
        found.max_abs,
        found.relative,
        found.sqnr_db,
        found.cosine,
    )


def test_opposite_outputs_have_cosine_minus_one() -> None:
    """y = -r: cosine -1 and an error of four times the signal, -6 dB."""
    found = compare(array([1, -2]), array([-1, 2]))
    assert pytest.approx(-1) == found.cosine
    assert pytest.approx(-20 * math.log10(2)) == found.sqnr_db


def test_a_gate_passes_at_its_boundary() -> None:
    """Each limit is inclusive; the next float beyond it fails."""
    gate = Gate(max_relative=1e-4, min_sqnr_db=25.0, min_top1_agreement=0.98)
    edge = Comparison(max_abs=1.0, relative=1e-4, sqnr_db=25.0, cosine=1.0, top1_agreement=0.98)
    assert [] == gate.violations(edge)
    for beyond in (
        replace(edge, relative=math.nextafter(1e-4, 1)),
        replace(edge, sqnr_db=math.nextafter(25.0, 0)),
        replace(edge, top1_agreement=math.nextafter(0.98, 0)),
    ):
        assert 1 == len(gate.violations(beyond))


def test_violations_give_both_figures() -> None:
    """Each sentence has what was found and what was required."""
    bad = Comparison(max_abs=3.0, relative=0.25, sqnr_db=12.34, cosine=0.5, top1_agreement=0.905)
    gate = Gate(max_relative=1e-4, min_sqnr_db=25.0, min_top1_agreement=0.98)
    assert [
        "largest difference is 0.25 of the output's range, allowed 0.0001",
        "SQNR is 12.3 dB, required 25 dB",
        "top-1 agreement is 90.5 %, required 98 %",
    ] == gate.violations(bad)


def test_a_top1_drop_is_gated_where_there_are_labels() -> None:
    """0.2 points are allowed inclusively, 0.3 are not; without labels nothing is gated."""
    gate = Gate(max_top1_drop=0.002)
    assert [] == gate.violations(PERFECT, 0.002)
    assert ["top-1 fell by 0.30 points, allowed 0.2"] == gate.violations(PERFECT, 0.003)
    assert [] == gate.violations(PERFECT, None)
    labels = np.array([0, 1])
    row = judge("int8", array([2, 1], [1, 2]), array([2, 1], [2, 1]), gate=gate, labels=labels)
    assert ("fail", "top-1 fell by 50.00 points, allowed 0.2") == (row.status, row.reason)


def test_an_empty_gate_lets_everything_pass_but_nan_fails_a_set_one() -> None:
    """None is no gate; NaN satisfies no gate."""
    nan = Comparison(
        max_abs=math.nan, relative=math.nan, sqnr_db=math.nan, cosine=math.nan,
        top1_agreement=math.nan,
    )  # fmt: skip
    assert [] == Gate().violations(nan)
    gate = Gate(max_relative=1.0, min_sqnr_db=0.0, min_top1_agreement=0.0)
    assert 3 == len(gate.violations(nan))


def test_default_gates() -> None:
    """Float stages are held to 1e-4, fp16, bf16 and int8 to 50, 32, 25 dB and 98 % agreement."""
    names = ["reparameterized", "onnx", "simplified", "fp16", "bf16", "int8", "fp8"]
    assert names == list(GATES)
    assert Gate(min_sqnr_db=20.0, min_top1_agreement=0.95) == GATES["fp8"]
    for stage in ("reparameterized", "onnx", "simplified"):
        assert Gate(max_relative=1e-4) == GATES[stage]
    assert 50.0 == GATES["fp16"].min_sqnr_db
    assert Gate(min_sqnr_db=32.0, min_top1_agreement=0.98) == GATES["bf16"]
    assert Gate(min_sqnr_db=25.0, min_top1_agreement=0.98) == GATES["int8"]


def test_a_stage_within_its_gate_passes() -> None:
    """The row has the figures, the stage's own gate and, with labels, the accuracy."""
    r = array([1, 2], [4, 3], [0, 9])
    result = judge("onnx", r, r, labels=np.array([1, 1, 1]))
    assert ("pass", None, PERFECT, GATES["onnx"]) == (
        result.status,
        result.reason,
        result.comparison,
        result.gate,
    )
    assert 2 / 3 == result.top1


def test_a_stage_beyond_its_gate_fails_with_every_reason() -> None:
    """Violations are joined in one sentence and the figures are kept."""
    result = judge("int8", array([1, 2], [3, 4]), array([2, 1], [4, 3]))
    assert "fail" == result.status
    assert (
        "SQNR is 8.8 dB, required 25 dB; top-1 agreement is 0.0 %, required 98 %" == result.reason
    )
    assert result.comparison is not None


def test_a_given_gate_replaces_the_default() -> None:
    """The caller's gate judges, and is what the row records."""
    gate = Gate(min_sqnr_db=5.0)
    result = judge("int8", array([1, 2], [3, 4]), array([2, 1], [4, 3]), gate=gate)
    assert ("pass", {"min_sqnr_db": 5.0}) == (result.status, result.to_json()["tolerance"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_fail(value: float) -> None:
    """NaN and Inf fail even without a gate, are counted, and leave the figures null."""
    result = judge("fp16", array([1, 2], [3, 4]), array([1, value], [3, 4]), gate=Gate())
    assert ("fail", "1 of 4 outputs are NaN or Inf") == (result.status, result.reason)
    row = result.to_json()
    figures = ("max_abs", "relative", "sqnr_db", "cosine", "top1_agreement", "top1")
    assert [None] * 6 == [row[key] for key in figures]


def test_a_reference_that_is_not_finite_fails() -> None:
    """An original that answers NaN is no reference, and the row says whose fault it is."""
    result = judge("onnx", array([1, math.nan]), array([1, 2]))
    assert ("fail", "1 of the original's 2 outputs are NaN or Inf") == (
        result.status,
        result.reason,
    )


def test_outputs_of_another_shape_fail() -> None:
    """Wrong shapes are a failed stage with both shapes, never broadcast."""
    result = judge("onnx", array([1, 2], [3, 4]), array([1, 2]))
    assert ("fail", "output shape is [1, 2], expected [2, 2]") == (result.status, result.reason)
    assert result.comparison is None


def test_an_unknown_stage_needs_a_gate() -> None:
    """A stage without a default gate is a programming error, not a silent pass."""
    with pytest.raises(KeyError):
        judge("engine", array([1]), array([1]))


def ledger(*statuses: str) -> Ledger:
    stages = tuple(
        StageResult(stage=f"stage{index}", status=status) for index, status in enumerate(statuses)
    )
    return Ledger(stages=stages, images="test images", image_count=3)


@given(st.lists(st.sampled_from(["pass", "fail", "not_run"])))
def test_the_verdict_is_pass_only_if_something_ran_and_nothing_failed(statuses: list[str]) -> None:
    """Not run never counts as passed."""
    expected = "pass" if "pass" in statuses and "fail" not in statuses else "fail"
    assert expected == ledger(*statuses).verdict


def test_a_ledger_of_what_did_not_run_fails() -> None:
    """Nothing ran, hence nothing was shown."""
    assert "fail" == ledger("not_run", "not_run").verdict
    assert "fail" == ledger().verdict
    assert "pass" == ledger("pass", "not_run").verdict


def test_what_did_not_run_is_listed_with_its_reason() -> None:
    """A not_run row has the reason, the gate it would have had and null figures."""
    whole = ledger("pass").with_stage(not_run("engine", "no GPU here"))
    assert ("engine",) == whole.not_run
    row = whole.to_json()["stages"][-1]
    assert ("engine", "not_run", "no GPU here") == (row["stage"], row["status"], row["reason"])
    assert (None, None) == (row["sqnr_db"], row["max_abs"])
    assert {"min_sqnr_db": 25.0, "min_top1_agreement": 0.98} == not_run("int8", "").to_json()[
        "tolerance"
    ]


def test_with_stage_leaves_the_ledger_as_it_was() -> None:
    """Ledgers are values: adding a row makes a new one."""
    first = ledger("pass")
    second = first.with_stage(not_run("engine", "no GPU"))
    assert (1, 2) == (len(first.stages), len(second.stages))


def test_json_has_the_contracts_keys() -> None:
    """parity.json: verdict, and stages with exactly the keys that other tools rely on."""
    result = judge("onnx", array([1, 2]), array([1, 2]))
    data = ledger("pass").with_stage(result).to_json()
    assert {"verdict", "stages"} <= set(data)
    contract = {
        "stage", "reference", "status", "reason", "max_abs", "sqnr_db", "cosine",
        "top1_agreement", "tolerance",
    }  # fmt: skip
    for row in data["stages"]:
        assert contract <= set(row)
    assert {"max_relative": 1e-4} == data["stages"][-1]["tolerance"]
    assert "original" == data["stages"][-1]["reference"]


def test_json_is_strict_even_where_a_figure_is_infinite() -> None:
    """A constant reference makes ``relative`` infinite; JSON gets null, and the row still fails."""
    results = [
        judge("onnx", array([2, 2]), array([2, 3])),
        judge("fp16", array([1000, 1000]), array([1000, 1000.001]), gate=Gate()),
        judge("int8", array([1, 2]), array([math.nan, 2])),
        not_run("engine", "no GPU"),
    ]
    data = replace(ledger(), stages=tuple(results), original_top1=0.5).to_json()
    text = json.dumps(data, allow_nan=False)
    assert data == json.loads(text)
    assert ("fail", None, 1.0) == tuple(
        data["stages"][0][key] for key in ("status", "relative", "max_abs")
    )


def test_accuracy_is_the_fraction_of_right_answers() -> None:
    """Three of four right is 0.75; without labels there is no accuracy."""
    logits = array([1, 0], [0, 1], [1, 0], [1, 0])
    assert 0.75 == accuracy(logits, np.array([0, 1, 0, 1]))
    assert accuracy(logits, None) is None


def test_without_a_classifier_there_is_no_agreement() -> None:
    """Feature maps are compared value by value; the agreement is null and not gated."""
    r = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    result = judge("int8", r, r[:, ::-1] * 0 + r * np.float32(1.01), classifier=False)
    assert ("pass", {"min_sqnr_db": 25.0}) == (result.status, result.to_json()["tolerance"])
    assert result.to_json()["top1_agreement"] is None
    assert pytest.approx(40, abs=0.01) == result.to_json()["sqnr_db"]


def test_the_worst_output_speaks_for_the_stage() -> None:
    """With several outputs the row has the lowest SQNR's figures and all of them beside."""
    r = {"a": array([1, 2]), "b": array([3, 4])}
    y = {"a": array([1, 2.02]), "b": array([3, 4.4])}
    row = judge_outputs("int8", r, y, gate=Gate(min_sqnr_db=15.0), classifier=False)
    document = row.to_json()
    assert ["a", "b"] == list(document["outputs"])
    assert document["sqnr_db"] == document["outputs"]["b"]["sqnr_db"]
    assert document["outputs"]["a"]["sqnr_db"] > document["outputs"]["b"]["sqnr_db"]
    assert "pass" == row.status


def test_one_bad_output_fails_the_stage_by_name() -> None:
    """A failing output is named, even if another one has the lower SQNR but cannot fail."""
    r = {"good": array([1, 2]), "bad": array([3, 4])}
    row = judge_outputs("onnx", r, {"good": r["good"], "bad": array([3, 5])}, classifier=False)
    assert "fail" == row.status
    assert str(row.reason).startswith("output bad: largest difference is 1 of the output's range")
    shape = judge_outputs("onnx", r, {"good": r["good"], "bad": array([3])}, classifier=False)
    assert "output bad: output shape is [1, 1], expected [1, 2]" == shape.reason
    assert ["good"] == list(shape.outputs)


def test_outputs_that_come_and_go_fail() -> None:
    """The names must be the original's."""
    row = judge_outputs("onnx", {"a": array([1, 2])}, {"b": array([1, 2])})
    assert ("fail", "the outputs are not the original's: a, b") == (row.status, row.reason)


def test_one_output_is_judged_as_ever() -> None:
    """A single output's row is that of judge, accuracy included, and has no breakdown."""
    r, labels = array([1, 2], [4, 3]), np.array([1, 1])
    row = judge_outputs("onnx", {"logits": r}, {"logits": r}, labels=labels)
    assert judge("onnx", r, r, labels=labels) == row
    assert "outputs" not in row.to_json()
