"""What to say of a plan beside its facts: what will fail or disappoint, what was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.devices import ARCHITECTURES, precision_advice
from exporter.pixel_input import DTYPE
from exporter.plan.commands import EngineBuild, trtexec
from exporter.plan.content import PlannedTarget
from exporter.plan.engine import BUILD_COMMAND
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
    if build.precision == "int8" and (build.implicit or build.dla_core is not None):
        found.append(_cache_warning())
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
    kind = f"{'implicit ' if build.implicit else ''}{build.precision}"
    on_dla = "" if build.dla_core is None else " for a DLA"
    for release in row.target.software:
        if trtexec(build, release.tensorrt) is None:
            yield f"{row.target.label}: {release} does not build {kind}{on_dla}"


def _dla_warnings(build: EngineBuild) -> Iterator[str]:
    if build.batch.min != build.batch.max or build.size is not None:
        batch, free = build.batch.opt, build.size is not None
        yield (
            f"a DLA has no dynamic shapes: the commands take batch {batch}"
            f"{' and the optimal size' * free}; `engine` wants --batch {batch}"
            f"{' and no --dynamic-size' * free}"
        )
    if any(entry.dtype == DTYPE for entry in build.inputs):
        yield "a DLA takes no uint8 and no float32: the GPU normalizes the pixels"


def _cache_warning() -> str:
    version = ".".join(map(str, CACHE_VERSION))
    return (
        f"calibration.cache is written for TensorRT {version}; trtexec of another wants its own "
        f"version in the first line ({BUILD_COMMAND} writes it by itself)"
    )
