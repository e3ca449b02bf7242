"""The ledger -> junit.xml for CI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

FIGURES = ("max_abs", "sqnr_db", "cosine", "top1_agreement", "top1")
"""The keys of a row of parity.json that a test case shows."""


def junit_xml(parity: Mapping[str, Any], suite: str) -> str:
    """One test case a stage of parity.json; what did not run is ``skipped``, with the reason."""
    rows = parity["stages"]
    statuses = [row["status"] for row in rows]
    root = ElementTree.Element(
        "testsuite",
        name=suite,
        tests=str(len(rows)),
        failures=str(statuses.count("fail")),
        skipped=str(statuses.count("not_run")),
    )
    for row in rows:
        case = ElementTree.SubElement(root, "testcase", classname=suite, name=row["stage"])
        if row["status"] == "fail":
            ElementTree.SubElement(case, "failure", message=row["reason"] or "failed")
        elif row["status"] == "not_run":
            ElementTree.SubElement(case, "skipped", message=row["reason"] or "not run")
        figures = ElementTree.SubElement(case, "system-out")
        figures.text = words({key: row[key] for key in FIGURES})
    return document(root)


def words(figures: Mapping[str, Any]) -> str:
    """``sqnr_db=37.3 cosine=0.9999``; what is None is left out."""
    return " ".join(f"{key}={value}" for key, value in figures.items() if value is not None)


def document(root: ElementTree.Element) -> str:
    """The XML text, indented, with its declaration."""
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
