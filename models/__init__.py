"""What a RepVGG is: the variants, the network in both forms, fusion, checkpoints.

Importing this package loads no torch; its names are looked up when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from models.variants import VARIANTS, ConvLayer, UnknownVariantError, Variant, find_variant

if TYPE_CHECKING:
    from models.checkpoint import CheckpointError, LoadedCheckpoint, load_checkpoint
    from models.equivalence import BlockEquivalence, block_equivalence
    from models.fusion import (
        TrainModeWarning,
        UntraceableWarning,
        fused_convolutions,
        reparameterize,
    )
    from models.repvgg import PlainBlock, RepVGG, RepVGGBlock

__project__ = "repvgg-exporter"

__all__ = [
    "VARIANTS",
    "BlockEquivalence",
    "CheckpointError",
    "ConvLayer",
    "LoadedCheckpoint",
    "PlainBlock",
    "RepVGG",
    "RepVGGBlock",
    "TrainModeWarning",
    "UnknownVariantError",
    "UntraceableWarning",
    "Variant",
    "block_equivalence",
    "find_variant",
    "fused_convolutions",
    "load_checkpoint",
    "reparameterize",
]

_LAZY = {
    "BlockEquivalence": "equivalence",
    "CheckpointError": "checkpoint",
    "LoadedCheckpoint": "checkpoint",
    "PlainBlock": "repvgg",
    "RepVGG": "repvgg",
    "RepVGGBlock": "repvgg",
    "TrainModeWarning": "fusion",
    "UntraceableWarning": "fusion",
    "block_equivalence": "equivalence",
    "fused_convolutions": "fusion",
    "load_checkpoint": "checkpoint",
    "reparameterize": "fusion",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"models.{_LAZY[name]}"), name)
