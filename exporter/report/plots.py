"""Scales and coordinates of the plots; the templates draw them as SVG and as bars.

A :class:`Scale` maps figures to percent of an axis' length, linearly or by their logarithm::

    place(v) = 100 (f(v) - f(low)) / (f(high) - f(low)),   f = id or log10

so that bars and strips grow with the page. The SVG curve has user units (:class:`Curve`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """From ``low`` to ``high``, with round ``ticks`` between them."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0 to 100; what lies outside is put to the nearer end."""
        if self.logarithmic:
            value = math.log10(max(value, self.low))
            low, high = math.log10(self.low), math.log10(self.high)
        else:
            low, high = self.low, self.high
        return round(100 * min(1.0, max(0.0, (value - low) / (high - low))), 2)


def linear(values: Iterable[float], *, from_zero: bool = True, ticks: int = 5) -> Scale:
    """Round ends around finite ``values``, about ``ticks`` steps."""
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(found), max(found)
    low = min(0.0, low) if from_zero else low
    size = max(abs(low), abs(high), 1.0)
    # Values that differ by less than can be seen are one.
    span = high - low if high - low > 1e-6 * size else size
    rough = span / ticks
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(s * magnitude for s in _STEPS if s * magnitude >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    marks = tuple(round(index * step, 10) for index in range(first, last + 1))
    return Scale(low=marks[0], high=marks[-1], ticks=marks)


def logarithmic(values: Iterable[float], *, most_ticks: int = 6) -> Scale:
    """Whole decades around the positive ones of ``values``."""
    found = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    high = max(high, low + 1)
    step = -(-(high - low) // most_ticks)
    marks = tuple(10.0**power for power in range(low, high + 1, step))
    return Scale(low=10.0**low, high=10.0**high, ticks=marks, logarithmic=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point of a curve in user units; ``text`` is what a pointer over it shows."""

    x: float
    y: float
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line plot: a predicted line, measured dots, the chosen one, the wanted height.

    ``ticks`` are (position, label) along each axis.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    line: tuple[Dot, ...]
    measured: tuple[Dot, ...]
    chosen: Dot | None
    wanted_y: float | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]

    @property
    def path(self) -> str:
        """The line as SVG path data."""
        return " ".join(
            f"{'L' if index else 'M'}{dot.x:g} {dot.y:g}" for index, dot in enumerate(self.line)
        )


def curve(
    line: Sequence[tuple[float, float, str]],
    measured: Sequence[tuple[float, float, str]],
    *,
    chosen: tuple[float, float] | None,
    wanted: float | None,
    width: int = 640,
    height: int = 300,
) -> Curve:
    """Points are (x, y, text); the x axis begins at 0 and counts things."""
    left, right, top, bottom, inset = 52, 16, 16, 44, 16
    heights = [y for _, y, _ in (*line, *measured)] + ([wanted] if wanted is not None else [])
    across = linear([x for x, _, _ in (*line, *measured)], ticks=8)
    up = linear(heights, from_zero=False, ticks=5)

    def x_of(value: float) -> float:
        return round(left + inset + (width - left - right - inset) * across.place(value) / 100, 1)

    def y_of(value: float) -> float:
        return round(height - bottom - (height - top - bottom) * up.place(value) / 100, 1)

    return Curve(
        width=width,
        height=height,
        left=left,
        right=width - right,
        top=top,
        bottom=height - bottom,
        line=tuple(Dot(x=x_of(x), y=y_of(y), text=text) for x, y, text in line),
        measured=tuple(Dot(x=x_of(x), y=y_of(y), text=text) for x, y, text in measured),
        chosen=Dot(x=x_of(chosen[0]), y=y_of(chosen[1])) if chosen else None,
        wanted_y=None if wanted is None else y_of(wanted),
        x_ticks=tuple((x_of(tick), f"{tick:g}") for tick in across.ticks if tick == int(tick)),
        y_ticks=tuple((y_of(tick), f"{tick:g}") for tick in up.ticks),
    )
