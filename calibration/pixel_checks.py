"""Pixels against the preprocessing that is said to have made them.

Mean and standard deviation of a :class:`Preprocess` are usually those of the training images. The
pixels of good images of another kind differ from them by a tenth or two and no mistake can be read
from that; what is looked for is the fingerprint of a mistake: a range of values, the means in
reverse order, the means of the negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from calibration.data_report import Finding
from calibration.image_statistics import ColourStatistics, PooledColour, Triple, triple
from calibration.images import Preprocess

ENOUGH_FOR_STATISTICS = 32
"""Images below which means over them are not judged."""
SIGNIFICANT = 4.0
"""Standard errors, over images, that a deviation must exceed."""
MOSTLY = 0.5
"""The share of images that must show something, and of a picture that must be white."""
FAR = 3.0
"""Standard deviations of the preprocessing between its mean and that of all pixels."""
_CLOSE = 0.1
# Means closer than this have no order, nor a negative that differs from the positive.
_LEAST_GAP = 0.03
_LEAST_TONE = 0.1
_LEAST_STD = 0.05
# Beyond it no normalization of [0, 1] pixels leads, but pixels of 0..255 do.
_RAW_HIGH = 16.0


def colour_figures(
    colours: Sequence[ColourStatistics], pooled: PooledColour, preprocess: Preprocess
) -> dict[str, Any]:
    """The figures of a report that describe colours."""
    scale = list(zip(pooled.mean, pooled.std, preprocess.mean, preprocess.std, strict=True))
    return {
        "grayscale": sum(colour.grey for colour in colours),
        "white": math.fsum(colour.white for colour in colours) / len(colours),
        "black": math.fsum(colour.black for colour in colours) / len(colours),
        "mean": pooled.mean,
        "std": pooled.std,
        "input_mean": triple((mean - m) / s for mean, _, m, s in scale),
        "input_std": triple(std / s for _, std, _, s in scale),
    }


def scale_mistake(low: float, high: float, preprocess: Preprocess | None) -> Finding | None:
    """What the extremes of all values say; None where ``preprocess`` may have made them.

    Without a preprocessing only pixels of 0..255 are told apart.
    """
    if preprocess is None:
        return _range_finding("raw-values", low, high, "") if _is_raw(low, high) else None
    if max(preprocess.mean) > 1.5 or max(preprocess.std) > 1.5:
        scale = f"mean {_text(preprocess.mean)} and std {_text(preprocess.std)}"
        return _warning(
            "preprocess-scale",
            f"the preprocessing's {scale} are on the 0..255 scale, but pixels are scaled to [0, 1] "
            "first: divide both by 255",
        )
    least, most = _range(preprocess)
    slack = 0.1 * (most - least)
    code = None
    if _is_raw(low, high) and most <= _RAW_HIGH:
        code = "raw-values"
    elif low >= 0 and high <= 1 and (least < -0.2 or most > 1.2):
        code = "unit-values"
    elif -1 <= low < -0.9 and 0.9 < high <= 1 and (least < -1.2 or most > 1.2):
        code = "symmetric-values"
    elif low < least - slack or high > most + slack:
        code = "values-out-of-range"
    expected = f", but the preprocessing makes {least:.3g} to {most:.3g}"
    return _range_finding(code, low, high, expected) if code else None


def _is_raw(low: float, high: float) -> bool:
    return low >= 0 and _RAW_HIGH < high <= 255


def _range_finding(code: str, low: float, high: float, expected: str) -> Finding:
    words, advice = _RANGES[code]
    return _warning(code, f"values run from {low:.3g} to {high:.3g}{words}{expected}: {advice}")


_RANGES = {
    "raw-values": (
        ", as of pixels that were not normalized",
        "scale them to [0, 1] and normalize them, unless the network was trained on raw pixels",
    ),
    "unit-values": (", as of pixels on [0, 1]", "subtract its mean and divide by its std"),
    "symmetric-values": (", as of pixels on [-1, 1]", "use its mean and std"),
    "values-out-of-range": ("", "preprocess the images as for training"),
}
SCALE_CODES = frozenset(_RANGES)
"""Findings after which the preprocessing cannot be what made the values."""


def colour_mistakes(
    colours: Sequence[ColourStatistics], pooled: PooledColour, preprocess: Preprocess
) -> Iterator[Finding]:
    """What the colours of the images say against ``preprocess``."""
    count = len(colours)
    grey = sum(colour.grey for colour in colours)
    clipped = sum(colour.white > MOSTLY for colour in colours)
    of_all = f"of {count} calibration images"
    means = f"the mean of the pixels is {_text(pooled.mean)}"
    expected = f"the preprocessing's mean {_text(preprocess.mean)}"
    if grey > MOSTLY * count and max(preprocess.mean) - min(preprocess.mean) > 0.01:
        yield _warning(
            "grayscale-images",
            f"{grey} {of_all} are grey, but {expected} is that of colour images: pass colour "
            "images if the network was trained on such",
        )
    if clipped > MOSTLY * count:
        yield _warning(
            "saturated-images",
            f"in {clipped} {of_all} more than half of the values are at 255: unless the "
            "background is white, they were overexposed or scaled twice",
        )
    if _is_far(pooled.mean, preprocess):
        yield _warning(
            "far-from-preprocess",
            f"{means}, more than {FAR:.0f} of its standard deviations from {expected}: check both",
        )
    if count >= ENOUGH_FOR_STATISTICS and _is_swapped(pooled, preprocess.mean):
        yield _warning(
            "swapped-channels",
            f"{means}, which fits {expected} in reverse order: the images, or that mean, are in "
            "blue-green-red order; both must be red, green, blue",
        )
    if count >= ENOUGH_FOR_STATISTICS and _is_negative(pooled, preprocess.mean):
        yield _warning(
            "negative-images",
            f"{means}, which fits the negative of {expected}: invert the images if the network "
            "was trained on the negatives of these",
        )


def _is_far(found: Triple, preprocess: Preprocess) -> bool:
    """Whether the means of all channels are far from ``preprocess``'s, where those are statistics.

    A std of 1 / 255 is none: it only brings pixels back to 0..255.
    """
    channels = zip(found, preprocess.mean, preprocess.std, strict=True)
    return min(preprocess.std) >= _LEAST_STD and all(
        abs(mean - expected) > FAR * std for mean, expected, std in channels
    )


def _is_swapped(pooled: PooledColour, mean: Triple) -> bool:
    """Whether red and blue stand to each other as blue and red should, and all means fit so.

    Swapped means fit better exactly where red minus blue has the wrong sign. That must be no
    accident of these images, and of the size that a swap makes: a sea is blue without any.
    """
    expected = mean[0] - mean[2]
    found, error = pooled.red_blue
    if abs(expected) < _LEAST_GAP or found * expected >= 0:
        return False
    sure = abs(found) > SIGNIFICANT * error
    right_size = abs(found + expected) < abs(expected) / 2
    fits = all(abs(a - b) < _CLOSE for a, b in zip(pooled.mean, reversed(mean), strict=True))
    return sure and right_size and fits


def _is_negative(pooled: PooledColour, mean: Triple) -> bool:
    """Whether every channel's mean is near one minus what it should be, and far from that."""
    return all(
        abs(expected - 0.5) > _LEAST_TONE
        and abs(found - (1 - expected)) < abs(expected - 0.5) / 2
        and abs(found - expected) > SIGNIFICANT * error
        for found, expected, error in zip(pooled.mean, mean, pooled.error, strict=True)
    )


def _range(preprocess: Preprocess) -> tuple[float, float]:
    """The least and the greatest value that pixels can get."""
    pairs = list(zip(preprocess.mean, preprocess.std, strict=True))
    return min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)


def _warning(code: str, message: str) -> Finding:
    return Finding(code, "warning", message)


def _text(values: Triple) -> str:
    return "/".join(f"{value:.3g}" for value in values)
