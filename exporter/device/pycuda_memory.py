"""Device memory through pycuda."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from exporter.device.memory import Array, Work
from exporter.errors import EnvironmentLackError


class PycudaMemory:
    """See :class:`exporter.device.memory.DeviceMemory`.

    It works in the primary context of the first GPU, which is the one that TensorRT uses too.
    """

    name = "pycuda"

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("pycuda.driver")
        except (ImportError, OSError) as error:
            raise EnvironmentLackError(f"pycuda does not load: {error}") from error
        self._allocations: dict[int, Any] = {}
        self._context: Any = None
        with self._translated("starting CUDA"):
            self._cuda.init()
            context = self._cuda.Device(0).retain_primary_context()
            context.push()
            self._context = context
        try:
            with self._translated("creating a stream"):
                self._stream = self._cuda.Stream()
        except BaseException:
            self.close()
            raise

    @property
    def stream(self) -> int:
        return int(self._stream.handle)

    def allocate(self, size_bytes: int) -> int:
        with self._translated(f"allocating {size_bytes} bytes"):
            allocation = self._cuda.mem_alloc(size_bytes)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, address: int) -> None:
        with self._translated("freeing memory"):
            self._allocations.pop(address).free()

    def copy_in(self, address: int, array: Array) -> None:
        with self._translated("copying to the GPU"):
            self._cuda.memcpy_htod_async(address, array, self._stream)

    def copy_out(self, array: Array, address: int) -> None:
        with self._translated("copying from the GPU"):
            self._cuda.memcpy_dtoh_async(array, address, self._stream)

    def synchronize(self) -> None:
        with self._translated("waiting for the GPU"):
            self._stream.synchronize()

    def capture(self, work: Work) -> Work:  # noqa: ARG002
        raise EnvironmentLackError(
            "CUDA graphs need cuda-python, pycuda has none: pip install 'repvgg-exporter[cuda]'"
        )

    def close(self) -> None:
        """Gives everything back even where a call fails; the first failure is then raised."""
        failures: list[EnvironmentLackError] = []
        while self._allocations:
            try:
                self.free(next(reversed(self._allocations)))
            except EnvironmentLackError as error:
                failures.append(error)
        # Destroyed by its last reference, which must not outlive the context.
        self._stream = None
        if self._context is not None:
            context, self._context = self._context, None
            context.pop()
            context.detach()
        if failures:
            raise failures[0]

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (self._cuda.Error, self._cuda.MemoryError) as error:
            raise EnvironmentLackError(f"CUDA: {doing} failed: {error}") from error
