"""Figures of single layers, as parity.json holds them under ``layers``.

``sqnr_db`` compares what a layer delivers, behind its ReLU where it has one, in two graphs that got
the same images: it has the errors of all layers before it in it. ``own_sqnr_db`` compares what it
makes of the *same* inputs: its own error alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSpread:
    """The largest |value| of each channel: of the smallest, the median and the largest channel.

    Channels that are always 0 are ``dead`` and not counted in; all three are 0 if all are.
    """

    smallest: float
    median: float
    largest: float
    dead: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spreads:
    """Before and after equalization; ``before`` is None where the graph was not rescaled."""

    after: ChannelSpread
    before: ChannelSpread | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFigures:
    """One layer. ``computed_in`` is a data type: ``int8``, ``half``, ``float``.

    SQNR is None where no other graph was compared. ``activations`` are the channels that it
    delivers, ``weights`` its input channels.
    """

    name: str
    operator: str
    computed_in: str
    sqnr_db: float | None
    own_sqnr_db: float | None
    activations: Spreads
    weights: Spreads


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """All layers on ``images`` images; ``reason`` says why there is no SQNR, where there is none.

    ``precision`` names the graph that was compared with the float graph.
    """

    images: int
    precision: str
    rows: tuple[LayerFigures, ...]
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As parity.json holds it."""
        return asdict(self)
