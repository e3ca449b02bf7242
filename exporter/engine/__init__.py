"""Engines: the one room that names TensorRT.

Importing it needs the standard library only; TensorRT is imported in a process of its own, for the
time of one build. What is asked of the builder is in `exporter.build_options`. The order to read:
`backend` (what is asked of a library), `tensorrt_rtx` and `tensorrt` (who answers),
`worker_process` and `worker` (how), `capabilities` and `approach` (what the library at hand can
do), `network_parser`, `builder_config`, `legacy_int8`, `layer_inspection` and `callbacks` (its
calls, the same for both libraries), `runtime_cache` (TensorRT-RTX's alone), `build_log`,
`inspector` and `inventory` (what came out), `summary` (the verdict).
"""

from __future__ import annotations

import difflib

from exporter.build_options import (
    DEFAULT_OPTIONS,
    BuildOptions,
    Dla,
    HardwareCompatibility,
    Quantization,
    Typing,
)
from exporter.engine import tensorrt, tensorrt_rtx
from exporter.engine.backend import Backend, BuildRequest, BuiltEngine, ProgressCallback
from exporter.engine.dla import dla_complaints, dla_lack
from exporter.engine.driver import device_target, driver_lack, engine_not_run_reason
from exporter.engine.installation import is_installed
from exporter.engine.summary import (
    ConvolutionCounts,
    EngineSummary,
    EngineTyping,
    TargetFigures,
    check_engine,
    count_words,
    same_figures,
)
from exporter.engine.targets import (
    emulated_targets,
    parse_targets,
    precision_lack,
    require_half_scales,
    require_one_form,
    target_names,
)
from exporter.engine.tensorrt import TensorRt
from exporter.engine.tensorrt_rtx import TensorRtRtx
from exporter.errors import InputError

__all__ = [
    "Backend",
    "BuildOptions",
    "BuildRequest",
    "BuiltEngine",
    "ConvolutionCounts",
    "Dla",
    "EngineSummary",
    "EngineTyping",
    "HardwareCompatibility",
    "ProgressCallback",
    "Quantization",
    "TargetFigures",
    "TensorRt",
    "TensorRtRtx",
    "Typing",
    "check_engine",
    "count_words",
    "device_target",
    "dla_complaints",
    "dla_lack",
    "driver_lack",
    "emulated_targets",
    "engine_not_run_reason",
    "get_backend",
    "parse_targets",
    "precision_lack",
    "require_half_scales",
    "require_one_form",
    "same_figures",
]

AUTO = "auto"
_BACKENDS: dict[str, type[TensorRtRtx | TensorRt]] = {
    TensorRtRtx.name: TensorRtRtx,
    TensorRt.name: TensorRt,
}


def get_backend(
    name: str, *, target: str | None = None, options: BuildOptions = DEFAULT_OPTIONS
) -> Backend:
    """Return the backend called ``name``.

    ``auto`` picks TensorRT-RTX, which builds anywhere, unless it is not installed, cannot build for
    one of the targets in ``target``, or cannot obey ``options``, and full TensorRT can build here.

    Raises:
        InputError: no backend has this name; the message lists the names.
        EnvironmentLackError: its library is not installed, or too old, or needs a GPU.
    """
    wanted = name.strip().lower()
    if wanted == AUTO:
        return _BACKENDS[_automatic(target, options)]()
    if wanted in _BACKENDS:
        return _BACKENDS[wanted]()
    known = (AUTO, *_BACKENDS)
    nearest = difflib.get_close_matches(wanted, known, n=1)
    hint = f"nearest: {nearest[0]}; " if nearest else ""
    raise InputError(f"unknown backend {name!r} ({hint}known: {', '.join(known)})")


def _automatic(target: str | None, options: BuildOptions) -> str:
    """The name that ``auto`` stands for; where nothing can build, the one that advises best."""
    rtx = is_installed(tensorrt_rtx.MODULE)
    foreign = [t for t in target_names(target) if t not in tensorrt_rtx.TARGETS]
    if rtx and not foreign and not options.full_tensorrt_only:
        return TensorRtRtx.name
    if is_installed(tensorrt.MODULE) and (not rtx or driver_lack() is None):
        return TensorRt.name
    return TensorRtRtx.name
