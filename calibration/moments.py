"""Per-channel statistics of a tensor, with an exact merge.

For each channel: smallest and largest value, how many are positive, and the sums of ``x`` and
``x^2``. The first three merge exactly as they are. Sums of floating-point numbers do not, so

1. an image's own sum over its positions is one float64 number, a function of that image alone, and
2. these numbers are added *exactly*, as integers: a float64 is ``M 2^E`` with ``|M| < 2^53``, and
   adding ``M 2^(E + 1126)`` to a wide integer loses nothing.

Integer addition is associative, hence the result depends neither on the order of the images nor on
their batches, and ``observe(A u B) == merge(observe(A), observe(B))`` bit for bit.

The wide integer is kept as 16-bit digits in int64 counters, ``sum_k d_k 2^(16 k)``; M is cut into
four pieces of at most 14 bits, each shifted by less than 16, so 2^33 additions fit before a counter
overflows and no carry has to be propagated until the sum is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.observer import ObservationError

Float64Array = npt.NDArray[np.float64]

# The least exponent of a float64's integer mantissa: frexp(2^-1074) = (0.5, -1073), less 53.
_LOWEST = 1126
_DIGIT_BITS = 16
_PIECE_BITS = 14
# Bits of the largest float64 above 2^-1126, and 33 bits of headroom.
_DIGITS = (_LOWEST + 1024 + 33) // _DIGIT_BITS + 1


class ExactSum:
    """Sums of float64 numbers, one per channel, without rounding; read correctly rounded."""

    # Equality is by value and the value changes.
    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("_digits",)

    def __init__(self, channels: int) -> None:
        self._digits = np.zeros((channels, _DIGITS), dtype=np.int64)

    def add(self, values: Float64Array) -> None:
        """Add one finite number to each channel: ``[channels]``."""
        fraction, exponent = np.frexp(values)
        mantissa = np.ldexp(fraction, 53).astype(np.int64)
        place = exponent.astype(np.int64) + (_LOWEST - 53)
        rows = np.arange(len(self._digits))
        for piece in range(4):
            part = mantissa >> (_PIECE_BITS * piece)
            if piece < 3:
                part &= (1 << _PIECE_BITS) - 1
            at = place + _PIECE_BITS * piece
            self._digits[rows, at // _DIGIT_BITS] += part << (at % _DIGIT_BITS)

    def merge(self, other: ExactSum) -> ExactSum:
        """A new sum of both; ValueError if the channels differ."""
        if self._digits.shape != other._digits.shape:
            raise ValueError(f"{len(self._digits)} channels do not merge with {len(other._digits)}")
        merged = ExactSum(len(self._digits))
        merged._digits = self._digits + other._digits
        return merged

    def _carried(self) -> npt.NDArray[np.int64]:
        """The one representation with all digits but the last in ``[0, 2^16)``."""
        digits = self._digits.copy()
        for k in range(_DIGITS - 1):
            digits[:, k + 1] += digits[:, k] >> _DIGIT_BITS
            digits[:, k] &= (1 << _DIGIT_BITS) - 1
        return digits

    def values(self) -> Float64Array:
        """The sums, each the float64 nearest to the exact value."""
        digits = self._carried()
        low = digits[:, :-1].astype("<u2")
        high = digits[:, -1].tolist()
        shift = _DIGIT_BITS * (_DIGITS - 1)
        totals = [
            int.from_bytes(row.tobytes(), "little") + (top << shift)
            for row, top in zip(low, high, strict=True)
        ]
        # Division of integers rounds correctly.
        return np.array([total / (1 << _LOWEST) for total in totals], dtype=np.float64)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExactSum):
            return NotImplemented
        return bool(np.array_equal(self._carried(), other._carried()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelStatistics:
    """Statistics ``[C]`` of one tensor: range, E[x], E[x^2] and P(x > 0) of each channel."""

    minimum: Float64Array
    maximum: Float64Array
    mean: Float64Array
    mean_square: Float64Array
    positive: Float64Array

    @property
    def abs_max(self) -> Float64Array:
        """The largest magnitude of each channel."""
        return np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def variance(self) -> Float64Array:
        """E[x^2] - E[x]^2, never negative."""
        return np.maximum(self.mean_square - self.mean**2, 0.0)

    def divided_by(self, scales: Float64Array) -> ChannelStatistics:
        """The statistics of ``x / s``, for positive ``scales`` ``[C]``."""
        return ChannelStatistics(
            minimum=self.minimum / scales,
            maximum=self.maximum / scales,
            mean=self.mean / scales,
            mean_square=self.mean_square / scales**2,
            positive=self.positive,
        )


class ChannelObserver:
    """Streaming :class:`ChannelStatistics` of one tensor, in memory that no image adds to.

    Two observers that have seen the same images are equal, whatever the order and the batches.
    """

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("_count", "_maximum", "_minimum", "_positive", "_squares", "_sums")

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._minimum = np.full(channels, np.inf)
        self._maximum = np.full(channels, -np.inf)
        self._positive = np.zeros(channels, dtype=np.int64)
        self._sums = ExactSum(channels)
        self._squares = ExactSum(channels)

    def update(self, values: np.ndarray[Any, Any]) -> None:
        """Add a batch ``[n, C, ...]`` of float32.

        Raises:
            ObservationError: another number of channels, or NaN or infinity; nothing is added.
            TypeError: if ``values`` is not a float32 array.
        """
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            found = getattr(values, "dtype", type(values).__name__)
            raise TypeError(f"observed values must be a float32 array, not {found}")
        channels = len(self._positive)
        if values.ndim < 2 or values.shape[1] != channels:
            raise ObservationError(f"shape {list(values.shape)} is not [n, {channels}, ...]")
        if values.size == 0:
            return
        if not np.isfinite(values).all():
            bad = values.size - int(np.count_nonzero(np.isfinite(values)))
            raise ObservationError(f"{bad} of {values.size} values are NaN or infinite")
        for image in values.reshape(len(values), channels, -1):
            # A contiguous float64 row is summed alike in every batch; numpy's casting
            # reductions are cut at buffer limits that move with the batch size.
            exact = image.astype(np.float64, order="C")
            # Adding 0.0 turns -0.0 into 0.0.
            self._minimum = np.minimum(self._minimum, exact.min(axis=1) + 0.0)
            self._maximum = np.maximum(self._maximum, exact.max(axis=1) + 0.0)
            self._positive += np.count_nonzero(image > 0, axis=1)
            self._sums.add(exact.sum(axis=1))
            np.square(exact, out=exact)
            self._squares.add(exact.sum(axis=1))
            self._count += image.shape[1]

    def merge(self, other: ChannelObserver) -> ChannelObserver:
        """A new observer, equal to one that has seen the images of both; neither is changed."""
        merged = ChannelObserver(len(self._positive))
        merged._sums = self._sums.merge(other._sums)
        merged._squares = self._squares.merge(other._squares)
        merged._count = self._count + other._count
        merged._minimum = np.minimum(self._minimum, other._minimum)
        merged._maximum = np.maximum(self._maximum, other._maximum)
        merged._positive = self._positive + other._positive
        return merged

    def statistics(self) -> ChannelStatistics:
        """The statistics so far.

        Raises:
            ObservationError: before the first value.
        """
        if self._count == 0:
            raise ObservationError("the tensor has no values yet; observe some images first")
        return ChannelStatistics(
            minimum=self._minimum.copy(),
            maximum=self._maximum.copy(),
            mean=self._sums.values() / self._count,
            mean_square=self._squares.values() / self._count,
            positive=self._positive / self._count,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelObserver):
            return NotImplemented
        return (
            self._count == other._count
            and bool(np.array_equal(self._minimum, other._minimum))
            and bool(np.array_equal(self._maximum, other._maximum))
            and bool(np.array_equal(self._positive, other._positive))
            and self._sums == other._sums
            and self._squares == other._squares
        )
