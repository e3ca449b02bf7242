"""RepVGG in both forms: multi-branch for training, one convolution a block for deployment.

Paper: Ding et al., CVPR 2021, section 3 and figure 2. Parameter names are those of the official
code (``rbr_dense``, ``rbr_1x1``, ``rbr_identity``, ``rbr_reparam``, ``se``, ``linear``), because
published checkpoints use them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from models.variants import ConvLayer, Squeeze, Variant


class Branch(str, Enum):
    """What a branch beside the 3x3 convolution looks like."""

    NORM = "norm"
    """With a BatchNorm of its own."""
    PLAIN = "plain"
    """Without one."""
    NONE = "none"
    """There is no such branch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStyle:
    """The branches of a train-form block.

    ``dense_branches`` counts the 3x3 convolutions; ``dense_norm`` says whether each has its
    BatchNorm; ``post_norm`` puts one BatchNorm after the sum. The paper's ablations (table 7) are
    ``identity=NONE``, ``point=NONE`` and POST_NORM.
    """

    dense_branches: int = 1
    dense_norm: bool = True
    point: Branch = Branch.NORM
    identity: Branch = Branch.NORM
    post_norm: bool = False


REPVGG = BlockStyle()
QAREPVGG = BlockStyle(point=Branch.PLAIN, identity=Branch.PLAIN, post_norm=True)
"""Chu et al., "Make RepVGG Greater Again: A Quantization-aware Approach", AAAI 2024."""
POST_NORM = BlockStyle(dense_norm=False, point=Branch.PLAIN, identity=Branch.PLAIN, post_norm=True)
"""RepVGG's ablation "post-addition BN"."""


def mobileone(dense_branches: int, *, skip: bool = False) -> BlockStyle:
    """Vasu et al., "MobileOne", CVPR 2023: several 3x3 branches; ``skip`` adds a BatchNorm."""
    identity = Branch.NORM if skip else Branch.NONE
    return BlockStyle(dense_branches=dense_branches, identity=identity)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate: ``x * sigmoid(up(relu(down(mean of x))))``.

    Maps ``[N, C, H, W]`` to the same shape. Source: Hu et al., CVPR 2018, section 3.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.up = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(torch.relu(self.down(self.pool(x))))
        return x * torch.sigmoid(gate)


class FusedConv2d(nn.Conv2d):
    """A convolution that stands for the branches of one block."""


def conv_bn(layer: ConvLayer, kernel_size: int, *, norm: bool = True) -> nn.Sequential:
    """A bias-free convolution and, if asked for, its BatchNorm, as ``conv`` and ``bn``."""
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        kernel_size,
        stride=layer.stride,
        padding=layer.dilation * (kernel_size // 2),
        dilation=layer.dilation,
        groups=layer.groups,
        bias=False,
    )
    parts: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
    if norm:
        parts["bn"] = nn.BatchNorm2d(layer.out_channels)
    return nn.Sequential(parts)


class RepVGGBlock(nn.Module):
    """Train form: ``relu(bn(conv3x3(x)) + bn(conv1x1(x)) [+ bn(x)])`` (paper, section 3.3).

    Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
    ``style`` varies the branches. A squeeze-and-excitation comes before or after the ReLU.
    """

    def __init__(self, layer: ConvLayer, style: BlockStyle = REPVGG) -> None:
        super().__init__()
        if style.dense_branches == 1:
            self.rbr_dense: nn.Module = conv_bn(layer, 3, norm=style.dense_norm)
        else:
            self.rbr_dense = nn.ModuleList(
                conv_bn(layer, 3, norm=style.dense_norm) for _ in range(style.dense_branches)
            )
        self.rbr_1x1 = _point_branch(layer, style.point)
        self.rbr_identity = _identity_branch(layer, style.identity)
        self.bn = nn.BatchNorm2d(layer.out_channels) if style.post_norm else None
        self.se = _squeeze(layer)
        self.se_after_relu = layer.squeeze is Squeeze.AFTER_RELU
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        dense = self.rbr_dense
        branches = list(dense) if isinstance(dense, nn.ModuleList) else [dense]
        branches += [b for b in (self.rbr_1x1, self.rbr_identity) if b is not None]
        out: Tensor = branches[0](x)
        for branch in branches[1:]:
            out = out + branch(x)
        if self.bn is not None:
            out = self.bn(out)
        return _finish(self, out)


class PlainBlock(nn.Module):
    """Deploy form: ``relu(conv3x3(x) + bias)``, the same map as the block it was fused from."""

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__()
        self.rbr_reparam = FusedConv2d(
            layer.in_channels,
            layer.out_channels,
            3,
            stride=layer.stride,
            padding=layer.dilation,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=True,
        )
        self.se = _squeeze(layer)
        self.se_after_relu = layer.squeeze is Squeeze.AFTER_RELU
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return _finish(self, self.rbr_reparam(x))


class RepVGG(nn.Module):
    """A published variant: ``[N, 3, H, W]`` float images to ``[N, num_classes]`` logits.

    The head is pooling, ``flatten`` and one linear layer, written so that it exports as exactly
    GlobalAveragePool, Flatten and Gemm with no shape arithmetic.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        deploy: bool = False,
        style: BlockStyle = REPVGG,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.num_classes = num_classes
        stages: OrderedDict[str, list[nn.Module]] = OrderedDict()
        for layer in variant.layers:
            block = PlainBlock(layer) if deploy else RepVGGBlock(layer, style)
            stages.setdefault(layer.name.partition(".")[0], []).append(block)
        self.stage0 = stages.pop("stage0")[0]
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(*blocks) for blocks in stages.values()
        )
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(variant.feature_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage0(x)
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = stage(x)
        return self.linear(torch.flatten(self.gap(x), 1))  # type: ignore[no-any-return]


def _finish(block: RepVGGBlock | PlainBlock, out: Tensor) -> Tensor:
    if block.se is not None and not block.se_after_relu:
        out = block.se(out)
    out = block.nonlinearity(out)
    if block.se is not None and block.se_after_relu:
        out = block.se(out)
    return out


def _point_branch(layer: ConvLayer, kind: Branch) -> nn.Module | None:
    if kind is Branch.NONE:
        return None
    branch = conv_bn(layer, 1)
    return branch if kind is Branch.NORM else branch[0]


def _identity_branch(layer: ConvLayer, kind: Branch) -> nn.Module | None:
    if kind is Branch.NONE or not layer.has_identity:
        return None
    return nn.BatchNorm2d(layer.in_channels) if kind is Branch.NORM else nn.Identity()


def _squeeze(layer: ConvLayer) -> SqueezeExcitation | None:
    if not layer.squeeze_channels:
        return None
    return SqueezeExcitation(layer.out_channels, layer.squeeze_channels)
