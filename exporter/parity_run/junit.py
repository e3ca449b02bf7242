"""The results as JUnit XML, as CI systems read it.

One test suite a case, one test case a stage; what did not run is ``skipped`` with the reason.
``engine contents`` and ``files`` are two test cases more where there are figures of them. Figures
that regressed fail the test case of their stage. A failure that belongs to no stage, and whatever
kept a case from running, is the test case ``export``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from exporter.cases.case_result import CaseResult, Status
from exporter.parity_run.baseline import Comparison
from exporter.report.junit import FIGURES, document, words

EXPORT = "export"


def junit_xml(results: Sequence[CaseResult], comparison: Comparison) -> str:
    """The whole document, with totals."""
    suites = [_suite(result, comparison) for result in results]
    root = ElementTree.Element("testsuites", name="repvgg-export parity")
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in suites)))
    root.extend(suites)
    return document(root)


def _suite(result: CaseResult, comparison: Comparison) -> ElementTree.Element:
    suite = ElementTree.Element("testsuite", name=result.name, time=f"{result.seconds:.1f}")
    sentences: dict[str, list[str]] = {}
    for change in comparison.regressions:
        if change.case == result.name:
            sentences.setdefault(change.stage, []).append(change.sentence)
    rows = {str(row["stage"]): row for row in result.stages}
    places = dict.fromkeys((*rows, *result.figures, *sentences))
    for place in places:
        _test_case(suite, result, place, rows.get(place), sentences.get(place, []))
    failed = any(row["status"] == "fail" for row in result.stages)
    if result.status is not Status.PASS and not failed:
        kind = "failure" if result.status is Status.FAIL else "error"
        case = ElementTree.SubElement(suite, "testcase", classname=result.name, name=EXPORT)
        ElementTree.SubElement(case, kind, message=_xml_text(result.message or "no message"))
    suite.set("tests", str(len(suite.findall("testcase"))))
    for key, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(key, str(len(suite.findall(f"testcase/{tag}"))))
    return suite


def _test_case(
    suite: ElementTree.Element,
    result: CaseResult,
    place: str,
    row: Mapping[str, Any] | None,
    regressions: Sequence[str],
) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=result.name, name=place)
    reasons = list(regressions)
    if row is not None and row["status"] == "fail":
        reasons.insert(0, row["reason"] or "failed")
    if reasons:
        ElementTree.SubElement(case, "failure", message=_xml_text("; ".join(reasons)))
    elif row is not None and row["status"] == "not_run":
        ElementTree.SubElement(case, "skipped", message=_xml_text(row["reason"] or "not run"))
    figures = result.figures.get(place, {}) if row is None else {key: row[key] for key in FIGURES}
    if text := words(figures):
        ElementTree.SubElement(case, "system-out").text = text


def _xml_text(text: str) -> str:
    """Without the control characters that XML 1.0 has no way to write."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
