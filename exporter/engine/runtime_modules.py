"""What running an engine needs of this machine: a driver, a GPU, the library that made it.

A runtime must not be touched without a driver (see `driver`), so that is asked first.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from exporter.engine import driver
from exporter.errors import EnvironmentLackError

_MODULES = {
    "tensorrt-rtx": ("tensorrt_rtx", "pip install 'repvgg-exporter[rtx]'"),
    "tensorrt": ("tensorrt", "JetPack brings it; elsewhere pip install tensorrt"),
}


def require_driver() -> None:
    """Return only where a GPU can be used.

    Raises:
        EnvironmentLackError: with the sentence that says why not.
    """
    lack = driver.driver_lack()
    if lack is not None:
        raise EnvironmentLackError(lack)


def this_gpu() -> str:
    """The compute capability of this machine's first GPU, such as ``sm87``.

    Raises:
        EnvironmentLackError: there is none, or the driver does not say.
    """
    lack = driver.driver_lack()
    target = None if lack else driver.device_target()
    if target is None:
        raise EnvironmentLackError(
            "there is no GPU to build the engine for: "
            f"{lack or 'the NVIDIA driver does not name its compute capability'}; run this on the "
            "device, or name one with --target, such as sm86"
        )
    return target


def runtime_module(backend: str) -> ModuleType:
    """The library that runs the engines of ``backend``, imported.

    Raises:
        EnvironmentLackError: there is no driver, or the library is not installed or does not load.
    """
    require_driver()
    if backend not in _MODULES:
        known = ", ".join(_MODULES)
        raise EnvironmentLackError(
            f"the engine was made by {backend!r}, which this version does not run (known: {known})"
        )
    name, advice = _MODULES[backend]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise EnvironmentLackError(
            f"{name} is not installed, so the engine cannot run: {advice}"
        ) from error
    except (ImportError, OSError) as error:
        raise EnvironmentLackError(f"{name} does not load: {error}") from error
