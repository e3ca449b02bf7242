"""Images of textures.py as PNG files, made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import textures
from PIL import Image

_TOGETHER = 64


def folder(place: Path, count: int, size: int) -> Path:
    """The folder under ``place`` that holds the first ``count`` calibration images, no others.

    Square, ``size`` pixels; the same bytes wherever they are made.
    """
    target = place / f"{count}x{size}px"
    target.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, _TOGETHER):
        names = [
            target / f"{index:05}.png" for index in range(start, min(start + _TOGETHER, count))
        ]
        if all(name.exists() for name in names):
            continue
        images, _ = textures.images("calibration", len(names), start=start, size=size)
        pixels = np.rint((images * textures.STD + textures.MEAN) * 255).astype(np.uint8)
        for name, image in zip(names, np.moveaxis(pixels, 1, -1), strict=True):
            Image.fromarray(image).save(name)
    return target
