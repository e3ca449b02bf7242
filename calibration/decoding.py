"""Image files as batches: decoded while the caller works on the batch before, and once only.

A set of images is looked at many times in an export. Decoding costs more than a small network's
forward pass, so the pixels, a quarter of the size of what is made of them, are kept up to a limit.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from calibration.images import FloatArray, ImageFolder, PixelArray, Preprocess, load_pixels

KEPT_BYTES = 128 << 20
"""850 images of 224 x 224."""
_MOST_THREADS = 8


class PixelMemory:
    """Pixels of files by one :class:`Preprocess`, kept until there are ``limit`` bytes of them.

    ``name`` is like no other's, also in other processes.
    """

    def __init__(self, preprocess: Preprocess, limit: int = KEPT_BYTES) -> None:
        self.preprocess = preprocess
        self.name = uuid.uuid4().hex
        self._room = limit
        self._kept: dict[Path, PixelArray] = {}
        self._lock = threading.Lock()

    def pixels(self, path: Path) -> PixelArray:
        """``[H, W, 3]`` uint8; may be called from several threads.

        Raises:
            ImageDataError: as :func:`calibration.images.load_pixels`.
        """
        found = self._kept.get(path)
        if found is not None:
            return found
        found = load_pixels(path, self.preprocess)
        with self._lock:
            if path not in self._kept and found.nbytes <= self._room:
                self._kept[path] = found
                self._room -= found.nbytes
        return found

    def image(self, path: Path) -> FloatArray:
        """``[3, H, W]`` float32, normalized; raises as :meth:`pixels`."""
        return self.preprocess.normalize(self.pixels(path))


def batches(folder: ImageFolder, memory: PixelMemory, batch_size: int) -> Iterator[FloatArray]:
    """Yield ``[n, 3, H, W]`` float32 batches, ``n <= batch_size``, in the folder's order.

    Raises:
        ImageDataError: naming the first file that cannot be decoded.
        ValueError: if ``batch_size`` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be positive, not {batch_size}")
    chunks = [
        folder.files[start : start + batch_size]
        for start in range(0, len(folder.files), batch_size)
    ]
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS))
    try:
        ahead: list[Future[FloatArray]] = []
        for index in range(len(chunks)):
            now = ahead or [pool.submit(memory.image, path) for path in chunks[index]]
            after = chunks[index + 1] if index + 1 < len(chunks) else ()
            ahead = [pool.submit(memory.image, path) for path in after]
            yield np.stack([image.result() for image in now])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
