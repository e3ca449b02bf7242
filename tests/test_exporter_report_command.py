"""The command line that a report gives is the one that makes the bundle again."""

from __future__ import annotations

import shlex
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from exporter.cli import build_parser
from exporter.report.command import command_line
from exporter.request import ExportRequest, validate
from exporter.spec import Recipe

TEXT = st.text("abc /'\"$-", min_size=1, max_size=8).map(lambda text: f"x{text}")
PATHS = st.none() | TEXT
OPTIONS = {
    "model": st.just("A0"),
    "precision": st.just("int8"),
    "weights": st.sampled_from([None, "random", "hub"]),
    "calibration": PATHS,
    "calibration_images": st.integers(1, 999),
    "evaluation": PATHS,
    "evaluation_images": st.integers(1, 999),
    "recipe": st.sampled_from([None, *map(str, Recipe)]),
    "keep_float": st.sampled_from([None, "stage0.conv,linear"]),
    "target": st.sampled_from([None, "orin,sm86"]),
    "backend": st.sampled_from(["auto", "tensorrt-rtx"]),
    "batch": st.sampled_from([None, "1:2:4"]),
    "preprocess": st.sampled_from([None, "imagenet"]),
    "with_preprocess": st.sampled_from([None, "nhwc", "nchw"]),
    "out": PATHS,
    "skip_bad_images": st.booleans(),
    "min_sqnr_db": st.none() | st.floats(1, 60),
    "min_agreement": st.none() | st.floats(0, 1),
    "max_drop": st.none() | st.floats(0, 5),
    "per_tensor_weights": st.booleans(),
    "power_of_two": st.booleans(),
    "calibration_table": PATHS,
    "typing": st.sampled_from(["auto", "strong"]),
    "dla": st.sampled_from([None, 0]),
    "gpu_fallback": st.booleans(),
    "quantization": st.sampled_from(["auto", "implicit"]),
    "calibration_cache": PATHS,
    "timing_cache": PATHS,
    "optimization_level": st.sampled_from([None, 3]),
    "hardware_compatibility": st.sampled_from(["none", "ampere+"]),
    "version_compatible": st.booleans(),
    "allow_emulated": st.booleans(),
    "workspace_mib": st.sampled_from([None, 512]),
}
SIZES = st.sampled_from([(None, None), ("96", None), ("96x64", None), (None, "64:96:128")])


def test_every_option_is_in_the_test_below() -> None:
    """A new option of `engine` must find its way into the report's command line."""
    assert set(ExportRequest.__dataclass_fields__) == {*OPTIONS, "image_size", "dynamic_size"}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.fixed_dictionaries(OPTIONS), SIZES)
def test_the_command_line_makes_the_same_request_again(
    options: dict[str, Any], sizes: tuple[str | None, str | None]
) -> None:
    """Read back by the command's own parser, paths with spaces and quotes included."""
    without_fallback = not options["gpu_fallback"]
    assume(options["dla"] is not None or not without_fallback)
    assume(options["with_preprocess"] is None or not without_fallback)
    spec = validate(ExportRequest(**options, image_size=sizes[0], dynamic_size=sizes[1]))
    words = shlex.split(command_line(spec.to_json()))
    assert "repvgg-export" == words[0]
    read = vars(build_parser().parse_args(words[1:]))
    again = ExportRequest(**{name: read[name] for name in ExportRequest.__dataclass_fields__})
    assert spec.to_json() == validate(again).to_json()
