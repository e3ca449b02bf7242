"""The networks of the paper's comparison as float graphs, with random weights.

VGG-16: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, configuration D. ResNet-50: He et al., "Deep Residual Learning for Image
Recognition", CVPR 2016, table 1. The first block of a stage halves height and width in its 3x3
convolution, as today's implementations do (4.09 G multiply-accumulates); the original did it in the
1x1 before (3.86 G), which is what the RepVGG paper counts.

Speed and memory do not depend on the weights, so they are drawn by He's rule, under which
activations neither vanish nor overflow. BatchNorms get random statistics, so that folding them is
not trivial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from exporter.network import classifier_interface
from exporter.onnx_export import export_network
from models.fusion import reparameterize
from models.repvgg import RepVGG
from models.variants import find_variant

CLASSES = 1000
TRAIN, DEPLOY = "train", "deploy"
_VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
_RESNET_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
_EXPANSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperNetwork:
    """A network in one form. ``form`` is None where there is only one."""

    name: str
    form: str | None
    build: Callable[[], nn.Module]

    @property
    def key(self) -> str:
        """``B1 train``; ``VGG-16``."""
        return f"{self.name} {self.form}" if self.form else self.name


class VGG16(nn.Module):
    """``[N, 3, 224, 224]`` to ``[N, 1000]``; other sizes divide by 32 and have another head."""

    def __init__(self, image_size: tuple[int, int] = (224, 224)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, repeats in _VGG_STAGES:
            for _ in range(repeats):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        flat = channels * (image_size[0] // 32) * (image_size[1] // 32)
        self.classifier = nn.Sequential(
            nn.Linear(flat, 4096),
            nn.ReLU(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """``relu(x + bn(1x1(relu(bn(3x3(relu(bn(1x1(x)))))))))``, a 1x1 on the shortcut if needed."""

    def __init__(self, channels: int, width: int, stride: int, *, stride_in_3x3: bool) -> None:
        super().__init__()
        out = width * _EXPANSION
        first, second = (1, stride) if stride_in_3x3 else (stride, 1)
        self.conv1 = nn.Conv2d(channels, width, 1, stride=first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=second, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet50(nn.Module):
    """``[N, 3, H, W]`` to ``[N, 1000]``."""

    def __init__(self, *, stride_in_3x3: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        blocks: list[nn.Module] = []
        channels = 64
        for width, repeats, stride in _RESNET_STAGES:
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(Bottleneck(channels, width, step, stride_in_3x3=stride_in_3x3))
                channels = width * _EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.linear(torch.flatten(x, 1))  # type: ignore[no-any-return]


def networks(names: tuple[str, ...], image_size: tuple[int, int]) -> Iterator[PaperNetwork]:
    """``VGG-16``, ``ResNet-50`` or variants of RepVGG, these in train and in deploy form."""
    peers: dict[str, Callable[[], nn.Module]] = {
        "VGG-16": lambda: VGG16(image_size),
        "ResNet-50": ResNet50,
    }
    for name in names:
        if name in peers:
            yield PaperNetwork(name=name, form=None, build=peers[name])
            continue
        variant = find_variant(name)
        for form in (TRAIN, DEPLOY):
            yield PaperNetwork(name=name, form=form, build=lambda v=variant: RepVGG(v))


def with_random_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """The network on the CPU in eval mode, every weight and statistic drawn from one seed."""
    # torch's own initialization of 138 million numbers, to be drawn anew, would take half a minute.
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
                if child.bias is not None:
                    child.bias.uniform_(-0.1, 0.1)
            elif isinstance(child, nn.BatchNorm2d):
                for values in (child.running_mean, child.bias):
                    values.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
                for values in (child.running_var, child.weight):
                    values.uniform_(0.8, 1.2)  # type: ignore[union-attr]
                child.num_batches_tracked.zero_()  # type: ignore[union-attr]
    return module


def float_graph(network: PaperNetwork, image_size: tuple[int, int]) -> onnx.ModelProto:
    """Float32 ``images [batch, 3, H, W]`` to ``logits [batch, 1000]``, convolutions with bias.

    The exporter folds each BatchNorm behind a convolution into it, as the paper does with its
    baselines; the BatchNorms of identity branches stay.
    """
    module = with_random_weights(network.build)
    if network.form == DEPLOY:
        module = reparameterize(module)
    interface = classifier_interface(image_size, CLASSES, None)
    return export_network(module, interface, network.key, {})
