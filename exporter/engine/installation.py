"""Which TensorRT is installed, and whether a request has everything it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from exporter.engine.backend import BuildRequest
from exporter.errors import InputError


def is_installed(module: str) -> bool:
    """Whether ``module`` can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def installed_version(module: str) -> str:
    """Version of the installed distribution, ``unknown`` if it was not installed as one."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def require_buildable(request: BuildRequest) -> None:
    """Return only if there are a target and the files that the request names.

    Raises:
        InputError: otherwise.
    """
    if not request.targets:
        raise InputError("an engine needs at least one target, such as sm86")
    for path in (request.onnx_path, request.float_path):
        if path is not None and not path.is_file():
            raise InputError(f"no ONNX file to build an engine from: {path}")
    for cache in (request.options.calibration_cache, request.cache_path):
        if cache is not None and not cache.is_file():
            raise InputError(f"no calibration cache to build an engine with: {cache}")
    timings = request.options.timing_cache
    if timings is not None and not timings.absolute().parent.is_dir():
        raise InputError(f"no folder to keep the timing cache in: {timings.absolute().parent}")
