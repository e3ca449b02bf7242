"""The part of an engine's start that only TensorRT-RTX has: kernels compiled here, and their cache.

Full TensorRT compiles nothing at the start, so on it everything here comes to a plain context.
"""

from __future__ import annotations

from typing import Any

from exporter.device.kernel_cache import CacheState, KernelCache, Startup
from exporter.engine import driver
from exporter.engine.capabilities import Capability, probe
from exporter.engine.runtime_cache import create_compiling_context, serialized
from exporter.engine.tensorrt_names import ICudaEngine, IExecutionContext


class CompiledKernels:
    """What ``trt`` compiles for the engine in ``plan``; with ``caching`` it is kept."""

    def __init__(self, trt: Any, plan: bytes, *, caching: bool) -> None:
        self._api = probe(trt)
        self._cache: Any = None
        self._file: KernelCache | None = None
        self._state: CacheState | None = None
        if not self._api.can(Capability.RUNTIME_CACHE):
            return
        self._state = CacheState.OFF
        if caching:
            gpu = f"{driver.device_target() or 'sm'}-{driver.device_name() or 'GPU'}"
            library = f"{trt.__name__}-{self._api.version}"
            self._file = KernelCache(plan, library=library, gpu=gpu)

    def create_context(self, engine: ICudaEngine) -> IExecutionContext | None:
        """An execution context of ``engine``, or None if the library makes none."""
        if self._state is None:
            return engine.create_execution_context()
        content = self._file.read() if self._file else b""
        made = create_compiling_context(
            self._api, engine, caching=self._file is not None, content=content
        )
        self._cache = made.cache
        if self._file is not None and self._cache is None:
            self._file.notes.append("no runtime cache is kept: the library does not take one")
        elif self._file is not None:
            if content and not made.accepted:
                self._file.reject()
            self._state = CacheState.WARM if made.accepted else CacheState.COLD
        return made.context

    def describe(self, startup: Startup) -> None:
        """Say how this start began, and what the cold one took."""
        startup.cache = self._state
        if self._file is not None:
            startup.cold_load_ms = self._file.cold_load_ms
            startup.cold_first_run_ms = self._file.cold_first_run_ms
            startup.notes = self._file.notes

    def keep(self, startup: Startup) -> None:
        """Write the kernels to the cache's file, if the engine ran at all."""
        if self._cache is None or self._file is None or startup.first_run_ms is None:
            return
        self._file.write(
            serialized(self._api, self._cache),
            load_ms=startup.load_ms,
            first_run_ms=startup.first_run_ms,
        )

    def release(self) -> None:
        """Let the library's cache go, after the context and before the engine."""
        self._cache = None
