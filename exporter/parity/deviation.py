"""Where a stage parts from the last good one, as parity.json of a failed run holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NO_LAYER = "no single layer deviates"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationError:
    """One operation given the good graph's inputs: its own SQNR, and what rounding explains.

    It ``deviates`` where the first is below ``limit_db``.
    """

    name: str
    operator: str
    sqnr_db: float
    explained_db: float
    limit_db: float

    @property
    def deviates(self) -> bool:
        """Whether its error is no rounding."""
        return self.sqnr_db < self.limit_db


@dataclass(frozen=True, slots=True, kw_only=True)
class Localization:
    """All operations that both graphs have, in order; ``reference`` is the last good stage."""

    stage: str
    reference: str
    images: int
    rule: str
    rows: tuple[OperationError, ...]

    @property
    def first(self) -> OperationError | None:
        """The first one that deviates, None if none does."""
        return next((row for row in self.rows if row.deviates), None)

    @property
    def sentence(self) -> str:
        """One clause for the error."""
        first = self.first
        what = f"the first layer that deviates is {first.name}" if first else NO_LAYER
        return f"{what}: {self.detail}"

    @property
    def detail(self) -> str:
        """The figures of it."""
        first = self.first
        if first is not None:
            return (
                f"its own error is {first.sqnr_db:.1f} dB below its result, where rounding "
                f"explains {first.explained_db:.0f} dB"
            )
        if not self.rows:
            return "none could be compared"
        worst = min(self.rows, key=lambda row: row.sqnr_db)
        return (
            f"the errors of {len(self.rows)} add up, the largest is {worst.name}'s, "
            f"{worst.sqnr_db:.1f} dB below its result"
        )

    def to_json(self) -> dict[str, Any]:
        """As parity.json of a failed run holds it, under ``localization``."""
        first = self.first
        return {
            "stage": self.stage,
            "reference": self.reference,
            "layer": first.name if first else None,
            "sentence": self.sentence,
            "detail": self.detail,
            "rule": self.rule,
            "images": self.images,
            "rows": [{**asdict(row), "deviates": row.deviates} for row in self.rows],
        }
