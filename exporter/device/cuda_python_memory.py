"""Device memory through cuda-python, whose functions return ``(error, result, ...)``."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

from exporter.device.memory import Array, Work
from exporter.errors import EnvironmentLackError


def _runtime() -> Any:
    """The CUDA runtime's functions; releases before 12.6 have them under another name."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError) as error:
            raise EnvironmentLackError(f"cuda-python does not load: {error}") from error
    raise EnvironmentLackError(
        "the package 'cuda' holds no runtime: pip install 'repvgg-exporter[cuda]'"
    )


class CudaPythonMemory:
    """See :class:`exporter.device.memory.DeviceMemory`. Allocations belong to the first GPU."""

    name = "cuda-python"

    def __init__(self) -> None:
        self._cuda = _runtime()
        self._addresses: dict[int, None] = {}
        self._graphs: list[Any] = []
        self._stream = self._call("cudaStreamCreate")

    @property
    def stream(self) -> int:
        return int(self._stream)

    def allocate(self, size_bytes: int) -> int:
        address = int(self._call("cudaMalloc", size_bytes))
        self._addresses[address] = None
        return address

    def free(self, address: int) -> None:
        self._call("cudaFree", address)
        del self._addresses[address]

    def copy_in(self, address: int, array: Array) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def copy_out(self, array: Array, address: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, work: Work) -> Work:
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # A stream that still captures can do nothing else.
            with contextlib.suppress(EnvironmentLackError):
                self._call("cudaGraphDestroy", self._call("cudaStreamEndCapture", self._stream))
            raise
        graph = self._call("cudaStreamEndCapture", self._stream)
        try:
            executable = self._call("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        self._graphs.append(executable)

        def launch() -> None:
            self._call("cudaGraphLaunch", executable, self._stream)

        return launch

    def close(self) -> None:
        """Gives everything back even where a call fails; the first failure is then raised."""
        failures: list[EnvironmentLackError] = []

        def attempt(function: str, argument: Any) -> None:
            try:
                self._call(function, argument)
            except EnvironmentLackError as error:
                failures.append(error)

        while self._graphs:
            attempt("cudaGraphExecDestroy", self._graphs.pop())
        while self._addresses:
            attempt("cudaFree", self._addresses.popitem()[0])
        if self._stream is not None:
            stream, self._stream = self._stream, None
            attempt("cudaStreamDestroy", stream)
        if failures:
            raise failures[0]

    def _call(self, function: str, *arguments: Any) -> Any:
        """The result, or None where the function has none."""
        error, *results = getattr(self._cuda, function)(*arguments)
        if int(error) != 0:
            words = self._cuda.cudaGetErrorString(error)[1]
            text = words.decode() if isinstance(words, bytes) else str(words)
            raise EnvironmentLackError(f"CUDA: {function} failed: {text} (error {int(error)})")
        return results[0] if results else None
