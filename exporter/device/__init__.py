"""Bundles on the machine that they were made for. numpy, no torch, no onnx.

`memory` is the seam to the GPU, `engine_runner` runs an engine through it, `compiling` and
`kernel_cache` keep what is compiled at its start, `runners` opens a bundle by its engine or by ONNX
Runtime, `build` makes a bundle's engine here, `republication` writes a bundle again, signed if need
be, `graph_census` counts what an engine must hold, `accuracy` is what an evaluation counted,
`timing` the stopwatch.
"""

from __future__ import annotations

from exporter.device.build import build_engine, options_for
from exporter.device.republication import sign_bundle
from exporter.device.runners import (
    BundleRunner,
    RunBackend,
    batch_profile,
    input_names,
    is_classifier,
    open_runner,
    output_names,
    require_intact,
    run_bundle,
)

__all__ = [
    "BundleRunner",
    "RunBackend",
    "batch_profile",
    "build_engine",
    "input_names",
    "is_classifier",
    "open_runner",
    "options_for",
    "output_names",
    "require_intact",
    "run_bundle",
    "sign_bundle",
]
