"""Everything of a bundle but its engine, as values: what lies between the network and the builder.

Its files lie in a folder of their own: ``model.onnx``, the graph of the precision,
``calibration.json`` and ``calibration.cache``, ``reference.npz``. Neither torch nor onnx is needed
to go on from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.parity.ledger import Ledger
from exporter.plan.commands import GraphInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedConvolutions:
    """Convolutions that an engine must have.

    ``unquantized`` of ``total`` stay float or half in an INT8 or FP8 engine; ``pointwise`` are 1x1
    outside the blocks, which may run as matrix products.
    """

    total: int
    unquantized: int
    pointwise: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What the stages before the engine made and measured.

    ``document`` is their part of the manifest, ``pictures`` the worst images as data URIs by index,
    ``inputs`` those of the graph to build from, ``seconds`` the wall time of each stage.
    """

    document: dict[str, Any]
    notes: tuple[str, ...]
    ledger: Ledger
    pictures: Mapping[int, str]
    inputs: tuple[GraphInput, ...]
    convolutions: ExpectedConvolutions
    seconds: Mapping[str, float]
