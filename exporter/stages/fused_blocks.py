"""Fusing a network's blocks, and what each of them must be in the ONNX graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from exporter.contract import BlockConvolution
from exporter.errors import InputError
from exporter.running.onnx_runner import Batch
from models import (
    BlockEquivalence,
    UntraceableWarning,
    block_equivalence,
    fused_convolutions,
    reparameterize,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A network with its blocks fused, how far each is from its block, and notes for the user."""

    module: nn.Module
    blocks: tuple[BlockEquivalence, ...] = ()
    notes: tuple[str, ...] = ()


def fuse(module: nn.Module, sample: Batch) -> Fused:
    """A copy of ``module`` with its blocks fused; ``sample`` is what the blocks are compared on.

    Raises:
        InputError: if a block cannot be fused, or there is none.
    """
    fused, notes = _reparameterized(module)
    if not fused_convolutions(fused):
        hidden = f" ({notes[0]})" if notes else ""
        raise InputError(
            f"no RepVGG-style block was found in {type(module).__name__}{hidden}: a block is a sum "
            "of two or more branches of one tensor, at least one a convolution, the others "
            "convolutions, BatchNorms or the tensor itself, with nothing nonlinear before the sum"
        )
    try:
        blocks = block_equivalence(module, fused, *map(torch.from_numpy, sample))
    except ValueError as error:
        raise InputError(f"the fused blocks cannot be compared: {error}") from error
    return Fused(module=fused, blocks=blocks, notes=notes)


def _reparameterized(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UntraceableWarning)
            fused = reparameterize(module)
    except ValueError as error:
        raise InputError(f"the network cannot be reparameterized: {error}") from error
    untraced = [w.message for w in caught if issubclass(w.category, UntraceableWarning)]
    return fused, tuple(map(str, untraced))


def expected_blocks(fused: nn.Module) -> Mapping[str, BlockConvolution]:
    """The convolution of every block of a reparameterized network, by the block's name."""
    names = {child: name for name, child in fused.named_modules()}
    return {
        block: _expected(conv, names[conv]) for block, conv in fused_convolutions(fused).items()
    }


def _expected(conv: nn.Conv2d, name: str) -> BlockConvolution:
    # Numbers, never a word: fusing adds up those of the branches.
    top, left = map(int, conv.padding)
    (rows, columns), (down, right) = conv.stride, conv.dilation
    return BlockConvolution(
        weight=f"{name}.weight" if name else "weight",
        weight_shape=tuple(conv.weight.shape),
        strides=(rows, columns),
        pads=(top, left, top, left),
        dilations=(down, right),
        groups=conv.groups,
    )
