"""One table of a result, as Markdown and as text."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as they are printed, and what to know about them."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        note = textwrap.fill(self.note, 100, break_long_words=False, break_on_hyphens=False)
        return f"## {self.title}\n\n{note}\n\n{body}\n"

    def text(self) -> str:
        columns = list(zip(self.header, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
            for cells in (self.header, *self.rows)
        ]
        return "\n".join([self.title, *lines]) + "\n"
