"""A detector of one's own with three feature outputs, through INT8 to an engine.

    python examples/custom_detector.py OUT

Images are 96 x 128; the outputs are maps of class scores and boxes at strides 8, 16 and 32. What
turns them into a list of boxes (decoding, non-maximum suppression) stays outside the network.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from exporter import Bundle, export

SIZE = (96, 128)


class RepBlock(nn.Module):
    """A RepVGG-style block whose branches stand in a list, with groups."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, k, stride, k // 2, groups=groups, bias=False),
                nn.BatchNorm2d(outputs),
            )
            for k in (3, 1)
        )
        self.identity = nn.BatchNorm2d(inputs) if (inputs, stride) == (outputs, 1) else None

    def forward(self, x: Tensor) -> Tensor:
        y = sum(branch(x) for branch in self.branches)
        return torch.relu(y if self.identity is None else y + self.identity(x))


class Detector(nn.Module):
    """A backbone, a top-down neck, and at each of three levels a head of 1x1 convolutions."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(RepBlock(3, 16, 2), RepBlock(16, 24, 2))
        widths = (32, 48, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(RepBlock(inputs, width, 2), RepBlock(width, width, groups=2))
            for inputs, width in zip((24, *widths), widths, strict=False)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, 32, 1) for width in widths)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.smooth = nn.ModuleList(RepBlock(64, 32) for _ in widths[:2])
        self.scores = nn.ModuleList(nn.Conv2d(32, classes, 1) for _ in widths)
        self.boxes = nn.ModuleList(nn.Conv2d(32, 4, 1) for _ in widths)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, levels = self.stem(image), []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(x))
        for index in (1, 0):
            both = torch.cat([levels[index], self.up(levels[index + 1])], 1)
            levels[index] = self.smooth[index](both)
        return {
            f"stride{8 << index}": torch.cat([scores(level), boxes(level)], 1)
            for index, (level, scores, boxes) in enumerate(
                zip(levels, self.scores, self.boxes, strict=True)
            )
        }


def synthetic(count: int, seed: int) -> Tensor:
    """Smooth random images ``[count, 3, 96, 128]``: noise at three scales."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, *SIZE)
    for scale in (1, 4, 16):
        noise = torch.randn(count, 3, SIZE[0] // scale, SIZE[1] // scale, generator=generator)
        images += nn.functional.interpolate(noise, size=SIZE, mode="bilinear")
    return images / 3**0.5


def initialized() -> Detector:
    """Random weights; the BatchNorms have seen images, so that activations are well scaled."""
    torch.manual_seed(0)
    network = Detector().train()
    with torch.no_grad():
        for seed in range(10, 20):
            network(synthetic(8, seed))
    return network.eval()


def main(out: str) -> Bundle:
    """The whole use of the API; every output has a row of figures of its own."""
    return export(
        initialized(),
        example_input=torch.zeros(1, 3, *SIZE),
        precision="int8",
        calibration=synthetic(64, seed=1).numpy(),
        evaluation=synthetic(32, seed=2).numpy(),
        targets="sm86",
        batch="1:4:16",
        out=out,
    )


if __name__ == "__main__":
    bundle = main(sys.argv[1])
    print(bundle.path, bundle.parity["verdict"], bundle.parity["stages"][3]["outputs"])
