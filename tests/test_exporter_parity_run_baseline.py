"""Figures against a baseline: every regression is seen, nothing within its margin is one."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.cases import CaseResult, Status
from exporter.errors import InputError
from exporter.parity_run import (
    Comparison,
    Margins,
    compare,
    junit_xml,
    read_baseline,
    require_same_cases,
    write_baseline,
)
from exporter.parity_run.margins import KINDS

MARGINS = {"A0-int8": Margins()}


def row(stage: str, status: str = "pass", **figures: float | str | None):
    """A row of parity.json."""
    keys = ("max_abs", "sqnr_db", "cosine", "top1_agreement", "top1", "reason")
    return {"stage": stage, "status": status, **dict.fromkeys(keys), **figures}


def result(**changes: float) -> CaseResult:
    """A case that passed; ``changes`` replace figures of int8, the engine or the files."""
    figures = {
        "sqnr_db": 37.3, "top1_agreement": 1.0, "top1": 0.98, "int8": 22, "epilogue_fused": 0,
        "other_kernels": 24, "plan_bytes": 10_000_000, "model_bytes": 35_000_000, "float_db": 132.4,
    } | changes  # fmt: skip
    return CaseResult(
        name="A0-int8",
        status=Status.PASS,
        seconds=3.0,
        stages=(
            row("simplified", sqnr_db=figures["float_db"], top1_agreement=1.0),
            row("int8", **{k: figures[k] for k in ("sqnr_db", "top1_agreement", "top1")}),
            row("engine", "not_run", reason="no driver"),
        ),
        engine={
            "per_target": {},
            "convolutions": {"total": 22, "int8": figures["int8"]},
            **{k: figures[k] for k in ("epilogue_fused", "other_kernels", "plan_bytes")},
        },
        files={"model.onnx": int(figures["model_bytes"]) - 1000, "model.int8.onnx": 1000},
    )


def against(before: CaseResult, after: CaseResult, margins: Margins | None = None) -> Comparison:
    """``after`` held against ``before`` as its baseline."""
    own = MARGINS if margins is None else {"A0-int8": margins}
    return compare({"A0-int8": before.figures}, [after], own)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"sqnr_db": 31.0},
            "case A0-int8, stage int8: sqnr_db fell from 37.3 to 31.0, more than the allowed 1.0",
        ),
        (
            {"top1_agreement": 0.97},
            "case A0-int8, stage int8: top1_agreement fell from 1.0000 to 0.9700, "
            "more than the allowed 0.01",
        ),
        (
            {"top1": 0.96},
            "case A0-int8, stage int8: top1 fell from 0.9800 to 0.9600, more than the allowed 0.01",
        ),
        (
            {"int8": 21},
            "case A0-int8, engine contents: int8_convolutions fell from 22 to 21, "
            "more than the allowed 0",
        ),
        (
            {"other_kernels": 25},
            "case A0-int8, engine contents: other_kernels rose from 24 to 25, "
            "more than the allowed 0",
        ),
        (
            {"plan_bytes": 10_300_000},
            "case A0-int8, engine contents: plan_bytes rose from 10000000 to 10300000, "
            "more than the allowed 2 %",
        ),
        (
            {"model_bytes": 36_000_000},
            "case A0-int8, files: model_bytes rose from 35000000 to 36000000, "
            "more than the allowed 1 %",
        ),
        (
            {"float_db": 90.0},
            "case A0-int8, stage simplified: sqnr_db fell from 132.4 to 90.0, "
            "more than the allowed 1.0",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_regression_is_one_sentence(changes, sentence):
    """Case, stage, figure, both numbers, what is allowed; the other way round it is better."""
    found = against(result(), result(**changes))
    assert ([sentence], ()) == ([c.sentence for c in found.regressions], found.improvements)
    back = against(result(**changes), result())
    assert ((), 1) == (back.regressions, len(back.improvements))


@pytest.mark.parametrize(
    "changes",
    [
        {"sqnr_db": 36.4},
        {"top1_agreement": 0.99},
        {"top1": 0.97},
        {"plan_bytes": 10_150_000},
        {"model_bytes": 35_200_000},
        {"float_db": 112.0},
    ],
    ids=lambda value: next(iter(value)),
)
def test_within_the_margin_nothing_has_changed(changes):
    """Either way; above 100 dB there is only rounding."""
    assert Comparison() == against(result(), result(**changes))
    assert Comparison() == against(result(**changes), result())


@given(
    before=st.floats(0, 99), after=st.floats(0, 99), margin=st.floats(0, 20, allow_subnormal=False)
)
def test_a_figure_regresses_exactly_when_it_loses_more_than_the_margin(before, after, margin):
    """And never counts as both worse and better."""
    found = against(result(sqnr_db=before), result(sqnr_db=after), Margins(sqnr_db=margin))
    assert (before - after > margin + 1e-9) == bool(found.regressions)
    assert (after - before > margin + 1e-9) == bool(found.improvements)


def test_fp16_has_a_margin_of_its_own():
    """Arithmetic purely in half is 5 dB below what some CPUs give."""
    assert 6.0 == Margins().of("sqnr_db", "fp16")
    assert 1.0 == Margins().of("sqnr_db", "int8")


def test_a_figure_that_is_gone_is_a_regression_and_a_new_one_a_note():
    """An engine that was built and is not any more, and the other way round."""
    bare = CaseResult(
        name="A0-int8", status=Status.PASS, seconds=1.0, stages=result().stages,
        files=result().files,
    )  # fmt: skip
    gone = against(result(), bare)
    assert 4 == len(gone.regressions)
    assert (
        "case A0-int8, engine contents: int8_convolutions is not measured any more, it was 22"
        == gone.regressions[0].sentence
    )
    new = against(bare, result())
    assert ((), 4) == (new.regressions, len(new.improvements))
    assert new.improvements[0].sentence.endswith("int8_convolutions is 22 and not in the baseline")


def test_a_baseline_is_what_was_written(tmp_path):
    """Rounded to what means something, so a second run of the same figures changes nothing."""
    path = tmp_path / "new" / "baseline.json"
    write_baseline(path, [result(sqnr_db=37.25478)])
    assert 37.25 == read_baseline(path)["A0-int8"]["int8"]["sqnr_db"]
    assert Comparison() == compare(read_baseline(path), [result(sqnr_db=37.25478)], MARGINS)
    assert ["baseline.json"] == [file.name for file in path.parent.iterdir()]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory; --update-baseline writes it"),
        ("[]", "is not what --update-baseline writes"),
        ("{", "is not what --update-baseline writes"),
        ("[" * 100_000, "is not what --update-baseline writes: it is nested too deeply"),
        (
            '{"schema_version": 1, "cases": {"a": {"int8": {"top1": 1' + "0" * 400 + "}}}}",
            "is not what --update-baseline writes",
        ),
        ('{"schema_version": 2, "cases": {}}', "has schema version 2, expected 1"),
        (
            '{"schema_version": 1, "cases": {"a": {"int8": {"snr": 1}}}}',
            "has unknown figures: snr",
        ),
        (
            '{"schema_version": 1, "cases": {"a": {"int8": {"top1": "x"}}}}',
            "is not what --update-baseline writes",
        ),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path, content, sentence):
    """One sentence with the file's name."""
    path = tmp_path / "baseline.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as refusal:
        read_baseline(path)
    assert str(refusal.value).startswith(f"baseline {path} {sentence}")


