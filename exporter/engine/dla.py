"""What NVIDIA's deep learning accelerator (DLA) asks of a build, told before building.

Sources: the TensorRT documentation's "Working with DLA" and "DLA supported layers and
restrictions". None of it was measured: no machine with a DLA was at hand.

* TensorRT 8.6 to 10.7 build for it (Jetson Xavier and Orin, not Orin Nano, not Thor). 10.8 to 11.3
  do not; 11.4.0 does on Windows on ARM only, and from 11.4.1 on again on Jetson AGX Orin with
  JetPack 7.2.2. TensorRT-RTX never does.
* It computes in half or INT8 and needs fixed shapes. Up to TensorRT 10 it takes INT8 scales from a
  calibration cache only and knows no Q/DQ nodes.
* Which layers it takes is asked of the builder, layer by layer: see `builder_config`.
"""

from __future__ import annotations

import re

from exporter.engine.backend import BuildRequest
from exporter.spec import Precision

_LAST_OF_10 = (10, 7)
_FIRST_OF_11 = (11, 4, 1)
_WINDOWS_ONLY = (11, 4, 0)


def dla_lack(version: str) -> str | None:
    """Why this version of full TensorRT cannot build for a DLA; None if it can."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if numbers[:2] <= _LAST_OF_10 or numbers >= _FIRST_OF_11:
        return None
    if numbers == _WINDOWS_ONLY:
        return f"TensorRT {version} supports DLA on Windows on ARM only; use 11.4.1 or later"
    return (
        f"TensorRT {version} has no DLA support: 10.7 is the last before 11.4.1 "
        "(Jetson AGX Orin with JetPack 7.2.2)"
    )


def dla_complaints(request: BuildRequest) -> tuple[str, ...]:
    """What about the request a DLA cannot do, whatever the version; empty without `dla`."""
    if request.options.dla is None:
        return ()
    found = []
    if request.precision not in (Precision.FP16, Precision.INT8):
        found.append(f"a DLA computes in half or INT8, not in {request.precision}")
    if request.batch.min != request.batch.max:
        found.append(f"a DLA needs a fixed batch, not {request.batch}")
    if request.size is not None:
        found.append(f"a DLA needs a fixed image size, not {request.size}")
    return tuple(found)
