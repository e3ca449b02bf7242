"""From a draft and its engine to a published bundle: the last files, the manifest, the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter import bundle as files
from exporter import report
from exporter.bundle import Bundle
from exporter.bundle.sbom import sbom
from exporter.bundle.writer import BundleWriter
from exporter.draft import Draft
from exporter.parity.ledger import Ledger
from exporter.plan.engine import EngineOutcome
from exporter.provenance import created, recorded_seconds, versions
from exporter.report import ReportContent
from exporter.spec import ExportSpec


def head(spec: ExportSpec) -> dict[str, Any]:
    """The manifest's part that every run has, whatever becomes of it."""
    return {"created": created(), "versions": versions(), "spec": spec.to_json()}


def publish(
    writer: BundleWriter,
    spec: ExportSpec,
    draft: Draft,
    ledger: Ledger,
    engine: EngineOutcome,
    *,
    half_scales: bool,
    seconds: Mapping[str, float],
) -> Bundle:
    """Complete the bundle whose draft lies in ``writer``'s folder, and move it into place.

    ``ledger`` is the draft's with the engine's row. ``seconds`` is what each stage took.

    Raises:
        InputError: if the destination cannot be written.
    """
    writer.write_text(files.ENGINE_SUMMARY, files.dumps(engine.to_json()))
    if engine.built is not None:
        writer.path(files.ENGINE).write_bytes(engine.built.plan)
        writer.write_text(files.BUILD_LOG, engine.built.build_log)
    parity = ledger.to_json()
    writer.write_text(files.PARITY, files.dumps(parity))
    manifest = {
        **head(spec),
        **draft.document,
        "targets": list(engine.targets),
        "half_scales": half_scales,
        "notes": [*draft.notes, *engine.notes],
    }
    writer.write_text(files.SBOM, sbom(manifest["created"]))
    network = manifest["spec"]["variant"] or manifest["spec"]["name"]
    suite = f"repvgg.{network}.{spec.precision}"
    writer.write_text(files.JUNIT, report.junit_xml(parity, suite))
    content = ReportContent(
        manifest=manifest,
        parity=parity,
        engine=engine.to_json(),
        seconds={name: recorded_seconds(taken) for name, taken in seconds.items()},
        files=writer.sizes(),
        pictures=draft.pictures,
    )
    writer.write_text(files.REPORT, report.html(content))
    return writer.publish(manifest)
