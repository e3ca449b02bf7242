"""Whether this machine could run an engine at all, found out without TensorRT.

TensorRT's runtimes must not be touched without a driver: one of them returns an object that
crashes the process on first use. So the driver is asked first, through its C interface.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_CUDA_ERROR_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


def engine_not_run_reason() -> str:
    """One sentence saying why an export does not run its engine; safe to call on any machine."""
    return driver_lack() or "an export runs no engine: run `repvgg-export verify` on the bundle"


def driver_lack() -> str | None:
    """Why no GPU can be used here, None if one can; safe to call on any machine."""
    driver = _load()
    if isinstance(driver, str):
        return driver
    driver.cuInit.argtypes = [ctypes.c_uint]
    driver.cuInit.restype = ctypes.c_int
    code = int(driver.cuInit(0))
    if code == _CUDA_ERROR_NO_DEVICE:
        return "the NVIDIA driver is installed but finds no GPU (cuInit error 100)"
    if code != 0:
        return f"the NVIDIA driver does not start (cuInit error {code})"
    return None


def device_target(device: int = 0) -> str | None:
    """The compute capability of a GPU here, such as ``sm87``; None if the driver names none.

    Safe to call on any machine. Devices are counted as CUDA_VISIBLE_DEVICES leaves them.
    """
    driver = _load()
    if isinstance(driver, str) or driver_lack() is not None:
        return None
    handle = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), device) != 0:
        return None
    parts = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle) != 0:
            return None
        parts.append(value.value)
    return f"sm{parts[0]}{parts[1]}"


def device_name(device: int = 0) -> str | None:
    """What the driver calls a GPU here, such as ``NVIDIA GeForce RTX 4090``; None without one."""
    driver = _load()
    if isinstance(driver, str) or driver_lack() is not None:
        return None
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(handle), device) != 0:
        return None
    if driver.cuDeviceGetName(text, len(text), handle) != 0:
        return None
    return text.value.decode("utf-8", errors="replace")


def _load() -> Any:
    """The driver's library, or one sentence saying that there is none."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
        _ = driver.cuInit
    except (OSError, AttributeError):
        return f"no NVIDIA driver on this machine ({library} does not load)"
    return driver
