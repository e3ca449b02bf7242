"""What to say of a plan beside its facts: what will fail or disappoint, what was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.devices import ARCHITECTURES, precision_advice
from exporter.pixel_input import DTYPE
from exporter.plan_commands import EngineBuild, trtexec
from exporter.plan_content import PlannedTarget
from exporter.spec import RANDOM, ExportSpec

CACHE_VERSION = (10, 3)
"""The TensorRT that ``calibration.cache`` is written for."""


def calibration_warnings(spec: ExportSpec) -> tuple[str, ...]:
    """Scales come from images, which only the bundled network brings along."""
    own = spec.weights not in (None, RANDOM) and not str(spec.weights).endswith(".onnx")
    if spec.precision.is_quantized and own and spec.calibration is None:
        return (f"{spec.precision} needs calibration images of one's own: pass --calib",)
    return ()


def target_warnings(targets: Sequence[PlannedTarget], build: EngineBuild) -> tuple[str, ...]:
    """Each once, in the order of the targets."""
    found = [] if build.dla_core is None else list(_dla_warnings(build))
    for row in targets:
        found += _precision_warnings(row, build.precision)
        if not row.here:
            found += _software_warnings(row, build)
    return tuple(dict.fromkeys(found))


def target_notes(targets: Sequence[PlannedTarget]) -> tuple[str, ...]:
    """What is to be known about the devices that were named."""
    devices = dict.fromkeys(row.target.device for row in targets if row.target.device)
    return tuple(f"{device.name}: {note}" for device in devices for note in device.notes)


def _precision_warnings(row: PlannedTarget, precision: str) -> Iterator[str]:
    if row.target.capability not in ARCHITECTURES:
        return
    for advice in precision_advice(row.target.capability, row.backend):
        if advice.precision == precision and not advice.worth:
            yield f"{row.target.label} at {precision}: {advice.reason}"


def _software_warnings(row: PlannedTarget, build: EngineBuild) -> Iterator[str]:
    on_dla = "" if build.dla_core is None else " for a DLA"
    for release in row.target.software:
        if trtexec(build, release.tensorrt) is None:
            yield f"{row.target.label}: {release} does not build {build.precision}{on_dla}"


def _dla_warnings(build: EngineBuild) -> Iterator[str]:
    if build.batch.min != build.batch.max or build.size is not None:
        size = "" if build.size is None else " and the optimal size"
        yield (
            f"a DLA has no dynamic shapes: the commands take batch {build.batch.opt}{size}; "
            f"pass --batch {build.batch.opt} for a bundle that says so"
        )
    if any(entry.dtype == DTYPE for entry in build.inputs):
        yield "a DLA takes no uint8 and no float32: the GPU normalizes the pixels"
    if build.precision == "int8":
        version = ".".join(map(str, CACHE_VERSION))
        yield (
            f"calibration.cache is written for TensorRT {version}; others may want their own "
            "version in its first line"
        )
