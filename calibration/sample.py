"""A fixed-size sample of a stream of images that does not depend on their order.

Each image has a digest of its bytes; the sample is the images with the smallest digests. That
is a random choice in effect and a function of the *set* of images: neither order nor batches
matter, a repeated image counts once, and

    sample(A u B) == merge(sample(A), sample(B)),

because the smallest of a union are among the smallest of its parts.
"""

from __future__ import annotations

import functools
import hashlib
import heapq

import numpy as np
import numpy.typing as npt

from calibration.observer import ObservationError

FloatArray = npt.NDArray[np.float32]

_PIXELS = 32 * 224 * 224
"""Second-order rounding needs positions: smaller images make up for it by their number."""
MINIMUM_IMAGES = 32
MAXIMUM_IMAGES = 512


def sample_size(image_size: tuple[int, int]) -> int:
    """How many images of ``image_size`` sequential quantization should see, 32 to 512."""
    wanted = _PIXELS // (image_size[0] * image_size[1])
    return min(max(wanted, MINIMUM_IMAGES), MAXIMUM_IMAGES)


def fingerprint(image: FloatArray) -> bytes:
    """A digest of the bytes of ``image``; equal for different ones with probability 2^-60.

    Words w of 64 bits times random odd numbers, added up modulo 2^64, and that hashed: a hash meant
    against forgery would read all calibration images at a third of the speed, and nobody gains from
    two images that are taken for one.
    """
    data = np.ascontiguousarray(image).reshape(-1).view(np.uint8)
    words = np.zeros(-(-len(data) // 8), dtype=np.uint64)
    words.view(np.uint8)[: len(data)] = data
    # Two differences in the highest bits alone would cancel out.
    words ^= words >> np.uint64(31)
    words *= _multipliers(len(words))
    total = int(words.sum(dtype=np.uint64))
    text = f"{image.shape} {total}"
    return hashlib.sha256(text.encode()).digest()


@functools.lru_cache(maxsize=4)
def _multipliers(count: int) -> npt.NDArray[np.uint64]:
    numbers = np.random.default_rng(2021).integers(0, 2**63, count, dtype=np.uint64)
    return numbers * np.uint64(2) + np.uint64(1)


class ImageSample:
    """At most ``size`` images ``[C, H, W]`` of those seen, in the order of their digests."""

    __hash__ = None  # type: ignore[assignment]
    __slots__ = ("_kept", "_size")

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a sample holds at least one image, not {size}")
        self._size = size
        self._kept: dict[bytes, FloatArray] = {}

    def update(self, images: FloatArray) -> None:
        """Consider a batch ``[n, C, H, W]`` of float32."""
        for image in images:
            self._consider(fingerprint(image), image)

    def _consider(self, digest: bytes, image: FloatArray) -> None:
        if digest in self._kept:
            return
        if len(self._kept) == self._size:
            largest = max(self._kept)
            if digest > largest:
                return
            del self._kept[largest]
        self._kept[digest] = np.array(image, dtype=np.float32)

    def merge(self, other: ImageSample) -> ImageSample:
        """A new sample, equal to one that has seen the images of both.

        Raises:
            ObservationError: if the two have different sizes.
        """
        if self._size != other._size:
            raise ObservationError(f"samples of {self._size} and {other._size} do not merge")
        merged = ImageSample(self._size)
        union = {**self._kept, **other._kept}
        merged._kept = {digest: union[digest] for digest in heapq.nsmallest(self._size, union)}
        return merged

    @property
    def images(self) -> FloatArray:
        """``[n, C, H, W]``; ObservationError before the first image."""
        if not self._kept:
            raise ObservationError("there are no calibration images; give at least one")
        return np.stack([self._kept[digest] for digest in sorted(self._kept)])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageSample):
            return NotImplemented
        return self._size == other._size and self._kept.keys() == other._kept.keys()
