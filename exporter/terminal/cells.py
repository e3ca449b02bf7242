"""Figures in the cells of a table; what was not measured leaves its cell empty."""

from __future__ import annotations


def figure(value: float | None, form: str) -> str:
    """``value`` by a format such as ``{:.1f}``."""
    return "" if value is None else form.format(value)


def percent(fraction: float | None) -> str:
    """``98.89 %`` of a fraction."""
    return "" if fraction is None else f"{100 * fraction:.2f} %"
