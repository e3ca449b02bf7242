"""From a builder's nested phases to one fraction that never goes back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class _Phase:
    name: str
    steps: int
    done: int = 0


class PhaseTracker:
    """Adds up nested phases: a phase counts as one step of the phase it runs in.

    Builders announce phases that repeat, end early or are never announced as finished; the fraction
    stays within 0..1 and grows monotonically whatever they do.
    """

    def __init__(self) -> None:
        self._open: list[_Phase] = []
        self._fraction = 0.0

    @property
    def fraction(self) -> float:
        """Done so far, 0 to 1."""
        inner = 0.0
        for phase in reversed(self._open):
            inner = min(1.0, (phase.done + inner) / phase.steps)
        self._fraction = max(self._fraction, inner)
        return self._fraction

    def start(self, name: str, steps: int) -> None:
        """A phase of ``steps`` steps begins inside the one that is open."""
        self._open.append(_Phase(name=name, steps=max(1, steps)))

    def step(self, name: str, step: int) -> None:
        """Step number ``step``, from 0, of an open phase is complete; others are ignored."""
        for phase in reversed(self._open):
            if phase.name == name:
                phase.done = min(phase.steps, max(phase.done, step + 1))
                return

    def finish(self, name: str) -> None:
        """A phase ends, and with it those still open inside it; others are ignored."""
        names = [phase.name for phase in self._open]
        if name in names:
            last = len(names) - 1 - names[::-1].index(name)
            self._open[last].done = self._open[last].steps
            _ = self.fraction
            del self._open[last:]
