"""The ledger -> junit.xml for CI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree


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
        keys = ("max_abs", "sqnr_db", "cosine", "top1_agreement", "top1")
        figures.text = " ".join(f"{key}={row[key]}" for key in keys if row[key] is not None)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
