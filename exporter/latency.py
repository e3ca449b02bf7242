"""How long a bundle takes: latency and throughput over batch sizes, and one bundle against another.

A run is timed from the moment the inputs lie ready to the moment the outputs do: on the GPU both
are in its memory, and copies from and to the host are not part of it. How times become figures:
`device.timing`. What the start took is told apart: `device.kernel_cache`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.bundle import Bundle
from exporter.device import BundleRunner, RunBackend, open_runner, require_intact
from exporter.device.timing import (
    DEFAULT_EFFORT,
    Clock,
    Effort,
    Latency,
    Ratio,
    Step,
    rounds_of,
    timed,
)
from exporter.errors import InputError
from exporter.profiles import BatchProfile
from exporter.running.onnx_runner import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One bundle on one machine. ``threads`` is None where an engine ran, 0 means all cores.

    ``load_ms``, ``first_run_ms`` and the ``cold_`` figures are those of
    :class:`exporter.device.kernel_cache.Startup`, ``runtime_cache`` is its ``cache`` as text.
    """

    bundle: str
    precision: str
    backend: str
    library: str
    threads: int | None
    cuda_graph: bool
    warmup: int
    rows: tuple[Latency, ...]
    load_ms: float | None = None
    first_run_ms: float | None = None
    runtime_cache: str | None = None
    cold_load_ms: float | None = None
    cold_first_run_ms: float | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        times = {
            name: round(value, 3)
            for name, value in fields.items()
            if name.endswith("_ms") and value is not None
        }
        return {**fields, **times, "rows": [row.to_json() for row in self.rows]}


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Two bundles in one interleaved run; ``ratios`` are those of the second to the first."""

    first: Benchmark
    second: Benchmark
    ratios: tuple[Ratio, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "first": self.first.to_json(),
            "second": self.second.to_json(),
            "ratios": [ratio.to_json() for ratio in self.ratios],
        }


def benchmark(
    bundle: Bundle,
    backend: RunBackend = RunBackend.AUTO,
    *,
    batches: Sequence[int] = (),
    effort: Effort = DEFAULT_EFFORT,
    threads: int = 0,
    cuda_graph: bool = False,
    runtime_cache: bool = True,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Time ``bundle`` at each of ``batches``; without any, at its profile's three.

    ``runtime_cache`` keeps the kernels that TensorRT-RTX compiles here: the first start is cold,
    the next one warm.

    Raises:
        GateFailedError: a file of the bundle is damaged, or its graph or engine does not run.
        InputError: a batch is outside the profile, or a CUDA graph was asked of ONNX Runtime.
        EnvironmentLackError: ``backend`` cannot run here.
    """
    require_intact(bundle)
    with open_runner(
        bundle, backend, threads=threads, cuda_graph=cuda_graph, runtime_cache=runtime_cache
    ) as runner:
        rows = []
        for size in _sizes(batches, (runner.batch,)):
            step = _warm(runner, _inputs(bundle, size), effort)
            rows.append(Latency.of(size, timed(step, effort, clock)))
    return _result(bundle, runner, rows, threads=threads, cuda_graph=cuda_graph, effort=effort)


def compare(
    first: Bundle,
    second: Bundle,
    backend: RunBackend = RunBackend.AUTO,
    *,
    batches: Sequence[int] = (),
    effort: Effort = DEFAULT_EFFORT,
    threads: int = 0,
    cuda_graph: bool = False,
    runtime_cache: bool = True,
    clock: Clock = time.perf_counter,
) -> SideBySide:
    """Time two bundles in turns; ``effort.seconds`` is for both together, per batch size.

    Raises:
        As :func:`benchmark`, and InputError where only one of them can run its engine.
    """
    bundles = (first, second)
    for bundle in bundles:
        require_intact(bundle)
    with ExitStack() as stack:
        runners = [
            stack.enter_context(
                open_runner(
                    b, backend, threads=threads, cuda_graph=cuda_graph, runtime_cache=runtime_cache
                )
            )
            for b in bundles
        ]
        if runners[0].backend is not runners[1].backend:
            raise InputError(
                f"{first.path} runs by {runners[0].backend} and {second.path} by "
                f"{runners[1].backend}: such times cannot be compared; name one with --backend"
            )
        rows: tuple[list[Latency], list[Latency]] = ([], [])
        ratios = []
        for size in _sizes(batches, [runner.batch for runner in runners]):
            steps = [
                _warm(runner, _inputs(bundle, size), effort)
                for runner, bundle in zip(runners, bundles, strict=True)
            ]
            rounds = rounds_of(steps, effort, clock)
            ratios.append(Ratio.of(size, rounds))
            for side in (0, 1):
                times = [seconds for pair in rounds for seconds in pair[side]]
                rows[side].append(Latency.of(size, times))
    one, other = (
        _result(bundle, runner, found, threads=threads, cuda_graph=cuda_graph, effort=effort)
        for bundle, runner, found in zip(bundles, runners, rows, strict=True)
    )
    return SideBySide(first=one, second=other, ratios=tuple(ratios))


def _sizes(wanted: Sequence[int], profiles: Sequence[BatchProfile]) -> tuple[int, ...]:
    """The batch sizes to time, each once, ascending."""
    shared = (max(p.min for p in profiles), min(p.max for p in profiles))
    usual = {size for p in profiles for size in (p.min, p.opt, p.max)}
    sizes = sorted(set(wanted) or {size for size in usual if shared[0] <= size <= shared[1]})
    for size in sizes:
        for profile in profiles:
            if not profile.min <= size <= profile.max:
                raise InputError(f"batch {size} is outside the bundle's profile {profile}")
    if not sizes:
        raise InputError(f"no batch size is in both profiles {' and '.join(map(str, profiles))}")
    return tuple(sizes)


def _inputs(bundle: Bundle, size: int) -> Batch:
    """The bundle's reference inputs, repeated to ``size`` images."""
    inputs, _ = bundle.reference()
    arrays = inputs if isinstance(inputs, tuple) else (inputs,)
    return tuple(np.ascontiguousarray(np.resize(a, (size, *a.shape[1:]))) for a in arrays)


def _warm(runner: BundleRunner, batch: Batch, effort: Effort) -> Step:
    step = runner.prepare(batch)
    for _ in range(effort.warmup):
        step()
    return step


def _result(
    bundle: Bundle,
    runner: BundleRunner,
    rows: Sequence[Latency],
    *,
    threads: int,
    cuda_graph: bool,
    effort: Effort,
) -> Benchmark:
    start = runner.startup
    return Benchmark(
        bundle=str(bundle.path),
        precision=bundle.manifest["spec"]["precision"],
        backend=str(runner.backend),
        library=runner.library,
        threads=None if runner.backend is RunBackend.ENGINE else threads,
        cuda_graph=cuda_graph,
        warmup=effort.warmup,
        rows=tuple(rows),
        load_ms=start.load_ms if start else None,
        first_run_ms=start.first_run_ms if start else None,
        runtime_cache=str(start.cache) if start and start.cache else None,
        cold_load_ms=start.cold_load_ms if start else None,
        cold_first_run_ms=start.cold_first_run_ms if start else None,
        note=runner.remarks,
    )
