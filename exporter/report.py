"""Ledger and engine summary -> junit.xml for CI and report.html for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined

from exporter import bundle as files
from exporter.bundle import BundleWriter
from exporter.ledger import Ledger


def junit_xml(ledger: Ledger, suite: str) -> str:
    """One test case a stage; what did not run is ``skipped``, with the reason."""
    rows = ledger.to_json()["stages"]
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


def html(
    manifest: Mapping[str, Any],
    ledger: Ledger,
    engine: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> str:
    """One self-contained page."""
    environment = Environment(
        loader=PackageLoader("exporter", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "percent": _percent}
    template = environment.get_template("report.html.j2")
    return template.render(
        manifest=manifest,
        spec=manifest["spec"],
        parity=ledger.to_json(),
        engine=engine,
        seconds=seconds,
        command=_command(manifest["spec"]),
    )


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form % value


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.2f} %"


def write(
    writer: BundleWriter,
    manifest: Mapping[str, Any],
    ledger: Ledger,
    engine: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> None:
    """Add junit.xml and report.html to a bundle."""
    spec = manifest["spec"]
    suite = f"repvgg.{spec['variant'] or spec['name']}.{spec['precision']}"
    writer.write_text(files.JUNIT, junit_xml(ledger, suite))
    writer.write_text(files.REPORT, html(manifest, ledger, engine, seconds))


def _command(spec: Mapping[str, Any]) -> str:
    """The command line that makes this bundle again; options at their defaults are left out."""
    if spec["weights"] == "module":
        return f"exporter.export({spec['name']}(...), precision={spec['precision']!r}, ...)"
    words = ["repvgg-export", "engine", spec["variant"], "--precision", spec["precision"]]
    options = {
        "weights": "--weights",
        "calibration": "--calib",
        "calibration_table": "--calibration-table",
        "evaluation": "--evaluation",
        "target": "--target",
        "preprocess": "--preprocess",
        "with_preprocess": "--with-preprocess",
        "min_sqnr_db": "--min-sqnr",
        "min_agreement": "--min-agreement",
        "max_drop": "--max-drop",
        "batch": "--batch",
        "recipe": "--recipe",
        "dynamic_size": "--dynamic-size",
        "out": "--out",
    }
    for key, option in options.items():
        if spec[key] is not None:
            words += [option, f"'{spec[key]}'" if " " in str(spec[key]) else str(spec[key])]
    for key, value in spec.get("build", {}).items():
        option = f"--{key.replace('_', '-')}"
        words += ["--no-gpu-fallback"] if key == "gpu_fallback" else [option]
        words += [] if isinstance(value, bool) else [str(value)]
    if spec["image_size"] is not None:
        words += ["--image-size", "x".join(map(str, spec["image_size"]))]
    if spec["keep_float"]:
        words += ["--keep-float", ",".join(spec["keep_float"])]
    flags = ("skip_bad_images", "per_tensor_weights", "power_of_two")
    words += [f"--{flag.replace('_', '-')}" for flag in flags if spec[flag]]
    return " ".join(words)
