"""Streaming statistics of the tensors between layers, with an exact merge.

The histogram
-------------
A symmetric scale looks only at magnitudes, so ``|x|`` is counted, in ``B = 8192`` bins of one
width ``2^e``: bin ``i`` counts ``i 2^e <= |x| < (i + 1) 2^e``. The exponent is a function of the
largest magnitude ``a`` alone,

    e(a) = the smallest integer e >= -126 with a < B 2^e,

and every law of this module follows from two facts.

1. *Binning is exact.* Multiplying a float32 by a power of two is exact, or underflows to something
   below 1, whose floor is 0 either way. So ``floor(|x| / 2^e)`` carries no rounding error, for
   subnormals, for powers of two and for 1e38 alike. ``e >= -126`` keeps ``2^-e`` finite.
2. *Bins nest.* ``floor(floor(y) / 2) = floor(y / 2)``: adding the counts of neighbouring bins gives
   exactly the histogram of twice the width.

When a larger value arrives, pairs of bins are added until the width is ``2^e(a)`` again. By 2 this
is the histogram that one look at all the values would have given. Hence no second pass, no
dependence on the order of the values or on how they were cut into batches, and

    observe(A u B) == merge(observe(A), observe(B))    bit for bit.

Why 8192: at least half of the bins are in use (unless ``a < 2^-114``), so a clip value as low as
``a / 32`` still spans 128 bins, one for each INT8 level; outlier channels of that size are what
calibration is up against. Counting takes the same time for 2048 to 16384 bins, and 8192 counters
are 64 KiB a tensor, whatever the number of images.

Exact zeros are counted apart, in no bin: half of a ReLU's output is zero, zero is represented
exactly at any scale, so zeros must not weigh in the choice of a clip value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
CountArray = npt.NDArray[np.int64]

BINS = 8192
_BINS_LOG2 = 13
_MIN_EXPONENT = -126
# Values per inner step: small enough for its buffers to stay in the L2 cache.
_CHUNK = 1 << 15


class ObservationError(ValueError):
    """The network's tensors cannot be observed; the message names the tensor and the reason."""


def _exponent(abs_max: float) -> int:
    """The canonical ``e(a)`` of the module docstring."""
    if abs_max == 0:
        return _MIN_EXPONENT
    return max(math.frexp(abs_max)[1] - _BINS_LOG2, _MIN_EXPONENT)


def _coalesce(histogram: CountArray, steps: int) -> CountArray:
    """The histogram of bins ``2^steps`` times as wide; the sum of the counts is kept."""
    merged = np.zeros_like(histogram)
    group = 1 << min(steps, _BINS_LOG2)
    merged[: BINS // group] = histogram.reshape(-1, group).sum(axis=1)
    return merged


class TensorObserver:
    """Count, range and magnitude histogram of one tensor, in constant memory.

    Two observers that have seen the same values are equal, whatever the order and the batches.
    """

    # Equality is by value and the value changes, so an observer has no hash.
    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("_count", "_exponent", "_histogram", "_maximum", "_minimum", "_zeros")

    def __init__(self) -> None:
        self._count = 0
        self._zeros = 0
        self._minimum = math.inf
        self._maximum = -math.inf
        self._exponent = _MIN_EXPONENT
        self._histogram: CountArray = np.zeros(BINS, dtype=np.int64)

    def update(self, values: np.ndarray[Any, Any]) -> None:
        """Add ``values``: float32, any shape and memory layout; an empty array adds nothing.

        Raises:
            ObservationError: naming the count, if a value is NaN or infinite; nothing is added.
            TypeError: if ``values`` is not a float32 array.
        """
        if not isinstance(values, np.ndarray) or values.dtype != np.float32:
            found = getattr(values, "dtype", type(values).__name__)
            raise TypeError(f"observed values must be a float32 array, not {found}")
        if values.size == 0:
            return
        # "K" reads in memory order, so a transposed tensor costs no copy; order does not matter.
        flat = values.ravel(order="K")
        with np.errstate(invalid="ignore"):
            lowest, highest = float(flat.min()), float(flat.max())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            bad = flat.size - int(np.count_nonzero(np.isfinite(flat)))
            raise ObservationError(f"{bad} of {flat.size} values are NaN or infinite")
        # Adding 0.0 turns -0.0 into 0.0; which of the two min() returns depends on the order.
        self._minimum = min(self._minimum, lowest + 0.0)
        self._maximum = max(self._maximum, highest + 0.0)
        self._grow(_exponent(max(abs(lowest), abs(highest))))
        self._add(flat)

    def _grow(self, exponent: int) -> None:
        if exponent > self._exponent:
            self._histogram = _coalesce(self._histogram, exponent - self._exponent)
            self._exponent = exponent

    def _add(self, flat: FloatArray) -> None:
        size = min(flat.size, _CHUNK)
        scaled = np.empty(size, dtype=np.float32)
        index = np.empty(size, dtype=np.intp)
        occupied = np.empty(size, dtype=np.bool_)
        per_width = np.float32(math.ldexp(1.0, -self._exponent))
        nonzero = 0
        with np.errstate(under="ignore"):
            for start in range(0, flat.size, _CHUNK):
                part = flat[start : start + _CHUNK]
                n = part.size
                np.multiply(part, per_width, out=scaled[:n])
                np.abs(scaled[:n], out=scaled[:n])
                # Truncation is floor here. With intp indices add.at beats bincount by a third.
                np.copyto(index[:n], scaled[:n], casting="unsafe")
                np.add.at(self._histogram, index[:n], 1)
                np.not_equal(part, 0.0, out=occupied[:n])
                nonzero += int(np.count_nonzero(occupied[:n]))
        zeros = flat.size - nonzero
        self._histogram[0] -= zeros
        self._zeros += zeros
        self._count += flat.size

    def merge(self, other: TensorObserver) -> TensorObserver:
        """A new observer, equal to one that has seen the values of both; neither is changed."""
        merged = TensorObserver()
        merged._count = self._count + other._count
        merged._zeros = self._zeros + other._zeros
        merged._minimum = min(self._minimum, other._minimum)
        merged._maximum = max(self._maximum, other._maximum)
        merged._exponent = max(self._exponent, other._exponent)
        merged._histogram = _coalesce(
            self._histogram, merged._exponent - self._exponent
        ) + _coalesce(other._histogram, merged._exponent - other._exponent)
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorObserver):
            return NotImplemented
        return (
            self._count == other._count
            and self._zeros == other._zeros
            and self._minimum == other._minimum
            and self._maximum == other._maximum
            and self._exponent == other._exponent
            and bool(np.array_equal(self._histogram, other._histogram))
        )

    def __repr__(self) -> str:
        if self._count == 0:
            return "TensorObserver(count=0)"
        return f"TensorObserver(count={self._count}, range=[{self._minimum:g}, {self._maximum:g}])"

    @property
    def count(self) -> int:
        """Number of values seen, zeros included: ``zeros + histogram.sum()``."""
        return self._count

    @property
    def zeros(self) -> int:
        """Number of values that were exactly 0.0 or -0.0."""
        return self._zeros

    @property
    def minimum(self) -> float:
        """The smallest value; ValueError before the first."""
        self._require_values()
        return self._minimum

    @property
    def maximum(self) -> float:
        """The largest value; ValueError before the first."""
        self._require_values()
        return self._maximum

    @property
    def abs_max(self) -> float:
        """The largest magnitude; 0.0 for an all-zero tensor; ValueError before the first value."""
        return max(abs(self.minimum), abs(self.maximum))

    @property
    def histogram(self) -> CountArray:
        """Counts of the non-zero magnitudes, int64 ``[8192]``; a copy."""
        return self._histogram.copy()

    @property
    def bin_width(self) -> float:
        """Width of a bin in the tensor's units, a power of two."""
        return math.ldexp(1.0, self._exponent)

    def _require_values(self) -> None:
        if self._count == 0:
            raise ObservationError("the tensor has no values yet; observe some images first")


