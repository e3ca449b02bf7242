"""The process that builds one engine: ``python -m exporter.engine.worker FOLDER``.

The builder is native code that may crash, hang or leak, and that takes one logger per process. So
each build has a process of its own, which does nothing else. `protocol` says what it reads and
leaves. It needs no GPU and no driver, because the targets are named explicitly.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from exporter.engine import build_log, protocol
from exporter.engine.backend import BuildRequest
from exporter.engine.progress import PhaseTracker
from exporter.engine.protocol import Result, Status

_MIB = 1 << 20
_PARSED = 0.05
_BUILT = 0.97
_WORTH_A_LINE = 0.01


class _BadInputError(Exception):
    """The request does not fit the model or the library."""


class _RefusedError(Exception):
    """The parser or the builder refuses the network; ``args`` are its own words."""


class _ProgressPrinter:
    """Progress as JSON lines; remembers when nobody listens any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ("", -1.0)
        self.abandoned = False

    def say(self, phase: str, fraction: float) -> None:
        """Print, unless nothing worth a line has changed."""
        if phase == self._last[0] and fraction - self._last[1] < _WORTH_A_LINE:
            return
        self._last = (phase, fraction)
        try:
            print(json.dumps({"phase": phase, "fraction": fraction}), file=self._stream, flush=True)
        except OSError:
            self.abandoned = True


def _make_logger(trt: Any, file: TextIO) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Writes every message at once, so that a crash leaves a log."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            file.write(build_log.format_record(severity.name, msg))
            file.flush()

    return Logger()


def _make_monitor(trt: Any, printer: _ProgressPrinter) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Cancels the build when the waiting process has gone."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = PhaseTracker()

        def phase_start(self, phase_name: str, _parent: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, num_steps)
            self._say(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.step(phase_name, step)
            self._say(phase_name)
            return not printer.abandoned

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

        def _say(self, phase: str) -> None:
            printer.say(phase, _PARSED + (_BUILT - _PARSED) * self._phases.fraction)

    return Monitor()


def _parse(trt: ModuleType, network: Any, logger: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse_from_file(str(path)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    raise _RefusedError(
        *(
            f"{error.node_name() or 'model'} ({error.node_operator() or 'ONNX'}): "
            f"{build_log.without_noise(error.desc())}"
            for error in errors
        )
    )


def _set_profile(builder: Any, network: Any, config: Any, request: BuildRequest) -> None:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *_profile_shapes(tensor.name, tuple(tensor.shape), request))
    if config.add_optimization_profile(profile) < 0:
        size = "" if request.size is None else f", size {request.size}"
        raise _RefusedError(f"the builder rejects the profile batch {request.batch}{size}")


def _profile_shapes(name: str, shape: tuple[int, ...], request: BuildRequest) -> list[list[int]]:
    """The input's smallest, usual and largest shape: open extents come from the request."""
    batch, size = request.batch, request.size
    first, *rest = shape
    extents = [(extent,) * 3 for extent in shape]
    if first >= 0 and {batch.min, batch.opt, batch.max} != {first}:
        raise _BadInputError(
            f"input {name!r} has a fixed batch of {first}, but batch {batch} was asked "
            "for: export the model with an open batch, or ask for this one"
        )
    extents[0] = (batch.min, batch.opt, batch.max)
    if size is not None and len(shape) == 4:
        for axis, opened in ((2, size.height), (3, size.width)):
            extents[axis] = opened if shape[axis] < 0 else extents[axis]
    if any(extent < 0 for low in extents for extent in low):
        allowed = "only the batch" if size is None else "only batch, height and width"
        raise _BadInputError(
            f"input {name!r} has shape {[first, *rest]}: {allowed} may be open (-1)"
        )
    return [list(corner) for corner in zip(*extents, strict=True)]


def _set_targets(trt: ModuleType, config: Any, request: BuildRequest) -> None:
    config.num_compute_capabilities = len(request.targets)
    for index, target in enumerate(request.targets):
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise _BadInputError(f"tensorrt_rtx {trt.__version__} cannot build for {target}")


def _configure(trt: ModuleType, builder: Any, network: Any, request: BuildRequest) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # On by default, it would quietly give fp32 the 10-bit mantissa of TF32.
    config.clear_flag(trt.BuilderFlag.TF32)
    if request.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib * _MIB)
    _set_targets(trt, config, request)
    _set_profile(builder, network, config, request)
    return config


def _build(trt: ModuleType, logger: Any, printer: _ProgressPrinter, request: BuildRequest) -> Any:
    """Return the serialized plan, a buffer.

    Raises:
        _RefusedError: with the parser's words, or without any where the builder only logs them.
    """
    printer.say("Reading the network", 0.0)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    _parse(trt, network, logger, request.onnx_path)
    config = _configure(trt, builder, network, request)
    # The configuration keeps no reference of its own to the monitor.
    monitor = _make_monitor(trt, printer)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _RefusedError
    return plan


def _run(folder: Path, printer: _ProgressPrinter) -> Result:
    request = protocol.request_from_json((folder / protocol.REQUEST).read_text(encoding="utf-8"))
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError) as error:
        return Result(status=Status.LACKING, errors=(f"tensorrt_rtx does not load: {error}",))
    log_path = folder / protocol.LOG
    with log_path.open("w", encoding="utf-8") as log:
        try:
            plan = _build(trt, _make_logger(trt, log), printer, request)
        except _BadInputError as error:
            return Result(status=Status.BAD_INPUT, errors=(str(error),))
        except _RefusedError as error:
            records = build_log.read_records(log_path.read_text(encoding="utf-8"))
            logged = build_log.messages(records, "ERROR", "INTERNAL_ERROR")
            errors = error.args or logged or ("the builder gives no reason",)
            return Result(status=Status.REFUSED, errors=tuple(str(part) for part in errors))
    printer.say("Writing the plan", _BUILT)
    (folder / protocol.PLAN).write_bytes(plan)
    printer.say("Engine built", 1.0)
    return Result(status=Status.BUILT, version=str(trt.__version__))


def _private_stdout() -> TextIO:
    """The real standard output; whatever else prints there goes to standard error from now on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def main(arguments: list[str]) -> int:
    """Build what ``arguments[0]``, the folder, asks for; 0 if a result was left there."""
    folder = Path(arguments[0])
    with _private_stdout() as stream:
        _run(folder, _ProgressPrinter(stream)).write(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
