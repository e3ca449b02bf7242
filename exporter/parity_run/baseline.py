"""The figures of an earlier run as a committed file, and what has changed since.

The file is ``{"schema_version": 1, "cases": {NAME: {STAGE: {FIGURE: number}}}}``. A figure that the
baseline has and the run does not has regressed: it is not measured any more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.cases.case_result import CaseResult, Figures
from exporter.errors import InputError
from exporter.files.text_file import read_json
from exporter.files.whole_file import write_whole
from exporter.parity_run.margins import KINDS, ROUNDING_DB, Margins

SCHEMA_VERSION = 1
_LESS_IS_BETTER = ("other_kernels", "plan_bytes", "model_bytes")
_RELATIVE = ("plan_bytes", "model_bytes")
_DIGITS = {"sqnr_db": 2, "top1_agreement": 6, "top1": 6}

Baseline = Mapping[str, Figures]
"""Figures by the name of the case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One figure beyond its margin."""

    case: str
    stage: str
    sentence: str
    is_worse: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that moved beyond its margin, for the worse and for the better.

    What the run measures and the baseline lacks is among the improvements.
    """

    regressions: tuple[Change, ...] = ()
    improvements: tuple[Change, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The sentences."""
        return {
            "regressions": [change.sentence for change in self.regressions],
            "improvements": [change.sentence for change in self.improvements],
        }


def read_baseline(path: Path) -> Baseline:
    """The figures in ``path``.

    Raises:
        InputError: if it cannot be read or is no baseline of this version.
    """
    try:
        content = read_json(path)
        version, cases = content["schema_version"], content["cases"]
        baseline = {
            str(name): {
                str(stage): {str(key): float(value) for key, value in figures.items()}
                for stage, figures in stages.items()
            }
            for name, stages in cases.items()
        }
    except OSError as error:
        raise InputError(
            f"baseline {path} cannot be read: {error.strerror}; --update-baseline writes it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"baseline {path} is not what --update-baseline writes: {error or type(error).__name__}"
        ) from error
    strange = {
        figure
        for stages in baseline.values()
        for figures in stages.values()
        for figure in figures
        if figure not in KINDS
    }
    if strange:
        raise InputError(f"baseline {path} has unknown figures: {', '.join(sorted(strange))}")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"baseline {path} has schema version {version}, expected {SCHEMA_VERSION}: "
            "--update-baseline writes it anew"
        )
    return baseline


def write_baseline(path: Path, results: Sequence[CaseResult]) -> None:
    """Write the figures of ``results`` in one step, rounded to what means something.

    Raises:
        InputError: if ``path`` cannot be written.
    """
    cases = {
        result.name: {
            stage: {key: round(value, _DIGITS.get(key, 0)) for key, value in values.items()}
            for stage, values in result.figures.items()
        }
        for result in results
    }
    text = json.dumps({"schema_version": SCHEMA_VERSION, "cases": cases}, indent=2) + "\n"
    write_whole(path, text)


def require_same_cases(baseline: Baseline, names: Iterable[str], path: Path) -> None:
    """Return only if the baseline has exactly the cases of the configuration.

    Raises:
        InputError: naming what either lacks.
    """
    wanted = list(names)
    missing = [name for name in wanted if name not in baseline]
    left_over = [name for name in baseline if name not in wanted]
    words = []
    if missing:
        words.append(f"lacks {', '.join(missing)}")
    if left_over:
        words.append(f"has {', '.join(left_over)}, which the configuration does not")
    if words:
        raise InputError(f"baseline {path} {' and '.join(words)}: run with --update-baseline")


def compare(
    baseline: Baseline, results: Sequence[CaseResult], margins: Mapping[str, Margins]
) -> Comparison:
    """Hold each case that ran to its end against its baseline, by the margins of its name.

    A case that failed or could not run says so itself.
    """
    changes = [
        change
        for result in results
        if result.files
        for key, before, after in _pairs(baseline[result.name], result.figures)
        if (change := _change(result.name, key, before, after, margins[result.name])) is not None
    ]
    return Comparison(
        regressions=tuple(change for change in changes if change.is_worse),
        improvements=tuple(change for change in changes if not change.is_worse),
    )


def _pairs(
    before: Figures, after: Figures
) -> Iterator[tuple[tuple[str, str], float | None, float | None]]:
    """Every figure of either, by stage and name, in the order of ``before``."""
    for stage in dict.fromkeys((*before, *after)):
        old, new = before.get(stage, {}), after.get(stage, {})
        for figure in dict.fromkeys((*old, *new)):
            yield (stage, figure), old.get(figure), new.get(figure)


def _change(
    case: str, key: tuple[str, str], before: float | None, after: float | None, margins: Margins
) -> Change | None:
    """None within the margin."""
    stage, figure = key
    where = f"case {case}, {_place(stage)}: {figure}"

    def change(words: str, *, is_worse: bool) -> Change:
        sentence = f"{where} {words}"
        return Change(case=case, stage=stage, sentence=sentence, is_worse=is_worse)

    if after is None:
        was = _number(figure, before or 0)
        return change(f"is not measured any more, it was {was}", is_worse=True)
    if before is None:
        return change(f"is {_number(figure, after)} and not in the baseline", is_worse=False)
    margin = margins.of(figure, stage)
    delta = _delta(figure, before, after)
    allowed = margin * abs(before) if figure in _RELATIVE else margin
    # Decimal figures of a file and of a run differ in their last binary digit.
    if abs(delta) <= allowed + 1e-9:
        return None
    words = f"{100 * margin:g} %" if figure in _RELATIVE else f"{margin:g}"
    return change(
        f"{'rose' if after > before else 'fell'} from {_number(figure, before)} to "
        f"{_number(figure, after)}, more than the allowed "
        f"{f'{margin:.1f}' if figure == 'sqnr_db' else words}",
        is_worse=(delta > 0) == (figure in _LESS_IS_BETTER),
    )


def _delta(figure: str, before: float, after: float) -> float:
    if figure == "sqnr_db":
        return min(after, ROUNDING_DB) - min(before, ROUNDING_DB)
    return after - before


def _place(stage: str) -> str:
    return stage if " " in stage or stage == "files" else f"stage {stage}"


def _number(figure: str, value: float) -> str:
    if figure == "sqnr_db":
        return f"{value:.1f}"
    return f"{value:.4f}" if figure in ("top1", "top1_agreement") else f"{value:.0f}"
