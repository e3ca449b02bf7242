"""What one pass over preprocessed images sees: a small record for each image, no pixels kept.

Each image is measured on its own and sums over images are exactly rounded (``math.fsum``), so
nothing depends on batch size or order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.images import FloatArray, Preprocess

Triple = tuple[float, float, float]

FLAT_STD = 0.01
"""A picture whose every channel varies less than this, on [0, 1], is near constant: 2.5 of 255."""
# Half of one step of 255, so that float32 rounding of un-normalized pixels does not matter.
_HALF_STEP = 0.5 / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourStatistics:
    """One picture ``[3, H, W]``: mean and variance of its channels as the network receives them.

    ``white`` and ``black`` are the shares of values at the ends of 0..255; ``grey`` says that all
    three channels are equal.
    """

    mean: Triple
    variance: Triple
    white: float
    black: float
    grey: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One image, or one input of another kind.

    ``low`` and ``high`` are its extremes as the network receives them. ``colour`` is None for what
    is no RGB picture, and where the preprocessing is not known.
    """

    digest: bytes
    finite: bool
    constant: bool
    low: float
    high: float
    colour: ColourStatistics | None


def measure(arrays: Sequence[FloatArray], preprocess: Preprocess | None) -> Iterator[ImageRecord]:
    """Yield the record of each image of one batch.

    ``arrays`` has one ``[n, ...]`` for each input of the network. ``preprocess`` is what made them,
    if that is known.
    """
    for index in range(len(arrays[0])):
        yield _record([array[index] for array in arrays], preprocess)


def _record(image: Sequence[FloatArray], preprocess: Preprocess | None) -> ImageRecord:
    finite = all(bool(np.isfinite(values).all()) for values in image)
    is_picture = len(image) == 1 and image[0].ndim == 3 and image[0].shape[0] == 3
    colour = None
    if finite and is_picture and preprocess is not None:
        pixels = image[0] * _column(preprocess.std) + _column(preprocess.mean)
        colour = _colour(image[0], pixels)
        spread = np.sqrt(colour.variance) * np.array(preprocess.std)
        constant = bool((spread < FLAT_STD).all())
    else:
        constant = finite and all(_is_constant(values, is_picture) for values in image)
    filled = [values for values in image if values.size]
    return ImageRecord(
        digest=_digest(image),
        finite=finite,
        constant=constant,
        low=min((float(values.min()) for values in filled), default=0.0),
        high=max((float(values.max()) for values in filled), default=0.0),
        colour=colour,
    )


def _colour(values: FloatArray, pixels: FloatArray) -> ColourStatistics:
    """``values`` as the network receives them, ``pixels`` on [0, 1]; both ``[3, H, W]``."""
    flat = values.reshape(3, -1)
    mean = flat.mean(1, dtype=np.float64)
    variance = np.square(flat - mean[:, None].astype(np.float32)).mean(1, dtype=np.float64)
    return ColourStatistics(
        mean=triple(mean),
        variance=triple(variance),
        white=float(np.count_nonzero(pixels > 1 - _HALF_STEP) / pixels.size),
        black=float(np.count_nonzero(pixels < _HALF_STEP) / pixels.size),
        grey=bool((np.abs(pixels[1:] - pixels[:1]) < _HALF_STEP).all()),
    )


def _is_constant(values: FloatArray, is_picture: bool) -> bool:
    """Whether nothing varies, in any channel of a picture; one number alone cannot vary."""
    flat = values.reshape(3 if is_picture else 1, -1)
    return flat.shape[1] > 1 and bool((flat == flat[:, :1]).all())


def _digest(image: Sequence[FloatArray]) -> bytes:
    digest = hashlib.sha256()
    for values in image:
        digest.update(repr(values.shape).encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.digest()


def _column(numbers: Triple) -> npt.NDArray[np.float32]:
    return np.array(numbers, dtype=np.float32).reshape(3, 1, 1)


def triple(values: Any) -> Triple:
    """Three numbers as Python floats."""
    first, second, third = (float(value) for value in values)
    return first, second, third


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledColour:
    """All pictures together, on the [0, 1] scale; ``error`` is the standard error of ``mean``.

    The error is that over images, since the pixels of one image are no independent samples.
    ``red_blue`` is the mean of red minus blue, and its standard error.
    """

    mean: Triple
    std: Triple
    error: Triple
    red_blue: tuple[float, float]


def pool(colours: Sequence[ColourStatistics], preprocess: Preprocess) -> PooledColour | None:
    """Pool what :func:`measure` found for pictures made by ``preprocess``; None without any."""
    if not colours:
        return None
    means = [
        [colour.mean[c] * preprocess.std[c] + preprocess.mean[c] for colour in colours]
        for c in range(3)
    ]
    pooled = [_mean_and_error(values) for values in means]
    within = [
        math.fsum(colour.variance[c] * preprocess.std[c] ** 2 for colour in colours) / len(colours)
        for c in range(3)
    ]
    between = [_variance(values) for values in means]
    differences = [red - blue for red, blue in zip(means[0], means[2], strict=True)]
    return PooledColour(
        mean=triple(mean for mean, _ in pooled),
        std=triple(math.sqrt(a + b) for a, b in zip(within, between, strict=True)),
        error=triple(error for _, error in pooled),
        red_blue=_mean_and_error(differences),
    )


def _mean(values: Iterable[float], count: int) -> float:
    return math.fsum(values) / count


def _variance(values: Sequence[float]) -> float:
    mean = _mean(values, len(values))
    return _mean(((value - mean) ** 2 for value in values), len(values))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    error = math.sqrt(_variance(values) / max(len(values) - 1, 1))
    return _mean(values, len(values)), error
