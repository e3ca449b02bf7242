"""Per-channel statistics of a chain's boundaries.

Ranges need every image: a clip value that no image exceeded is a promise. They stream, and merge
exactly,

    observe(A u B) == merge(observe(A), observe(B)),

since the least of a union is the least of its parts' least. Moments, E[x], E[x^2] and P(x > 0), are
averages that a few images estimate well: they are taken of :mod:`calibration.sample`'s, which are a
function of the set of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.convolution import FloatArray
from calibration.observer import ObservationError
from calibration.parallel import on_all_cores

Float64Array = npt.NDArray[np.float64]


class RangeObserver:
    """The smallest and largest value of each channel, in memory that no image adds to.

    Two observers that have seen the same images are equal, whatever the order and the batches.
    """

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("maximum", "minimum")

    def __init__(self, channels: int) -> None:
        self.minimum = np.full(channels, np.inf)
        self.maximum = np.full(channels, -np.inf)

    def update(self, values: np.ndarray[Any, Any]) -> None:
        """Add a batch ``[n, C, ...]`` of float32.

        Raises:
            ObservationError: another number of channels, or NaN or infinity; nothing is added.
            TypeError: if ``values`` is not a float32 array.
        """
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            found = getattr(values, "dtype", type(values).__name__)
            raise TypeError(f"observed values must be a float32 array, not {found}")
        channels = len(self.minimum)
        if values.ndim < 2 or values.shape[1] != channels:
            raise ObservationError(f"shape {list(values.shape)} is not [n, {channels}, ...]")
        if values.size == 0:
            return
        if not np.isfinite(values).all():
            bad = values.size - int(np.count_nonzero(np.isfinite(values)))
            raise ObservationError(f"{bad} of {values.size} values are NaN or infinite")
        by_image = values.reshape(len(values), channels, -1)
        self.add(by_image.min(axis=2), by_image.max(axis=2))

    def add(self, minima: FloatArray, maxima: FloatArray) -> None:
        """Add the smallest and largest value of each image and channel, ``[n, C]`` each.

        Raises:
            ObservationError: if one is NaN or infinite; nothing is added.
        """
        bad = int(np.count_nonzero(~(np.isfinite(minima) & np.isfinite(maxima))))
        if bad:
            raise ObservationError(f"{bad} of {minima.size} channels hold NaN or infinity")
        # Adding 0.0 turns -0.0 into 0.0.
        self.minimum = np.minimum(self.minimum, minima.min(axis=0) + 0.0)
        self.maximum = np.maximum(self.maximum, maxima.max(axis=0) + 0.0)

    def merge(self, other: RangeObserver) -> RangeObserver:
        """A new observer, equal to one that has seen the images of both; neither is changed."""
        merged = RangeObserver(len(self.minimum))
        merged.minimum = np.minimum(self.minimum, other.minimum)
        merged.maximum = np.maximum(self.maximum, other.maximum)
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeObserver):
            return NotImplemented
        return bool(
            np.array_equal(self.minimum, other.minimum)
            and np.array_equal(self.maximum, other.maximum)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelStatistics:
    """Statistics ``[C]`` of one tensor: range, E[x], E[x^2] and P(x > 0) of each channel."""

    minimum: Float64Array
    maximum: Float64Array
    mean: Float64Array
    mean_square: Float64Array
    positive: Float64Array

    @classmethod
    def of(cls, x: FloatArray) -> ChannelStatistics:
        """Those of a channel-first tensor ``[C, N, ...]``."""
        return cls.with_peaks(x)[0]

    @classmethod
    def with_peaks(cls, x: FloatArray) -> tuple[ChannelStatistics, FloatArray]:
        """Those of a tensor ``[C, N, ...]``, and each image's largest magnitudes ``[N, C]``."""
        pieces = on_all_cores(
            lambda image: _figures(x[:, image : image + 1].reshape(len(x), -1)), range(x.shape[1])
        )
        minima, maxima, sums, squares, positive = map(np.array, zip(*pieces, strict=True))
        count = x[0].size
        statistics = cls(
            minimum=minima.min(axis=0).astype(np.float64),
            maximum=maxima.max(axis=0).astype(np.float64),
            mean=sums.sum(axis=0) / count,
            mean_square=squares.sum(axis=0) / count,
            positive=positive.sum(axis=0) / count,
        )
        return statistics, np.maximum(np.abs(minima), np.abs(maxima))

    @property
    def abs_max(self) -> Float64Array:
        """The largest magnitude of each channel."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def variance(self) -> Float64Array:
        """E[x^2] - E[x]^2, never negative."""
        return np.maximum(self.mean_square - self.mean**2, 0.0)

    def within(self, observed: RangeObserver) -> ChannelStatistics:
        """The same moments with the range of more images, this tensor's among them."""
        return replace(
            self,
            minimum=np.minimum(self.minimum, observed.minimum),
            maximum=np.maximum(self.maximum, observed.maximum),
        )

    def divided_by(self, scales: Float64Array) -> ChannelStatistics:
        """The statistics of ``x / s``, for positive ``scales`` ``[C]``."""
        return ChannelStatistics(
            minimum=self.minimum / scales,
            maximum=self.maximum / scales,
            mean=self.mean / scales,
            mean_square=self.mean_square / scales**2,
            positive=self.positive,
        )


def _figures(x: FloatArray) -> tuple[npt.NDArray[Any], ...]:
    """Minimum, maximum, sums of x and x^2 and how many are positive, by row of ``[C, positions]``.

    Squares of float32 numbers may lie beyond float32.
    """
    exact = x.astype(np.float64)
    return (
        x.min(axis=1),
        x.max(axis=1),
        exact.sum(axis=1),
        np.einsum("cp,cp->c", exact, exact),
        np.count_nonzero(x > 0, axis=1),
    )
