"""The command line that makes a bundle again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

_OPTIONS = {
    "weights": "--weights",
    "calibration": "--calib",
    "calibration_table": "--calibration-table",
    "evaluation": "--evaluation",
    "target": "--target",
    "preprocess": "--preprocess",
    "with_preprocess": "--with-preprocess",
    "min_sqnr_db": "--min-sqnr",
    "min_agreement": "--min-agreement",
    "max_drop": "--max-drop",
    "recipe": "--recipe",
    "dynamic_size": "--dynamic-size",
    "workspace_mib": "--workspace-mib",
}
_DEFAULTS = {
    "calibration_images": 512,
    "evaluation_images": 512,
    "backend": "auto",
    "batch": "1:8:32",
}
"""Options that always have a value: left out where it is this one."""

_FLAGS = ("skip_bad_images", "per_tensor_weights", "power_of_two")


def command_line(spec: Mapping[str, Any]) -> str:
    """What to type in a shell for the ``spec`` of a manifest; defaults are left out.

    A module that was passed from Python has no command line: the call that stands for it.
    """
    if spec["weights"] == "module":
        return f"exporter.export({spec['name']}(...), precision={spec['precision']!r}, ...)"
    words = ["repvgg-export", "engine", spec["variant"], "--precision", spec["precision"]]
    for key, option in _OPTIONS.items():
        if spec.get(key) is not None:
            words += [option, str(spec[key])]
    for key, default in _DEFAULTS.items():
        if str(spec[key]) != str(default):
            words += [_option(key), str(spec[key])]
    for key, value in spec["build"].items():
        words += ["--no-gpu-fallback"] if key == "gpu_fallback" else [_option(key)]
        words += [] if isinstance(value, bool) else [str(value)]
    if spec["image_size"] is not None:
        words += ["--image-size", "x".join(map(str, spec["image_size"]))]
    if spec["keep_float"]:
        words += ["--keep-float", ",".join(spec["keep_float"])]
    words += [_option(flag) for flag in _FLAGS if spec[flag]]
    return shlex.join([*words, "--out", str(spec["out"])])


def _option(key: str) -> str:
    names = {"calibration_images": "--calib-images"}
    return names.get(key, f"--{key.replace('_', '-')}")
