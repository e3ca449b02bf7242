"""What a run that failed a gate leaves behind: the report of the failure, beside OUT.

Nothing is published under OUT. ``OUT.failed.html`` shows what was measured until then, the layer at
fault first; ``OUT.failed.json`` has the same for programs: the error and the ledger. The next run
for the same OUT begins by removing both, so that they always belong to the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from exporter import report
from exporter.bundle import dumps
from exporter.errors import GateFailedError, InputError
from exporter.evidence import pictures, what_went_in
from exporter.inputs import Inputs
from exporter.judge import Judge
from exporter.private_folder import private_folder, remove_dead
from exporter.report import ReportContent
from exporter.spec import ExportSpec


class StageClock(Protocol):
    """The time of each stage that ended, and the stage that runs."""

    @property
    def seconds(self) -> dict[str, float]: ...

    @property
    def running(self) -> str | None: ...


@dataclass(slots=True)
class Scene:
    """What is known so far; filled by the run as it goes."""

    inputs: Inputs | None = None
    judge: Judge | None = None


def failure_paths(out: Path) -> tuple[Path, Path]:
    """The page and the JSON that a failed run for ``out`` leaves."""
    return out.parent / f"{out.name}.failed.html", out.parent / f"{out.name}.failed.json"


@contextmanager
def told_if_failed(spec: ExportSpec, clock: StageClock) -> Iterator[Scene]:
    """Run an export; if a gate fails after the network was loaded, write the two files.

    The error that comes out is the gate's own; its ``report`` is the page. A page that cannot be
    written, or whose images have vanished, changes nothing but that.
    """
    scene = Scene()
    remove_dead(spec.out)
    for path in failure_paths(spec.out):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    try:
        yield scene
    except GateFailedError as error:
        if scene.inputs is not None and scene.judge is not None:
            with contextlib.suppress(OSError, InputError):
                error.report = _write(spec, clock, scene.inputs, scene.judge, error)
        raise


def _write(
    spec: ExportSpec, clock: StageClock, inputs: Inputs, judge: Judge, error: GateFailedError
) -> Path:
    parity = dict(error.evidence or judge.ledger.to_json(), verdict="fail")
    if error.localization is not None:
        parity["localization"] = error.localization
    document: dict[str, Any] = {
        **what_went_in(spec, inputs),
        "model": None,
        "reparameterization": None,
        "notes": list(inputs.source.notes + inputs.notes + judge.notes),
    }
    page, figures = failure_paths(spec.out)
    content = ReportContent(
        manifest=document,
        parity=parity,
        seconds=clock.seconds,
        pictures=pictures(inputs, judge),
        failure=str(error),
        failed_in=clock.running,
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(spec.out) as folder:
        told = dumps(_for_programs(document, parity, str(error), clock.running))
        for path, text in ((page, report.html(content)), (figures, told)):
            (folder / path.name).write_text(text, "utf-8", "backslashreplace")
        for path in (page, figures):
            (folder / path.name).replace(path)
    return page


def _for_programs(
    document: Mapping[str, Any], parity: Mapping[str, Any], error: str, failed_in: str | None
) -> dict[str, Any]:
    return {"error": error, "failed_in": failed_in, "parity": parity, "inputs": document}
