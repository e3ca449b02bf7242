"""RepVGG in both forms: multi-branch for training, one convolution a block for deployment.

Paper: Ding et al., CVPR 2021, section 3 and figure 2. Parameter names are those of the official
code (``rbr_dense``, ``rbr_1x1``, ``rbr_identity``, ``rbr_reparam``, ``linear``), because published
checkpoints use them.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.variants import ConvLayer, Variant


def conv_bn(layer: ConvLayer, kernel_size: int) -> nn.Sequential:
    """A bias-free convolution and its BatchNorm, as ``conv`` and ``bn``."""
    conv = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        kernel_size,
        stride=layer.stride,
        padding=kernel_size // 2,
        groups=layer.groups,
        bias=False,
    )
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(layer.out_channels)))


class RepVGGBlock(nn.Module):
    """Train form: ``relu(bn(conv3x3(x)) + bn(conv1x1(x)) [+ bn(x)])`` (paper, section 3.3).

    Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__()
        self.rbr_dense = conv_bn(layer, 3)
        self.rbr_1x1 = conv_bn(layer, 1)
        self.rbr_identity = nn.BatchNorm2d(layer.in_channels) if layer.has_identity else None
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            out = out + self.rbr_identity(x)
        return self.nonlinearity(out)  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    """Deploy form: ``relu(conv3x3(x) + bias)``, the same map as the block it was fused from."""

    def __init__(self, layer: ConvLayer) -> None:
        super().__init__()
        self.rbr_reparam = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            3,
            stride=layer.stride,
            padding=1,
            groups=layer.groups,
            bias=True,
        )
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinearity(self.rbr_reparam(x))  # type: ignore[no-any-return]


class RepVGG(nn.Module):
    """A published variant: ``[N, 3, H, W]`` float images to ``[N, num_classes]`` logits.

    The head is pooling, ``flatten`` and one linear layer, written so that it exports as exactly
    GlobalAveragePool, Flatten and Gemm with no shape arithmetic.
    """

    def __init__(self, variant: Variant, *, num_classes: int = 1000, deploy: bool = False) -> None:
        super().__init__()
        self.variant = variant
        self.num_classes = num_classes
        block = PlainBlock if deploy else RepVGGBlock
        stages: OrderedDict[str, list[nn.Module]] = OrderedDict()
        for layer in variant.layers:
            stages.setdefault(layer.name.partition(".")[0], []).append(block(layer))
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
