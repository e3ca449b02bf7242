"""A bundle, opened to be run on this machine: its engine on the GPU, or its graph on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum

import numpy as np

from exporter.bundle import ENGINE, ENGINE_SUMMARY, Bundle
from exporter.device.engine_ports import smallest_cuttable
from exporter.device.engine_runner import EngineRunner
from exporter.device.kernel_cache import Startup
from exporter.device.memory import open_memory
from exporter.device.timing import Step
from exporter.engine.runtime_modules import runtime_module
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.files.text_file import read_json
from exporter.profiles import BatchProfile
from exporter.provenance import version
from exporter.running.onnx_runner import Batch, Outputs, Runner
from exporter.running.runnable import require_timeable, runnable
from exporter.spec import choice


class RunBackend(str, Enum):
    """Who runs a bundle; AUTO is the engine where it runs, else ONNX Runtime."""

    AUTO = "auto"
    ENGINE = "engine"
    ONNXRUNTIME = "onnxruntime"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleRunner:
    """A bundle, ready to run.

    ``backend`` is who really runs, never AUTO; ``library`` names it with its version. ``note`` says
    why it is not the engine where AUTO would have preferred that. ``batch`` are the batch sizes
    that one step takes. ``prepare`` sets one batch up and returns what runs it, for stopwatches;
    where a time would say nothing it raises EnvironmentLackError. ``startup`` is complete once the
    runner is closed.
    """

    backend: RunBackend
    library: str
    run: Runner
    batch: BatchProfile
    prepare: Callable[[Batch], Step]
    note: str | None = None
    startup: Startup | None = None

    @property
    def remarks(self) -> str | None:
        """``note`` and what the start had to say, for people; complete once it is closed."""
        words = [self.note] if self.note else []
        return "; ".join(words + (self.startup.notes if self.startup else [])) or None


def require_intact(bundle: Bundle) -> None:
    """Return only if every file is what the manifest says, and none has come in beside it.

    Raises:
        GateFailedError: naming the files that are not.
    """
    damaged = bundle.damaged_files()
    if damaged:
        raise GateFailedError(
            f"bundle {bundle.path}: {', '.join(damaged)} missing or not what the manifest says"
        )
    unlisted = bundle.unlisted_files()
    if unlisted:
        raise GateFailedError(
            f"bundle {bundle.path}: {', '.join(unlisted)} not among the files that the manifest "
            "lists, and no part of the bundle; move it elsewhere"
        )


def input_names(bundle: Bundle) -> tuple[str, ...]:
    """The network's inputs in order; bundles of older versions have one, ``images``."""
    ports = bundle.manifest.get("inputs", [{"name": "images"}])
    return tuple(str(port["name"]) for port in ports)


def output_names(bundle: Bundle) -> tuple[str, ...]:
    """The network's outputs in order; bundles of older versions have one, ``logits``."""
    ports = bundle.manifest.get("outputs", [{"name": "logits"}])
    return tuple(str(port["name"]) for port in ports)


def is_classifier(bundle: Bundle) -> bool:
    """Whether the first output is logits; older bundles all are classifiers and do not say so."""
    return bundle.manifest["model"].get("num_classes", 0) is not None


def batch_profile(bundle: Bundle) -> BatchProfile:
    """The batch sizes that the bundle was made for."""
    return BatchProfile.parse(bundle.manifest["spec"]["batch"])


