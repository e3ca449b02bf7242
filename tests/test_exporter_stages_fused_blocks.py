"""Fusing a network's blocks, and what the contract then expects of the graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.contract import BlockConvolution
from exporter.errors import InputError
from exporter.stages.fused_blocks import expected_blocks, fuse
from models.repvgg import RepVGGBlock
from models.variants import ConvLayer

BATCH = (np.random.default_rng(0).standard_normal((2, 4, 8, 6)).astype(np.float32),)


def block(**changed: int) -> RepVGGBlock:
    sizes = {"in_channels": 4, "out_channels": 4, "stride": 1, "groups": 1} | changed
    return RepVGGBlock(ConvLayer(name="b", **sizes)).eval()


class Named(nn.Module):
    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x)  # type: ignore[no-any-return]


def test_every_block_is_compared_and_expected() -> None:
    """Names, shapes, stride, dilation and groups are those of the blocks."""
    network = nn.Sequential(block(groups=2), nn.Sequential(block(stride=2, out_channels=6)))
    fused = fuse(network.eval(), BATCH)
    assert ["0", "1.0"] == [found.name for found in fused.blocks]
    assert max(found.relative for found in fused.blocks) < 1e-6
    assert {
        "0": BlockConvolution(
            weight="0.rbr_reparam.weight", weight_shape=(4, 2, 3, 3), strides=(1, 1),
            pads=(1, 1, 1, 1), dilations=(1, 1), groups=2,
        ),
        "1.0": BlockConvolution(
            weight="1.0.rbr_reparam.weight", weight_shape=(6, 4, 3, 3), strides=(2, 2),
            pads=(1, 1, 1, 1), dilations=(1, 1), groups=1,
        ),
    } == expected_blocks(fused.module)  # fmt: skip


def test_dilation_is_padding_too() -> None:
    """A block of dilation 2 pads by 2."""
    fused = fuse(nn.Sequential(block(dilation=2)).eval(), BATCH)
    (found,) = expected_blocks(fused.module).values()
    assert ((2, 2), (2, 2, 2, 2)) == (found.dilations, found.pads)


def test_a_network_without_blocks_is_told_what_a_block_is() -> None:
    """The sentence names the class and the structure that was looked for."""
    with pytest.raises(InputError, match="no RepVGG-style block was found in Sequential: a block"):
        fuse(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()).eval(), BATCH)


def test_what_looks_like_a_block_and_is_none_is_named() -> None:
    """A ReLU inside a branch makes the sum nonlinear."""

    class Nonlinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv3 = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            self.conv1 = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv3(x) + self.conv1(x))

    with pytest.raises(InputError, match=r"cannot be reparameterized: .*stem"):
        fuse(Named(Nonlinear()).eval(), BATCH)


def test_a_part_that_cannot_be_searched_is_a_note() -> None:
    """Data-dependent Python in one module does not keep the others from being fused."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if float(x.sum()) > 1e9 else x

    fused = fuse(nn.Sequential(block(), Moody()).eval(), BATCH)
    assert ["0"] == [found.name for found in fused.blocks]
    assert 1 == len(fused.notes)
