"""A procedural data set and a network trained on it: textured shapes in colour, 16 classes.

Every image is ``[3, 64, 64]``: one of four shapes filled with one of four textures, at random
place, size, angle, frequency and colours, before a shaded background with clutter, partly covered,
under uneven light, and noisy. As in photographs the channels' means differ and their values go
together. A class is a pair of shape and texture, so that neither alone decides.

:func:`images` makes the images of a split; the same numbers at every call, and the first images of
a split do not depend on how many are asked for. :func:`load` is the trained network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.checkpoint import load_checkpoint
from models.repvgg import RepVGG
from models.variants import Variant

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.int64]

SHAPES = ("disc", "square", "triangle", "star")
TEXTURES = ("stripes", "checks", "dots", "blobs")
CLASSES = tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)
SPLITS = ("train", "calibration", "test")
WEIGHTS = Path(__file__).parent / "weights" / "textures.safetensors"
VARIANT = Variant(name="T0", num_blocks=(2, 4, 6, 1), width_multiplier=(0.375, 0.25, 0.25, 0.25))
"""14 convolutions, about a third of A0's width."""

SIZE = 64
MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(3, 1, 1)
STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(3, 1, 1)
_SEED = 1607
_CHUNK = 64
"""Images generated together: four of each class, in random order."""


def images(
    split: str, count: int, *, start: int = 0, size: int = SIZE
) -> tuple[FloatArray, LabelArray]:
    """Images ``start`` to ``start + count`` of a split: ``[count, 3, size, size]``, labels."""
    first, last = start // _CHUNK, -(-(start + count) // _CHUNK)
    chunks = [_chunk(split, index, size) for index in range(first, last)]
    pixels, labels = (np.concatenate(column) for column in zip(*chunks, strict=True))
    wanted = slice(start - first * _CHUNK, start - first * _CHUNK + count)
    return (pixels[wanted].astype(np.float32) / np.float32(255) - MEAN) / STD, labels[wanted]


def load() -> RepVGG:
    """The trained network in train form and eval mode."""
    module = load_checkpoint(WEIGHTS, VARIANT).module
    assert isinstance(module, RepVGG)
    return module.eval()


