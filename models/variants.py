"""The published RepVGG classification variants, as numbers.

Sources: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, tables 2 and 3,
for A0 to B3g4; the official repository for D2se and RepVGGplus-L2pse.

Stage 0 is one block of ``min(64, 64a)`` channels; stages 1 to 4 have ``num_blocks`` blocks of
``64a, 128a, 256a, 512b`` channels. The first block of every stage has stride 2, so the network
divides height and width by 32. In the ``g2`` and ``g4`` variants every second block (the 2nd, 4th,
... 26th after stage 0) is a grouped convolution.

This module uses the standard library only, so that the device half and ``--help`` can import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

_LAST_GROUPED_BLOCK = 26
TOTAL_STRIDE = 32
"""Height and width are divided by this between the input and the last stage."""


class Squeeze(str, Enum):
    """Where a block has its squeeze-and-excitation (Hu et al., CVPR 2018), if anywhere."""

    NONE = "none"
    BEFORE_RELU = "before_relu"
    AFTER_RELU = "after_relu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvLayer:
    """One 3x3 convolution of the deploy form.

    ``name`` is the block's name in the official code (``stage0``, ``stage1.0``, ...).
    ``squeeze_channels`` is the width of the squeeze-and-excitation's bottleneck.
    """

    name: str
    in_channels: int
    out_channels: int
    stride: int
    groups: int
    dilation: int = 1
    squeeze: Squeeze = Squeeze.NONE
    squeeze_channels: int = 0

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """``[out_channels, in_channels / groups, 3, 3]``."""
        return (self.out_channels, self.in_channels // self.groups, 3, 3)

    @property
    def has_identity(self) -> bool:
        """Whether the train form has an identity branch: only if shapes allow (section 3.3)."""
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def deploy_parameters(self) -> int:
        """Kernel, bias and squeeze-and-excitation (two 1x1 convolutions with bias)."""
        out, in_per_group, height, width = self.weight_shape
        squeeze = 2 * out * self.squeeze_channels + self.squeeze_channels + out
        return out * in_per_group * height * width + out + (squeeze if self.squeeze_channels else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A row of the paper's table of architectures."""

    name: str
    num_blocks: tuple[int, int, int, int]
    width_multiplier: tuple[float, float, float, float]
    groups: int = 1
    squeeze: Squeeze = Squeeze.NONE
    squeeze_reduction: int = 16

    @property
    def stage_widths(self) -> tuple[int, int, int, int, int]:
        """Output channels of stages 0 to 4."""
        a0, a1, a2, b = self.width_multiplier
        return (min(64, int(64 * a0)), int(64 * a0), int(128 * a1), int(256 * a2), int(512 * b))

    @property
    def layers(self) -> tuple[ConvLayer, ...]:
        """The convolutions in the order the data passes them."""
        stem, *widths = self.stage_widths
        layers = [self._layer("stage0", 3, stem, stride=2, groups=1)]
        in_channels = stem
        for stage, (blocks, width) in enumerate(zip(self.num_blocks, widths, strict=True), start=1):
            for block in range(blocks):
                index = len(layers)
                grouped = index % 2 == 0 and index <= _LAST_GROUPED_BLOCK
                layers.append(
                    self._layer(
                        f"stage{stage}.{block}",
                        in_channels,
                        width,
                        stride=2 if block == 0 else 1,
                        groups=self.groups if grouped else 1,
                    )
                )
                in_channels = width
        return tuple(layers)

    def _layer(
        self, name: str, in_channels: int, out_channels: int, *, stride: int, groups: int
    ) -> ConvLayer:
        has_squeeze = self.squeeze is not Squeeze.NONE
        return ConvLayer(
            name=name,
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            groups=groups,
            squeeze=self.squeeze,
            squeeze_channels=out_channels // self.squeeze_reduction if has_squeeze else 0,
        )

    @property
    def feature_channels(self) -> int:
        """Channels that the classifier sees."""
        return self.stage_widths[-1]

    def deploy_parameters(self, num_classes: int = 1000) -> int:
        """Parameters of the deploy form: kernels, biases and the classifier."""
        body = sum(layer.deploy_parameters for layer in self.layers)
        return body + (self.feature_channels + 1) * num_classes

    def macs(self, image_size: tuple[int, int] = (224, 224), num_classes: int = 1000) -> int:
        """Multiply-accumulates of the deploy form for one ``[3, H, W]`` image."""
        height, width = image_size
        total = 0
        for layer in self.layers:
            height, width = -(-height // layer.stride), -(-width // layer.stride)
            taps = (layer.in_channels // layer.groups) * 9
            total += height * width * layer.out_channels * taps
            total += 2 * layer.out_channels * layer.squeeze_channels
        return total + self.feature_channels * num_classes


_A = (2, 4, 14, 1)
_B = (4, 6, 16, 1)
_D = (8, 14, 24, 1)


def _table() -> Mapping[str, Variant]:
    rows: list[tuple[str, tuple[int, int, int, int], tuple[float, float, float, float], int]] = [
        ("A0", _A, (0.75, 0.75, 0.75, 2.5), 1),
        ("A1", _A, (1.0, 1.0, 1.0, 2.5), 1),
        ("A2", _A, (1.5, 1.5, 1.5, 2.75), 1),
        ("B0", _B, (1.0, 1.0, 1.0, 2.5), 1),
        ("B1", _B, (2.0, 2.0, 2.0, 4.0), 1),
        ("B1g2", _B, (2.0, 2.0, 2.0, 4.0), 2),
        ("B1g4", _B, (2.0, 2.0, 2.0, 4.0), 4),
        ("B2", _B, (2.5, 2.5, 2.5, 5.0), 1),
        ("B2g2", _B, (2.5, 2.5, 2.5, 5.0), 2),
        ("B2g4", _B, (2.5, 2.5, 2.5, 5.0), 4),
        ("B3", _B, (3.0, 3.0, 3.0, 5.0), 1),
        ("B3g2", _B, (3.0, 3.0, 3.0, 5.0), 2),
        ("B3g4", _B, (3.0, 3.0, 3.0, 5.0), 4),
    ]
    table = {
        name: Variant(name=name, num_blocks=blocks, width_multiplier=widths, groups=groups)
        for name, blocks, widths, groups in rows
    }
    wide = (2.5, 2.5, 2.5, 5.0)
    table["D2se"] = Variant(
        name="D2se", num_blocks=_D, width_multiplier=wide, squeeze=Squeeze.BEFORE_RELU
    )
    table["L2pse"] = Variant(
        name="L2pse",
        num_blocks=_D,
        width_multiplier=wide,
        squeeze=Squeeze.AFTER_RELU,
        squeeze_reduction=4,
    )
    return MappingProxyType(table)


VARIANTS: Mapping[str, Variant] = _table()


class UnknownVariantError(ValueError):
    """No published variant has this name; the message lists the nearest ones."""


def find_variant(name: str) -> Variant:
    """Return the variant called ``name``, ignoring case and a leading ``RepVGG-`` (``plus-``).

    Raises:
        UnknownVariantError: with the nearest names.
    """
    by_key = {key.lower(): variant for key, variant in VARIANTS.items()}
    wanted = name.strip().lower().removeprefix("repvgg").removeprefix("plus").lstrip("-_")
    if wanted in by_key:
        return by_key[wanted]
    nearest = difflib.get_close_matches(wanted, by_key, n=3, cutoff=0.45)
    known = ", ".join(VARIANTS)
    hint = f"nearest: {', '.join(by_key[key].name for key in nearest)}; " if nearest else ""
    raise UnknownVariantError(f"unknown model {name!r} ({hint}known: {known})")
