"""How a draft and an engine become the files of an entry, and come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from exporter import bundle as files
from exporter.draft import Draft
from exporter.engine import BuiltEngine
from exporter.engine.summary import EngineSummary
from exporter.stage_cache.values import read_value, write_value

_DRAFT = "draft.json"
_SUMMARY = "summary.json"


def save_draft(folder: Path) -> Callable[[Draft, Path], Iterator[Path]]:
    """What saves a draft whose files lie in ``folder``."""

    def save(draft: Draft, temporary: Path) -> Iterator[Path]:
        yield write_value(temporary / _DRAFT, draft)
        yield from (path for path in sorted(folder.iterdir()) if path.is_file())

    return save


def load_draft(folder: Path) -> Draft:
    """A draft whose files stay in ``folder``."""
    draft = read_value(folder / _DRAFT, Draft)
    (folder / _DRAFT).unlink()
    return draft


def save_engine(engine: BuiltEngine, temporary: Path) -> Iterator[Path]:
    """Plan, build log and summary."""
    yield write_value(temporary / _SUMMARY, engine.summary)
    plan, log = temporary / files.ENGINE, temporary / files.BUILD_LOG
    plan.write_bytes(engine.plan)
    yield plan
    log.write_bytes(engine.build_log.encode())
    yield log


def load_engine(folder: Path) -> BuiltEngine:
    """An engine; its files are removed, because who publishes it writes them."""
    paths = [folder / name for name in (files.ENGINE, files.BUILD_LOG, _SUMMARY)]
    plan, log, summary = paths
    engine = BuiltEngine(
        plan=plan.read_bytes(),
        build_log=log.read_bytes().decode(),
        summary=read_value(summary, EngineSummary),
    )
    for path in paths:
        path.unlink()
    return engine