def _chunk(split: str, index: int, size: int) -> tuple[npt.NDArray[np.uint8], LabelArray]:
    rng = np.random.default_rng([_SEED, SPLITS.index(split), index])
    labels = rng.permutation(np.arange(_CHUNK) % len(CLASSES))
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    y, x = axis.reshape(1, size, 1), axis.reshape(1, 1, size)
    canvas = _mix(_colours(rng), _colours(rng), _ramp(rng, x, y)[:, None])
    canvas = _clutter(rng, canvas, x, y, pieces=4)
    shape = _shape(rng, labels // len(TEXTURES), x, y)
    texture = _texture(rng, labels % len(TEXTURES), x, y)
    canvas = _mix(canvas, _mix(*_two_colours(rng), texture[:, None]), shape[:, None])
    canvas = _clutter(rng, canvas, x, y, pieces=2)
    light = 1 + _uniform(rng, 0, 0.5) * (_ramp(rng, x, y) - 0.5)
    canvas = canvas * light[:, None] * _uniform(rng, 0.6, 1.3)[..., None]
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    canvas = canvas + noise * _uniform(rng, 0.01, 0.08)[..., None]
    return np.clip(canvas * 255, 0, 255).astype(np.uint8), labels


def _uniform(rng: np.random.Generator, low: float, high: float) -> FloatArray:
    return rng.uniform(low, high, (_CHUNK, 1, 1)).astype(np.float32)


def _mix(first: FloatArray, second: FloatArray, share: FloatArray) -> FloatArray:
    return first + (second - first) * share


def _colours(rng: np.random.Generator) -> FloatArray:
    """Grey-ish more often than not, red above blue: ``[chunk, 3, 1, 1]``."""
    grey = rng.normal(0, 0.2, (_CHUNK, 1, 1, 1))
    tint = rng.normal(0, 0.1, (_CHUNK, 3, 1, 1))
    return np.clip(MEAN + grey + tint, 0.02, 0.98).astype(np.float32)


def _two_colours(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """A colour, and one that differs from it in brightness by 0.25 to 0.6."""
    first = _colours(rng)
    step = rng.uniform(0.25, 0.6, (_CHUNK, 1, 1, 1)) * np.where(
        first.mean((1,), keepdims=True) > 0.5, -1, 1
    )
    tint = rng.normal(0, 0.06, (_CHUNK, 3, 1, 1))
    return first, np.clip(first + step + tint, 0, 1).astype(np.float32)


def _ramp(rng: np.random.Generator, x: FloatArray, y: FloatArray) -> FloatArray:
    """From 0 to 1 across the image in a random direction."""
    u, _ = _turned(x, y, _uniform(rng, 0, 2 * np.pi))
    ramp: FloatArray = np.clip(u * 0.4 + 0.5, 0, 1)
    return ramp


def _turned(x: FloatArray, y: FloatArray, angle: FloatArray) -> tuple[FloatArray, FloatArray]:
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _inside(distance: FloatArray) -> FloatArray:
    """Coverage of a pixel from its signed distance to an outline: 1 inside, soft at the edge."""
    coverage: FloatArray = np.clip(0.5 - distance * (distance.shape[-1] / 2), 0, 1)
    return coverage


def _clutter(
    rng: np.random.Generator, canvas: FloatArray, x: FloatArray, y: FloatArray, *, pieces: int
) -> FloatArray:
    """Bars and specks in any place."""
    for piece in range(pieces):
        u, v = _turned(x - _uniform(rng, -1, 1), y - _uniform(rng, -1, 1), _uniform(rng, 0, np.pi))
        length, width = _uniform(rng, 0.05, 0.7 if piece % 2 else 0.2), _uniform(rng, 0.02, 0.09)
        bar = _inside(np.maximum(np.abs(u) - length, np.abs(v) - width))
        canvas = _mix(canvas, _colours(rng), bar[:, None])
    return canvas


def _shape(rng: np.random.Generator, kinds: LabelArray, x: FloatArray, y: FloatArray) -> FloatArray:
    """Masks ``[chunk, size, size]``: the outline is a radius that depends on the direction."""
    u, v = _turned(
        x - _uniform(rng, -0.15, 0.15), y - _uniform(rng, -0.15, 0.15), _uniform(rng, 0, 2 * np.pi)
    )
    v = v * _uniform(rng, 0.85, 1.2)
    scale = _uniform(rng, 0.55, 0.9)
    angle, radius = np.arctan2(v, u), np.hypot(u, v)
    corners = np.array([0, 4, 3, 5])[kinds].reshape(-1, 1, 1)
    sector = np.pi / np.maximum(corners, 1)
    within = np.abs(np.mod(angle, 2 * sector) - sector)
    polygon = np.cos(sector) / np.cos(within) * np.array([1, 1.25, 1.5, 1])[kinds].reshape(-1, 1, 1)
    star = 0.62 + 0.5 * within / sector
    kind = kinds.reshape(-1, 1, 1)
    outline = np.where(kind == 0, 0.95, np.where(kind == 3, star, polygon))
    return _inside((radius - scale * outline).astype(np.float32))


def _texture(
    rng: np.random.Generator, kinds: LabelArray, x: FloatArray, y: FloatArray
) -> FloatArray:
    """Values ``[chunk, size, size]`` from 0 to 1."""
    u, v = _turned(x, y, _uniform(rng, 0, 2 * np.pi))
    frequency = _uniform(rng, 9, 20)
    u = u * frequency + _uniform(rng, 0, 2 * np.pi)
    v = v * frequency + _uniform(rng, 0, 2 * np.pi)
    a, b = np.sin(u), np.sin(v)
    field = sum(
        np.sin(p * u + q * v + _uniform(rng, 0, 6.3)) for p, q in rng.normal(0, 0.75, (6, 2))
    )
    kind = kinds.reshape(-1, 1, 1)
    wave = np.select([kind == 0, kind == 1, kind == 2], [a, 2 * a * b, a + b - 0.8], field * 0.7)
    values: FloatArray = np.clip(0.5 + wave * _uniform(rng, 0.7, 2), 0, 1).astype(np.float32)
    return values
