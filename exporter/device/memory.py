"""The seam to the GPU's memory: allocate, copy, wait, capture. Everything else is TensorRT's.

Two libraries can stand behind it: pycuda, which JetPack users have, and cuda-python, which comes as
binary wheels and also knows CUDA graphs. Each is imported when it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy.typing as npt

from exporter.engine.runtime_modules import require_driver
from exporter.errors import EnvironmentLackError

Array = npt.NDArray[Any]
Work = Callable[[], None]

_INSTALL = (
    "pip install 'repvgg-exporter[cuda]' (binary wheels), or pip install pycuda, which compiles"
)


class DeviceMemory(Protocol):
    """Memory of one GPU and one stream on it.

    Every address that :meth:`allocate` returned is freed by :meth:`close` at the latest. Errors of
    the library arrive as EnvironmentLackError.
    """

    @property
    def name(self) -> str:
        """The library behind it."""
        ...

    @property
    def stream(self) -> int:
        """Handle of the stream on which all copies and executions run, in order."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """The address of ``size_bytes`` bytes on the device."""
        ...

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` returned."""
        ...

    def copy_in(self, address: int, array: Array) -> None:
        """Start copying a contiguous host array to the device; keep it until `synchronize`."""
        ...

    def copy_out(self, array: Array, address: int) -> None:
        """Start copying from the device into a contiguous host array."""
        ...

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        ...

    def capture(self, work: Work) -> Work:
        """Record what ``work`` puts on the stream; the result puts it there again, at once."""
        ...

    def close(self) -> None:
        """Free everything and destroy the stream. Calling it twice does nothing more."""
        ...


@contextmanager
def open_memory(*, graphs: bool = False) -> Iterator[DeviceMemory]:
    """The memory of this machine's GPU; ``graphs`` asks for one that can capture.

    On leaving, all of it has been given back, whatever happened.

    Raises:
        EnvironmentLackError: no driver, or neither library is installed.
    """
    require_driver()
    memory = _open(graphs=graphs)
    try:
        yield memory
    finally:
        memory.close()


def _open(*, graphs: bool) -> DeviceMemory:
    if not graphs and importlib.util.find_spec("pycuda") is not None:
        from exporter.device.pycuda_memory import PycudaMemory

        return PycudaMemory()
    if importlib.util.find_spec("cuda") is not None:
        from exporter.device.cuda_python_memory import CudaPythonMemory

        return CudaPythonMemory()
    if graphs and importlib.util.find_spec("pycuda") is not None:
        raise EnvironmentLackError(
            "CUDA graphs need cuda-python, pycuda has none: pip install 'repvgg-exporter[cuda]'"
        )
    raise EnvironmentLackError(f"neither pycuda nor cuda-python is installed: {_INSTALL}")
