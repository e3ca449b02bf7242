"""What a report is made from: the documents of a bundle, or what a failed run has of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContent:
    """``manifest``, ``parity`` and ``engine`` are as manifest.json, parity.json and engine.json.

    A run that failed has no ``engine``, and of the manifest what went in; ``failure`` is its error,
    ``failed_in`` the stage that it ended in.
    ``seconds`` is the time of each stage, None where it is not told, ``files`` the bytes of each
    file of the bundle, and ``pictures`` holds a data URI for the index of an image.
    """

    manifest: Mapping[str, Any]
    parity: Mapping[str, Any]
    engine: Mapping[str, Any] | None = None
    seconds: Mapping[str, float | None] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    pictures: Mapping[int, str] = field(default_factory=dict)
    failure: str | None = None
    failed_in: str | None = None

    @property
    def precision(self) -> str:
        """``int8`` and so on, the name of its row in the ledger too."""
        return str(self.manifest["spec"]["precision"])

    def row(self, stage: str) -> Mapping[str, Any] | None:
        """A row of the ledger."""
        return next((row for row in self.parity["stages"] if row["stage"] == stage), None)

    @property
    def last_row(self) -> Mapping[str, Any] | None:
        """The row that speaks for the result: the last one that was compared."""
        compared = [row for row in self.parity["stages"] if row["max_abs"] is not None]
        return compared[-1] if compared else None
