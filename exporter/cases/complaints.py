"""What is wrong in a configuration, each with its place, none twice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Complaints:
    """Gathers sentences ``TABLE, KEY: what is wrong``."""

    all: list[str] = field(default_factory=list)

    def add(self, table: str, key: str, words: str) -> None:
        """One complaint; several keys are given as one text."""
        self.add_at([f"{table}, {key}"], words)

    def add_unknown(self, table: str, key: str, known: Iterable[str]) -> None:
        """A key that is none of ``known``, with the nearest of them."""
        self.add(table, key, f"unknown{_nearest(key, known)}")

    def add_at(self, places: Iterable[str], words: str) -> None:
        """One complaint that several places share."""
        sentence = f"{' and '.join(dict.fromkeys(places))}: {words}"
        if sentence not in self.all:
            self.all.append(sentence)


def _nearest(word: str, known: Iterable[str]) -> str:
    """`` (nearest: x; known: x, y)``, without the list where it is long."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    parts = [f"nearest: {near[0]}"] if near else []
    parts += [f"known: {', '.join(names)}"] if len(names) <= 10 or not near else []
    return f" ({'; '.join(parts)})"
