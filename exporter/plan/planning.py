"""What an export would do, told without doing any of it. Needs neither torch nor onnx.

A plan holds the stages with a line each, the files with their sizes, where each target's engine is
built and by what, which precisions are worth using there, and the command lines of NVIDIA's own
tools that build the same engine.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from exporter import bundle as files
from exporter.build_options import BuildOptions
from exporter.bundle import Bundle
from exporter.device import options_for, require_intact
from exporter.devices import FULL, RTX, Target, check_dla, resolve_targets
from exporter.engine import Backend, get_backend, require_half_scales
from exporter.errors import EnvironmentLackError, InputError
from exporter.pixel_input import FLOAT, Layout
from exporter.plan.advice import calibration_warnings, target_notes, target_warnings
from exporter.plan.commands import BATCH, HEIGHT, WIDTH, EngineBuild, GraphInput, tensorrt_rtx
from exporter.plan.content import Plan, PlannedCommand, PlannedFile, PlannedStage, PlannedTarget
from exporter.plan.engine import (
    BUILD_COMMAND,
    DeferredEngine,
    EngineDecision,
    MissingBackend,
    choose_backend,
    decide_engine,
    defer,
    device_commands,
)
from exporter.plan.sizes import ONE_BYTE, count_weights, engine_bytes, graph_bytes
from exporter.plan.stages import bundle_stages, export_stages
from exporter.profiles import BatchProfile, SizeProfile
from exporter.spec import HUB, RANDOM, ExportSpec, Precision
from models.registry import bundled_weights

IMAGENET_CLASSES = 1000
IMAGE_SIZE = (224, 224)
_RECORDS = (
    files.PARITY,
    files.JUNIT,
    files.REPORT,
    files.SBOM,
    files.MANIFEST,
    files.CHECKSUMS,
)


def make_plan(
    spec: ExportSpec,
    *,
    num_classes: int | None = None,
    dla_core: int | None = None,
    find: Callable[..., Backend] = get_backend,
) -> Plan:
    """What ``engine`` would do for ``spec``. ``num_classes`` None is the bundled network's or 1000.

    Raises:
        InputError: a target or backend is not known, cannot do the precision or has no such DLA.
        EnvironmentLackError: full TensorRT was asked for, is not here, and no target says where.
    """
    variant = spec.variant
    if variant is None:
        raise InputError(f"a plan needs a published variant or a bundle, not {spec.name}")
    bundled = bundled_weights(variant.name) if spec.weights is None else None
    classes = num_classes or (len(bundled.class_names) if bundled else IMAGENET_CLASSES)
    size = spec.image_size or IMAGE_SIZE
    if spec.image_size is None and bundled:
        height, width = bundled.preprocess["image_size"]
        size = (height, width)
    build = EngineBuild(
        precision=str(spec.precision),
        inputs=(_images(size, spec.dynamic_size, spec.with_preprocess),),
        batch=spec.batch,
        size=spec.dynamic_size,
        workspace_mib=spec.workspace_mib,
        dla_core=dla_core,
        implicit=spec.build.is_implicit,
    )
    notes = []
    if num_classes is None and str(spec.weights).partition("@")[0] not in ("None", RANDOM, HUB):
        notes.append(f"sizes are those of {classes} classes; --classes says otherwise")
    if spec.max_drop is not None or spec.min_sqnr_db is not None or spec.keep_float:
        notes.append("layers that stay in half or float make graph and engine larger")
    places = _places(build, spec.backend, spec.target, find, options=spec.build)
    build = replace(build, half_scales=places.decision.emulated)
    count = count_weights(variant, classes)
    graphs = {files.MODEL: graph_bytes(count, "fp32")}
    graphs[build.graph] = graph_bytes(count, build.precision, half_scales=build.half_scales)
    image = 3 * size[0] * size[1] * (4 if spec.with_preprocess is None else 1)
    reference = files.REFERENCE_IMAGES * (image + 4 * classes)
    sizes: dict[str, int | None] = {**graphs, files.REFERENCE: reference}
    if build.precision in ONE_BYTE:
        sizes[files.CALIBRATION] = None
    if build.precision == "int8":
        sizes[files.CALIBRATION_CACHE] = None
    sizes |= dict.fromkeys(_RECORDS)
    return _plan(
        spec.title,
        str(spec.out),
        build,
        [PlannedFile(name=name, bytes=expected) for name, expected in sizes.items()],
        places,
        convolutions=count.convolutions,
        stages=export_stages(spec, places.decision),
        warnings=calibration_warnings(spec),
        notes=notes,
    )


def plan_bundle(
    bundle: Bundle,
    *,
    target: str | None = None,
    backend: str = "auto",
    dla_core: int | None = None,
    find: Callable[..., Backend] = get_backend,
) -> Plan:
    """What building an engine from a published bundle takes; its files are there already.

    Without ``target`` those that the bundle was asked for.

    Raises:
        GateFailedError: if a file is missing or altered.
        InputError: as `make_plan` does; or the bundle is of a version that did not record enough.
        EnvironmentLackError: as `make_plan` does.
    """
    require_intact(bundle)
    recorded = bundle.manifest["spec"]
    size = recorded.get("dynamic_size")
    contract = bundle.manifest.get("contract", {})
    if "inputs" not in bundle.manifest or "convolutions" not in contract or "name" not in recorded:
        raise InputError(f"bundle {bundle.path} does not name its inputs: export it again")
    try:
        options = options_for(bundle, dla=dla_core)
    except ValueError as error:
        raise InputError(str(error)) from error
    build = EngineBuild(
        precision=recorded["precision"],
        inputs=tuple(
            GraphInput(
                name=port["name"], shape=tuple(port["shape"]), dtype=port.get("dtype", FLOAT)
            )
            for port in bundle.manifest["inputs"]
        ),
        batch=BatchProfile.parse(recorded["batch"]),
        size=SizeProfile.parse(size) if size else None,
        workspace_mib=recorded.get("workspace_mib"),
        dla_core=options.dla.core if options.dla else None,
        half_scales=bundle.has_half_scales,
        implicit=options.is_implicit,
    )
    places = _places(build, backend, target or recorded.get("target"), find, options=options)
    if places.backend is not None and not build.half_scales:
        here, precision = places.decision.build_here, Precision(build.precision)
        require_half_scales(here, places.backend, precision, bundle=str(bundle.path))
    return _plan(
        recorded["name"],
        str(bundle.path),
        build,
        [
            PlannedFile(name=name, bytes=(bundle.path / name).stat().st_size, exists=True)
            for name in bundle.manifest["files"]
        ],
        places,
        convolutions=contract["convolutions"],
        stages=bundle_stages(places.decision),
        warnings=(),
        notes=(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where the engines are built and by whom; ``lack`` is what to say of a missing library."""

    asked: tuple[Target, ...]
    backend: Backend | None
    lack: tuple[str, ...]
    decision: EngineDecision


