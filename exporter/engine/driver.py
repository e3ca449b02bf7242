"""Whether this machine could run an engine at all, found out without TensorRT.

TensorRT's runtimes must not be touched without a driver: one of them returns an object that
crashes the process on first use. So the driver is asked first, through its C interface.
"""

from __future__ import annotations

import ctypes
import sys

_CUDA_ERROR_NO_DEVICE = 100


def engine_not_run_reason() -> str:
    """One sentence saying why no engine runs here; safe to call on any machine."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
        initialize = driver.cuInit
    except (OSError, AttributeError):
        return f"no NVIDIA driver on this machine ({library} does not load)"
    initialize.argtypes = [ctypes.c_uint]
    initialize.restype = ctypes.c_int
    code = int(initialize(0))
    if code == _CUDA_ERROR_NO_DEVICE:
        return "the NVIDIA driver is installed but finds no GPU (cuInit error 100)"
    if code != 0:
        return f"the NVIDIA driver does not start (cuInit error {code})"
    return "running engines is not part of this version; run it on the device"
