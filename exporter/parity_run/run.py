"""One case: a full export into its folder, and what came of it, whatever came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from exporter.bundle import MANIFEST
from exporter.errors import ExporterError, GateFailedError
from exporter.parity_run.case_result import CaseResult, Status
from exporter.parity_run.config import Case
from exporter.request import validate

Progress = Callable[[str, float], None]


def run_case(case: Case, folder: Path, progress: Progress) -> CaseResult:
    """Export into ``folder / case.name``. A failed gate or an error becomes the result."""
    # It loads torch and onnx, which nobody needs before a configuration is known to be right.
    from exporter import pipeline

    start = time.perf_counter()
    try:
        spec = validate(replace(case.request, out=str(folder / case.name)))
        result = pipeline.run(spec, lambda stage, done: progress(f"{case.name} {stage}", done))
    except ExporterError as error:
        failed = isinstance(error, GateFailedError)
        evidence = (error.evidence if isinstance(error, GateFailedError) else None) or {}
        return CaseResult(
            name=case.name,
            status=Status.FAIL if failed else Status.ERROR,
            seconds=time.perf_counter() - start,
            exit_code=error.exit_code,
            message=str(error),
            stages=tuple(evidence.get("stages", ())),
        )
    bundle = result.bundle
    sizes = {name: entry["bytes"] for name, entry in bundle.manifest["files"].items()}
    return CaseResult(
        name=case.name,
        status=Status.PASS,
        seconds=time.perf_counter() - start,
        stages=tuple(result.ledger.to_json()["stages"]),
        engine=result.engine,
        files={**sizes, MANIFEST: (bundle.path / MANIFEST).stat().st_size},
        notes=result.notes,
    )
