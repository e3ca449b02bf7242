"""What the data-set linter tells: findings for people, figures for the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from calibration.image_statistics import Triple

Level = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: its code, how bad it is, and a sentence with figures and advice.

    An ``error`` makes calibration meaningless; a ``warning`` probably costs accuracy.
    """

    code: str
    level: Level
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was counted. None stands for what these data cannot tell.

    ``usable`` images are finite, distinct and not blank. ``tiny`` and ``cropped`` count files by
    their size. ``grayscale``, ``white`` and ``black`` (mean shares of values at 255 and 0) and the
    rest are of the usable ones. ``mean`` and ``std`` are of the channels on the [0, 1] scale,
    ``input_mean`` and ``input_std`` after preprocessing; ``low`` and ``high`` the extremes there.
    """

    images: int
    usable: int
    duplicates: int
    constant: int
    not_finite: int
    low: float
    high: float
    tiny: int | None = None
    cropped: int | None = None
    grayscale: int | None = None
    white: float | None = None
    black: float | None = None
    classes: int | None = None
    smallest_class: int | None = None
    largest_class: int | None = None
    mean: Triple | None = None
    std: Triple | None = None
    input_mean: Triple | None = None
    input_std: Triple | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """The findings, errors first, and the figures behind them."""

    findings: tuple[Finding, ...]
    figures: Figures

    @classmethod
    def of(cls, findings: Iterable[Finding], figures: Figures) -> DataReport:
        """Put the errors first; otherwise the order is kept."""
        ordered = sorted(findings, key=lambda finding: finding.level != "error")
        return cls(findings=tuple(ordered), figures=figures)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What makes calibration meaningless."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What probably costs accuracy."""
        return tuple(finding for finding in self.findings if finding.level == "warning")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        figures = asdict(self.figures)
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "figures": {k: list(v) if isinstance(v, tuple) else v for k, v in figures.items()},
        }