@contextmanager
def open_runner(
    bundle: Bundle,
    backend: RunBackend,
    *,
    threads: int = 0,
    cuda_graph: bool = False,
    runtime_cache: bool = True,
) -> Iterator[BundleRunner]:
    """Open ``bundle``; on leaving, whatever it held on a device is given back.

    ``threads`` is for ONNX Runtime, 0 means all cores; ``cuda_graph`` is for the engine and keeps
    AUTO from anything else. ``runtime_cache`` keeps the kernels that TensorRT-RTX compiles here.

    Raises:
        EnvironmentLackError: this machine cannot run it: no driver, library or fitting GPU, no
            onnx package where ONNX Runtime needs an emulation.
        InputError: a CUDA graph was asked of ONNX Runtime.
        GateFailedError: ONNX Runtime refuses the graph.
    """
    if cuda_graph and backend is RunBackend.ONNXRUNTIME:
        raise InputError("CUDA graphs belong to the engine, not to ONNX Runtime")
    with ExitStack() as stack:
        note = None
        if backend is not RunBackend.ONNXRUNTIME:
            try:
                runner = _engine(bundle, stack, cuda_graph=cuda_graph, runtime_cache=runtime_cache)
            except EnvironmentLackError as error:
                if backend is RunBackend.ENGINE or cuda_graph:
                    raise
                stack.close()
                note = f"the engine does not run here: {error}"
            else:
                yield runner
                return
        yield _onnxruntime(bundle, threads, note)


def run_bundle(bundle: Bundle, batch: Batch, backend: str) -> Outputs:
    """All outputs for ``batch``, any number of images, by whoever ``backend`` names.

    Raises:
        InputError: no backend has this name.
        As :func:`open_runner`.
    """
    try:
        chosen = choice(RunBackend, "backend", backend)
    except ValueError as error:
        raise InputError(str(error)) from error
    with open_runner(bundle, chosen) as runner:
        return runner.run(batch)


def _engine(
    bundle: Bundle, stack: ExitStack, *, cuda_graph: bool, runtime_cache: bool
) -> BundleRunner:
    name = _engine_backend(bundle)
    trt = runtime_module(name)
    memory = stack.enter_context(open_memory(graphs=cuda_graph))
    engine = stack.enter_context(
        EngineRunner(
            bundle.path / ENGINE,
            trt,
            memory,
            input_names=input_names(bundle),
            runtime_cache=runtime_cache,
        )
    )

    def run(batch: Batch) -> Outputs:
        count = len(batch[0])
        outputs = engine.run(_filled(batch, smallest_cuttable(count, engine.batch_profile)))
        return {output: values[:count] for output, values in outputs.items()}

    return BundleRunner(
        backend=RunBackend.ENGINE,
        library=f"{name} {trt.__version__} with {memory.name}",
        run=run,
        batch=engine.batch_profile,
        prepare=lambda batch: engine.prepare(batch, cuda_graph=cuda_graph),
        startup=engine.startup,
    )


def _engine_backend(bundle: Bundle) -> str:
    """Who made the bundle's engine.

    A file of that name which the manifest does not list is somebody else's: it is not loaded.

    Raises:
        EnvironmentLackError: there is no engine yet.
    """
    if ENGINE not in bundle.manifest["files"] or not (bundle.path / ENGINE).is_file():
        raise EnvironmentLackError(
            f"bundle {bundle.path} holds no engine yet; `repvgg-export build` makes one on the "
            "device"
        )
    try:
        return str(read_json(bundle.path / ENGINE_SUMMARY)["backend"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"bundle {bundle.path}: {ENGINE_SUMMARY} does not say who made the engine ({error!r})"
        ) from error


def _onnxruntime(bundle: Bundle, threads: int, note: str | None) -> BundleRunner:
    precision = bundle.manifest["spec"]["precision"]
    began = time.perf_counter()
    way = runnable(bundle.graph_path, precision, half_scales=bundle.has_half_scales)
    runner = way.open(threads=threads)
    startup = Startup(load_ms=1e3 * (time.perf_counter() - began))

    def prepare(batch: Batch) -> Step:
        require_timeable(precision)

        def step() -> None:
            runner.run_at_once(batch)

        return step

    return BundleRunner(
        backend=RunBackend.ONNXRUNTIME,
        library=f"onnxruntime {version('onnxruntime') or '(version unknown)'} on the CPU",
        run=runner.run,
        batch=batch_profile(bundle),
        prepare=prepare,
        note=note,
        startup=startup,
    )


def _filled(batch: Batch, count: int) -> Batch:
    """``batch`` with its last image repeated up to ``count``."""
    missing = count - len(batch[0])
    if missing <= 0:
        return batch
    return tuple(np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for array in batch)
