"""A segmentation network of one's own on a dilated RepVGG backbone, through INT8 to an engine.

    python examples/custom_segmentation.py OUT

The blocks have names and a dilation of their own; they are found by what they compute. The images
are synthetic: squares and discs on a noisy ground, 64 x 96, three classes.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from exporter import Bundle, export

SIZE = (64, 96)


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int, dilation: int) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A RepVGG-style block: a 3x3, a 1x1 and, where shapes allow, an identity branch."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv3 = conv_bn(inputs, outputs, 3, stride, dilation)
        self.conv1 = conv_bn(inputs, outputs, 1, stride, 1)
        self.skip = nn.BatchNorm2d(inputs) if (inputs, stride) == (outputs, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(x) + self.conv1(x)
        return torch.relu(y if self.skip is None else y + self.skip(x))


class SegmentationNet(nn.Module):
    """Stride 8, the last stage dilated instead of strided; logits at the size of the image."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            Block(3, 16, stride=2),
            Block(16, 32, stride=2),
            Block(32, 32),
            Block(32, 64, stride=2),
            Block(64, 64, dilation=2),
            Block(64, 64, dilation=2),
        )
        self.head = nn.Conv2d(64, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        logits = self.head(self.backbone(image))
        return functional.interpolate(
            logits, size=image.shape[2:], mode="bilinear", align_corners=False
        )


def synthetic(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[count, 3, 64, 96]`` and the class of every pixel: ground, square, disc."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    images = rng.normal(0, 0.3, (count, 3, *SIZE))
    labels = np.zeros((count, *SIZE), np.int64)
    for image, label in zip(images, labels, strict=True):
        for kind in (1, 2):
            y, x, radius = rng.uniform(12, 52), rng.uniform(12, 84), rng.uniform(6, 14)
            offsets = np.abs(rows - y), np.abs(columns - x)
            inside = (np.maximum(*offsets) if kind == 1 else np.hypot(*offsets)) < radius
            image[:, inside] += rng.uniform(0.5, 1.5, (3, 1))
            label[inside] = kind
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels)


def trained(steps: int = 40) -> SegmentationNet:
    torch.manual_seed(0)
    network = SegmentationNet().train()
    images, labels = synthetic(128, seed=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(steps):
        part = slice(16 * step % 128, 16 * step % 128 + 16)
        loss = functional.cross_entropy(network(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


def main(out: str) -> Bundle:
    """The whole use of the API: a trained module, an example, images as arrays."""
    calibration, _ = synthetic(64, seed=2)
    evaluation, _ = synthetic(32, seed=3)
    return export(
        trained(),
        example_input=calibration[:1],
        precision="int8",
        calibration=calibration.numpy(),
        evaluation=evaluation.numpy(),
        targets="sm86",
        dynamic_size="64:64:128x64:96:160",
        out=out,
    )


if __name__ == "__main__":
    bundle = main(sys.argv[1])
    print(bundle.path, bundle.parity["verdict"], bundle.parity["stages"][3]["sqnr_db"])
