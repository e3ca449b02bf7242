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

from exporter.build_options import BuildOptions
from exporter.profiles import BatchProfile, SizeProfile
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


def dla_complaints(
    options: BuildOptions, precision: Precision, batch: BatchProfile, size: SizeProfile | None
) -> tuple[str, ...]:
    """What a DLA cannot do, whatever the version; empty if ``options`` ask for none."""
    if options.dla is None:
        return ()
    found = []
    if precision not in (Precision.FP16, Precision.INT8):
        found.append(f"a DLA computes in half or INT8, not in {precision}")
    if batch.min != batch.max:
        found.append(f"a DLA needs a fixed batch, not {batch}")
    if size is not None:
        found.append(f"a DLA needs a fixed image size, not {size}")
    return tuple(found)
