"""The process that builds one engine: ``python -m exporter.engine.worker LIBRARY FOLDER``.

The builder is native code that may crash, hang or leak, and that takes one logger per process. So
each build has a process of its own, which does nothing else. `protocol` says what it reads and
leaves. LIBRARY is ``tensorrt_rtx`` or ``tensorrt``; both are driven by the same code, which asks
the module what it can do. TensorRT-RTX needs no GPU and no driver, because its targets are named
explicitly; full TensorRT builds for the GPU it runs on.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from exporter.engine import build_log, protocol
from exporter.engine.approach import choose_approach
from exporter.engine.backend import BuildRequest
from exporter.engine.builder_config import configure, write_timing_cache
from exporter.engine.callbacks import make_logger, watch
from exporter.engine.capabilities import Api, Capability, probe
from exporter.engine.layer_inspection import inspect_plan
from exporter.engine.legacy_int8 import cache_for, set_calibrator
from exporter.engine.network_parser import create_network, parse
from exporter.engine.protocol import Result, Status
from exporter.engine.refusal import BadInputError, RefusedError
from exporter.engine.summary import EngineTyping
from exporter.engine.tensorrt_names import IHostMemory, ILogger
from exporter.files.private_folder import FULL

_PARSED = 0.05
_BUILT = 0.97
_WORTH_A_LINE = 0.01
_PR_SET_PDEATHSIG = 1
_INSPECTED = "tensorrt"
"""The library whose plans are read back for their verdict: it builds where they can be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A serialized plan, a buffer, and what people should know about it."""

    plan: IHostMemory
    layers: str | None
    notes: tuple[str, ...]
    typing: EngineTyping


class ProgressPrinter:
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


def build(
    api: Api, library: str, logger: ILogger, printer: ProgressPrinter, request: BuildRequest
) -> Built:
    """Build, and inspect where that is possible.

    Raises:
        BadInputError: the library cannot do what is asked.
        RefusedError: with the parser's words, or without any where the builder only logs them.
    """

    def say(phase: str, fraction: float) -> bool:
        printer.say(phase, _PARSED + (_BUILT - _PARSED) * fraction)
        return not printer.abandoned

    way = choose_approach(request, api.capabilities, f"{library} {api.version}")
    printer.say("Reading the network", 0.0)
    builder = api.trt.Builder(logger)
    network = create_network(api, builder, strongly_typed=way.strongly_typed)
    parse(api, network, logger, way.graph)
    config, notes = configure(api, builder, network, request, way)
    # The configuration keeps no reference of its own to what it calls back.
    _monitor = watch(api, config, say) if api.can(Capability.PROGRESS_MONITOR) else None
    calibrator = None
    if way.calibration_cache is not None:
        cache = cache_for(way.calibration_cache, api.version)
        calibrator = set_calibrator(api, config, cache)
    printer.say("Building the engine", _PARSED)
    plan = builder.build_serialized_network(network, config)
    if calibrator is not None and calibrator.asked_for_images:
        raise RefusedError(
            "the builder does not accept the calibration cache and asks for calibration images"
        )
    if plan is None:
        raise RefusedError
    if request.options.timing_cache is not None:
        write_timing_cache(config, request.options.timing_cache)
    printer.say("Writing the plan", _BUILT)
    layers = inspect_plan(api, logger, plan, request) if library == _INSPECTED else None
    return Built(plan=plan, layers=layers, notes=way.notes + notes, typing=way.typing)


def _run(library: str, folder: Path, printer: ProgressPrinter) -> Result:
    request = protocol.request_from_json((folder / protocol.REQUEST).read_text(encoding="utf-8"))
    try:
        api = probe(importlib.import_module(library))
    except (ImportError, OSError) as error:
        return Result(status=Status.LACKING, errors=(f"{library} does not load: {error}",))
    log_path = folder / protocol.LOG
    with log_path.open("w", encoding="utf-8") as log:
        try:
            built = build(api, library, make_logger(api, log), printer, request)
        except BadInputError as error:
            return Result(status=Status.BAD_INPUT, errors=(str(error),))
        except RefusedError as error:
            records = build_log.read_records(log_path.read_text(encoding="utf-8"))
            logged = build_log.messages(records, "ERROR", "INTERNAL_ERROR")
            errors = error.args or logged or ("the builder gives no reason",)
            return Result(status=Status.REFUSED, errors=tuple(str(part) for part in errors))
        (folder / protocol.PLAN).write_bytes(built.plan)
        if built.layers is not None:
            (folder / protocol.LAYERS).write_text(built.layers, encoding="utf-8")
        # Native objects are released while the logger's file is still open.
        notes, typing = built.notes, built.typing
        del built
    printer.say("Engine built", 1.0)
    return Result(status=Status.BUILT, version=api.version, notes=notes, typing=typing)


def _private_stdout() -> TextIO:
    """The real standard output; whatever else prints there goes to standard error from now on."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def main(arguments: list[str]) -> int:
    """Build with library ``arguments[0]`` what the folder ``arguments[1]`` asks for.

    Returns 0 if a result was left there, and one of `FULL` where there is no space for it.
    """
    library, folder = arguments[0], Path(arguments[1])
    with _private_stdout() as stream:
        printer = ProgressPrinter(stream)
        _end_with_parent()
        # Whoever was killed before that call does not hear this.
        printer.say("Starting", 0.0)
        if printer.abandoned:
            return 1
        try:
            _run(library, folder, printer).write(folder)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return error.errno
    return 0


def _end_with_parent() -> None:
    """Have the kernel kill this process when the one that waits for it has gone, however it went.

    The builder would work on for minutes, and not every release asks whether to go on.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
