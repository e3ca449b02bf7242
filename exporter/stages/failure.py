"""What a run that failed a gate leaves behind: the report of the failure, beside OUT.

Nothing is published under OUT. ``OUT.failed.html`` shows what was measured until then, the layer at
fault first; ``OUT.failed.json`` has the same for programs: the error and the ledger. The next run
for the same OUT begins by removing both, so that they always belong to the last one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter import report
from exporter.bundle import dumps
from exporter.clock import StageClock
from exporter.draft import Draft
from exporter.errors import GateFailedError, InputError
from exporter.files.private_folder import private_folder, remove_dead
from exporter.parity.ledger import Ledger
from exporter.report import ReportContent
from exporter.spec import ExportSpec
from exporter.stages.publication import head


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a failed run has to tell: its part of the manifest, its notes, ledger and pictures."""

    document: Mapping[str, Any]
    notes: tuple[str, ...]
    ledger: Ledger
    pictures: Mapping[int, str]


@dataclass(slots=True)
class Scene:
    """What is known so far; filled by the run as it goes. ``tell`` is asked only after a failure.

    It may raise OSError or InputError, where images have vanished.
    """

    tell: Callable[[], Told] | None = None

    def show(self, draft: Draft) -> None:
        """Everything but the engine is made."""
        told = Told(
            document=draft.document,
            notes=draft.notes,
            ledger=draft.ledger,
            pictures=draft.pictures,
        )
        self.tell = lambda: told


def failure_paths(out: Path) -> tuple[Path, Path]:
    """The page and the JSON that a failed run for ``out`` leaves."""
    return out.parent / f"{out.name}.failed.html", out.parent / f"{out.name}.failed.json"


@contextmanager
def told_if_failed(spec: ExportSpec, clock: StageClock, out: Path) -> Iterator[Scene]:
    """Export into ``out``; if a gate fails after the network was loaded, write the two files.

    The error that comes out is the gate's own; its ``report`` is the page. A page that cannot be
    written, or whose images have vanished, changes nothing but that.
    """
    scene = Scene()
    remove_dead(out)
    for path in failure_paths(out):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    try:
        yield scene
    except GateFailedError as error:
        if scene.tell is not None:
            with contextlib.suppress(OSError, InputError):
                error.report = _write(spec, clock, out, scene.tell(), error)
        raise


def _write(
    spec: ExportSpec, clock: StageClock, out: Path, told: Told, error: GateFailedError
) -> Path:
    parity = dict(error.evidence or told.ledger.to_json(), verdict="fail")
    if error.localization is not None:
        parity["localization"] = error.localization
    document: dict[str, Any] = {
        **head(spec),
        **told.document,
        "model": None,
        "reparameterization": None,
        "notes": list(told.notes),
    }
    page, figures = failure_paths(out)
    content = ReportContent(
        manifest=document,
        parity=parity,
        seconds=clock.seconds,
        pictures=told.pictures,
        failure=str(error),
        failed_in=clock.running,
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    with private_folder(out) as folder:
        programs = dumps(_for_programs(document, parity, str(error), clock.running))
        for path, text in ((page, report.html(content)), (figures, programs)):
            (folder / path.name).write_text(text, "utf-8", "backslashreplace")
        for path in (page, figures):
            (folder / path.name).replace(path)
    return page


def _for_programs(
    document: Mapping[str, Any], parity: Mapping[str, Any], error: str, failed_in: str | None
) -> dict[str, Any]:
    return {"error": error, "failed_in": failed_in, "parity": parity, "inputs": document}