def observe(
    run: Callable[[FloatArray], Mapping[str, FloatArray]],
    batches: Iterable[FloatArray],
    progress: Callable[[int], None] | None = None,
    *,
    first: int = 0,
) -> dict[str, TensorObserver]:
    """Observe every tensor that ``run`` returns, in one pass over ``batches``.

    ``run`` maps a batch ``[n, ...]`` to float32 tensors by name. ``progress`` receives the number
    of images seen so far, after each batch; errors count them from ``first``. Memory does not grow
    with the number of images; the result depends neither on the order nor on the size of the
    batches, provided that ``run`` computes each image alike whatever its neighbours.

    Raises:
        ObservationError: no images; no tensors; a tensor that comes and goes between batches, is
            empty, or holds NaN or infinity. The message names the tensor.
        TypeError: naming the tensor, if it is not float32.
    """
    observers: dict[str, TensorObserver] = {}
    images = 0
    for batch in batches:
        if len(batch) == 0:
            continue
        tensors = run(batch)
        if images == 0:
            observers = {name: TensorObserver() for name in tensors}
        _require_same_names(set(observers), set(tensors), first + images)
        for name, observer in observers.items():
            try:
                observer.update(tensors[name])
            except (ObservationError, TypeError) as error:
                start = first + images
                where = f"tensor {name!r}, images {start} to {start + len(batch) - 1}"
                raise type(error)(f"{where}: {error}") from error
        images += len(batch)
        if progress is not None:
            progress(images)
    if images == 0:
        raise ObservationError("there are no calibration images; give at least one")
    if not observers:
        raise ObservationError("the network returned no tensors to observe")
    for name, observer in observers.items():
        if observer.count == 0:
            raise ObservationError(f"tensor {name!r} is empty for every image")
    return observers


def _require_same_names(expected: set[str], found: set[str], images: int) -> None:
    if missing := sorted(expected - found):
        raise ObservationError(f"tensor {missing[0]!r} is missing after {images} images")
    if added := sorted(found - expected):
        raise ObservationError(f"tensor {added[0]!r} first appears after {images} images")


def merge_observations(
    left: Mapping[str, TensorObserver], right: Mapping[str, TensorObserver]
) -> dict[str, TensorObserver]:
    """Merge two results of :func:`observe` over disjoint image sets, tensor by tensor.

    Raises:
        ObservationError: naming the first tensor that only one side has.
    """
    if only := sorted(set(left) ^ set(right)):
        raise ObservationError(f"tensor {only[0]!r} was observed on one side only")
    return {name: observer.merge(right[name]) for name, observer in left.items()}