def _places(
    build: EngineBuild,
    backend: str,
    target: str | None,
    find: Callable[..., Backend],
    *,
    options: BuildOptions,
) -> _Places:
    asked = resolve_targets(target)
    if build.dla_core is not None:
        check_dla(asked, build.dla_core, build.precision)
    chosen, lack = _backend(backend, asked, find, options)
    precision = Precision(build.precision)
    decision = decide_engine(asked, chosen, precision, allow_emulated=options.allow_emulated)
    if chosen is not None and decision.build_here:
        chosen.require_options(options)
    return _Places(asked=asked, backend=chosen, lack=lack, decision=decision)


def _plan(
    title: str,
    out: str,
    build: EngineBuild,
    present: Sequence[PlannedFile],
    places: _Places,
    *,
    convolutions: int,
    stages: tuple[PlannedStage, ...],
    warnings: Sequence[str],
    notes: Sequence[str],
) -> Plan:
    decision = places.decision
    targets = _targets(places)
    deferred = defer(decision, build)
    (graph,) = (file.bytes or 0 for file in present if file.name == build.graph)
    there = {file.name: file for file in present}
    size = engine_bytes(graph, build.precision, convolutions, half_scales=build.half_scales)
    if files.ENGINE in there:
        size = there[files.ENGINE].bytes or 0
    made = [PlannedFile(name=files.ENGINE_SUMMARY)]
    if decision.build_here:
        made = [
            PlannedFile(name=files.ENGINE, bytes=size),
            *made,
            PlannedFile(name=files.BUILD_LOG),
        ]
    return Plan(
        title=title,
        out=out,
        build=build,
        stages=stages,
        files=(*present, *(file for file in made if file.name not in there)),
        targets=targets,
        engine_bytes=size,
        commands=(*_own_command(deferred, out), *_commands(targets, decision, build)),
        deferred=deferred,
        warnings=(*places.lack, *warnings, *target_warnings(targets, build)),
        notes=(*notes, *target_notes(targets)),
    )


def _backend(
    name: str, asked: Sequence[Target], find: Callable[..., Backend], options: BuildOptions
) -> tuple[Backend | None, tuple[str, ...]]:
    """The backend, or what stands for it where its library is missing, and what to say of that."""
    try:
        return choose_backend(name, asked, find, options=options), ()
    except EnvironmentLackError as error:
        if name.strip().lower() == FULL:
            raise
        return MissingBackend(), (f"`engine` would stop here with exit code 3: {error}",)


def _targets(places: _Places) -> tuple[PlannedTarget, ...]:
    decision = places.decision
    named = list(places.asked) or [Target(asked=c, capability=c) for c in decision.build_here]
    rows = []
    for target in named:
        here = target not in decision.deferred
        builder = places.backend.name if here and places.backend else FULL
        rows.append(PlannedTarget(target=target, backend=builder, here=here))
    return tuple(rows)


def _own_command(deferred: DeferredEngine | None, out: str) -> tuple[PlannedCommand, ...]:
    """What finishes the bundle on the device, where this project runs there."""
    if deferred is None or not deferred.build_with.startswith(BUILD_COMMAND):
        return ()
    line = shlex.join([*BUILD_COMMAND.split(), out])
    return (PlannedCommand(library="on the device", line=line),)


def _commands(
    targets: Sequence[PlannedTarget], decision: EngineDecision, build: EngineBuild
) -> tuple[PlannedCommand, ...]:
    """TensorRT-RTX's own for what it builds, and `trtexec` of every TensorRT of the targets."""
    commands = []
    if decision.build_here and any(row.backend == RTX for row in targets):
        line = tensorrt_rtx(build, decision.build_here)
        commands.append(PlannedCommand(library="TensorRT-RTX", line=line))
    versions: dict[str, list[str]] = {}
    for version, line in device_commands([row.target for row in targets], build).items():
        versions.setdefault(line, []).append(version)
    for line, equal in versions.items():
        commands.append(PlannedCommand(library=f"TensorRT {', '.join(equal)}", line=line))
    return tuple(commands)


def _images(
    size: tuple[int, int], profile: SizeProfile | None, layout: Layout | None
) -> GraphInput:
    extents: tuple[int | str, ...] = size if profile is None else (HEIGHT, WIDTH)
    return GraphInput.of("images", (BATCH, 3, *extents), layout)
