"""One case: a full export, and what came of it, whatever came of it."""

from __future__ import annotations

import time
from pathlib import Path

from exporter.bundle import MANIFEST
from exporter.cases.case_result import CaseResult, Status
from exporter.clock import Progress
from exporter.errors import ExporterError, GateFailedError
from exporter.request import ExportRequest, validate
from exporter.running.spread import Spread
from exporter.stage_cache import StageStore


def run_case(
    name: str,
    request: ExportRequest,
    progress: Progress,
    *,
    cache: StageStore | None = None,
    out: Path | None = None,
    spread: Spread | None = None,
) -> CaseResult:
    """Export as ``request`` asks. A failed gate or an error becomes the result.

    The bundle goes to ``out`` in place of the request's own, which the manifest still names;
    ``spread`` helps to look at images.
    """
    # It loads torch and onnx, which nobody needs before a configuration is known to be right.
    from exporter import pipeline

    start = time.perf_counter()
    try:
        result = pipeline.run(validate(request), progress, cache=cache, out=out, spread=spread)
    except ExporterError as error:
        failed = isinstance(error, GateFailedError)
        evidence = (error.evidence if isinstance(error, GateFailedError) else None) or {}
        return CaseResult(
            name=name,
            status=Status.FAIL if failed else Status.ERROR,
            seconds=time.perf_counter() - start,
            exit_code=error.exit_code,
            message=str(error),
            stages=tuple(evidence.get("stages", ())),
        )
    bundle = result.bundle
    sizes = {file: entry["bytes"] for file, entry in bundle.manifest["files"].items()}
    return CaseResult(
        name=name,
        status=Status.PASS,
        seconds=time.perf_counter() - start,
        stages=tuple(result.ledger.to_json()["stages"]),
        engine=result.engine,
        files={**sizes, MANIFEST: (bundle.path / MANIFEST).stat().st_size},
        notes=result.notes,
        reused=tuple(use.stage for use in result.stages if use.reused),
    )