def test_cases_that_only_one_side_has_are_refused_in_one_sentence(tmp_path):
    """Before anything is run."""
    baseline = {"A0-int8": {}, "old": {}}
    require_same_cases(baseline, ["old", "A0-int8"], tmp_path)
    with pytest.raises(InputError) as refusal:
        require_same_cases(baseline, ["A0-int8", "new"], tmp_path / "b.json")
    assert (
        f"baseline {tmp_path / 'b.json'} lacks new and has old, which the configuration does not: "
        "run with --update-baseline"
    ) == str(refusal.value)


def test_every_kind_of_figure_has_a_margin():
    """What a result measures can be compared."""
    kinds = {figure for figures in result().figures.values() for figure in figures}
    assert kinds <= set(KINDS)


def test_junit_has_a_suite_a_case_and_a_test_case_a_stage():
    """not_run is skipped with its reason, a regression fails its stage, an error is an error."""
    failed = CaseResult(
        name="fails", status=Status.FAIL, seconds=1.0, exit_code=1, message="int8: too low",
        stages=(row("onnx"), row("int8", "fail", reason="SQNR is 3.0 dB, required 25 dB")),
    )  # fmt: skip
    lost = CaseResult(
        name="lost", status=Status.ERROR, seconds=1.0, exit_code=2, message="bad \x1b image"
    )
    contract = CaseResult(
        name="contract", status=Status.FAIL, seconds=1.0, exit_code=1, message="not plain"
    )
    comparison = against(result(), result(sqnr_db=30.0, int8=20))
    root = ElementTree.fromstring(
        junit_xml([result(sqnr_db=30.0, int8=20), failed, lost, contract], comparison)
    )
    totals = tuple(root.get(key) for key in ("tests", "failures", "errors", "skipped"))
    assert ("9", "4", "1", "1") == totals
    suites = {suite.get("name"): suite for suite in root}
    cases = {case.get("name"): case for case in suites["A0-int8"]}
    assert ["simplified", "int8", "engine", "engine contents", "files"] == list(cases)
    assert "no driver" == cases["engine"].find("skipped").get("message")
    assert comparison.regressions[0].sentence == cases["int8"].find("failure").get("message")
    assert cases["engine contents"].find("failure") is not None
    assert cases["files"].find("failure") is None
    assert "SQNR is 3.0 dB, required 25 dB" == suites["fails"][1].find("failure").get("message")
    assert "bad ? image" == suites["lost"].find("testcase[@name='export']/error").get("message")
    assert suites["contract"].find("testcase[@name='export']/failure") is not None


def test_a_results_file_is_plain_json():
    """Every figure is there, by stage."""
    content = json.loads(json.dumps(result().to_json(), allow_nan=False))
    assert 37.3 == content["figures"]["int8"]["sqnr_db"]
    assert 35_000_000 == content["figures"]["files"]["model_bytes"]
