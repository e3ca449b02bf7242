"""Figures as people read them: units behind a no-break space, a dash for what was not measured.

A true minus sign stands before negative figures, and powers of ten are written out.
"""

from __future__ import annotations

import math

NONE = "–"
_GAP = "\u00a0"
_MINUS = "\u2212"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BYTES = ("B", "kB", "MB", "GB")


def decibel(value: float | None) -> str:
    """``37.3 dB``; ``exact`` at the 200 dB that stand for equal bits."""
    if value is not None and value >= 200:
        return "exact"
    return NONE if value is None else _signed(f"{value:.1f}{_GAP}dB")


def percent(fraction: float | None) -> str:
    """``98.89 %`` of a fraction."""
    return NONE if fraction is None else _signed(f"{100 * fraction:.2f}{_GAP}%")


def points(before: float | None, after: float | None) -> str:
    """The change between two fractions: ``−0.28 points``, ``unchanged``."""
    if before is None or after is None:
        return NONE
    change = 100 * (after - before)
    if abs(change) < 0.005:
        return "unchanged"
    return f"{'+' if change > 0 else _MINUS}{abs(change):.2f}{_GAP}points"


def significant(value: float | None, digits: int = 3) -> str:
    """``0.113``, ``1.43 × 10⁻⁶``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return _signed(f"{value:.{digits}g}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    power = str(int(exponent)).translate(_SUPERSCRIPTS)
    return _signed(f"{mantissa}{_GAP}×{_GAP}10{power}")


def cosine(value: float | None) -> str:
    """Six decimals, the resolution in which stages differ."""
    return NONE if value is None else _signed(f"{value:.6f}")


def seconds(value: float | None) -> str:
    """``0.21 s``, ``8.1 s``."""
    if value is None:
        return NONE
    return f"{value:.1f}{_GAP}s" if value >= 1 else f"{value:.2f}{_GAP}s"


def size(count: float | None) -> str:
    """``10.3 MB``; steps of 1000."""
    if count is None:
        return NONE
    step = 0
    while count >= 1000 and step < len(_BYTES) - 1:
        count, step = count / 1000, step + 1
    return f"{count:.0f}{_GAP}B" if step == 0 else f"{count:.1f}{_GAP}{_BYTES[step]}"


def times(value: float | None) -> str:
    """A ratio: ``×12.4``, ``×2.00``."""
    return NONE if value is None else f"×{value:.2f}" if value < 10 else f"×{value:.3g}"


def capitalized(text: str) -> str:
    """A clause as the start of a sentence; the rest stays as it is."""
    return f"{text[:1].upper()}{text[1:]}"


def _signed(text: str) -> str:
    return text.replace("-", _MINUS, 1) if text.startswith("-") else text
