"""ONNX -> engine inside a bundle that is published already, on the machine it is meant for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter import bundle as files
from exporter.bundle import Bundle
from exporter.bundle.writer import BundleWriter
from exporter.device.graph_census import read_census
from exporter.device.republication import carry_over, require_own_files
from exporter.device.runners import batch_profile, require_intact
from exporter.devices import NO_ENGINE_YET, resolve_targets, target_text
from exporter.engine import (
    BuildOptions,
    BuildRequest,
    BuiltEngine,
    Dla,
    HardwareCompatibility,
    ProgressCallback,
    Quantization,
    Typing,
    check_engine,
    device_target,
    get_backend,
    parse_targets,
    require_half_scales,
)
from exporter.engine.runtime_modules import this_gpu
from exporter.profiles import SizeProfile
from exporter.provenance import created, versions
from exporter.spec import Precision

_REPLACED = frozenset({files.ENGINE, files.ENGINE_SUMMARY, files.BUILD_LOG})


def silent(_phase: str, _fraction: float) -> None:
    """Report nothing."""


def build_engine(
    bundle: Bundle,
    *,
    backend: str = "auto",
    target: str | None = None,
    options: BuildOptions | None = None,
    progress: ProgressCallback = silent,
) -> Bundle:
    """Build the bundle's engine, for ``target`` or else this machine's GPU, and publish it there.

    ``target`` is read as at export: ``sm86``, ``orin``, or several with commas.

    Without ``options`` those of the export hold: see :func:`options_for`.
    The engine must hold what its graph asks for, as at export. Its figures, the build log and the
    manifest are replaced with it, in one step; the ONNX graphs and the evidence of the export stay
    as they are. Signatures are dropped, since what they sign is no more. Whatever fails, the bundle
    is left as it was.

    Raises:
        GateFailedError: a file of the bundle is damaged, the builder refuses the network, or the
            engine does not run its convolutions in the bundle's precision.
        InputError: the target or backend does not exist, the folder holds files that are not the
            bundle's and would be lost, or it cannot be written.
        EnvironmentLackError: no backend is installed, or there is no GPU to build for.
    """
    require_intact(bundle)
    require_own_files(bundle)
    precision = Precision(bundle.manifest["spec"]["precision"])
    options = options or options_for(bundle)
    wanted = target_text(resolve_targets(target)) or device_target()
    builder = get_backend(backend, target=wanted, options=options)
    targets = parse_targets(
        wanted or this_gpu(), builder, precision, allow_emulated=options.allow_emulated
    )
    if not bundle.has_half_scales:
        require_half_scales(targets, builder, precision, bundle=str(bundle.path))
    request = _request(bundle, precision, targets, options)
    built = builder.build(request, progress)
    _require_contents(bundle, built, request)
    with BundleWriter(bundle.path) as writer:
        carry_over(bundle, writer, without=_REPLACED)
        writer.path(files.ENGINE).write_bytes(built.plan)
        writer.write_text(files.ENGINE_SUMMARY, files.dumps(built.summary.to_json()))
        writer.write_text(files.BUILD_LOG, built.build_log)
        return writer.publish(_manifest(bundle, built))


def options_for(
    bundle: Bundle,
    *,
    dla: int | None = None,
    timing_cache: Path | None = None,
    optimization_level: int | None = None,
    version_compatible: bool = False,
    allow_emulated: bool = False,
) -> BuildOptions:
    """What the export was asked for, as the manifest records it, and on top of it what is given.

    Files of the exporting machine are left out: implicit INT8 takes the bundle's own scales.

    Raises:
        ValueError: for a value that makes no sense.
    """
    recorded = bundle.manifest["spec"].get("build", {})
    core = recorded.get("dla") if dla is None else dla
    quantization = recorded.get("quantization", Quantization.AUTO)
    if "calibration_cache" in recorded:
        quantization = Quantization.IMPLICIT
    fallback = recorded.get("gpu_fallback", True)
    level = recorded.get("optimization_level")
    return BuildOptions(
        typing=Typing(recorded.get("typing", Typing.AUTO)),
        dla=None if core is None else Dla(core=core, gpu_fallback=fallback),
        quantization=Quantization(quantization),
        timing_cache=timing_cache,
        optimization_level=level if optimization_level is None else optimization_level,
        hardware_compatibility=HardwareCompatibility(
            recorded.get("hardware_compatibility", HardwareCompatibility.NONE)
        ),
        version_compatible=version_compatible or recorded.get("version_compatible", False),
        allow_emulated=allow_emulated or recorded.get("allow_emulated", False),
    )


def _request(
    bundle: Bundle, precision: Precision, targets: tuple[str, ...], options: BuildOptions
) -> BuildRequest:
    spec = bundle.manifest["spec"]
    size = spec.get("dynamic_size")
    cache = bundle.path / files.CALIBRATION_CACHE
    return BuildRequest(
        onnx_path=bundle.graph_path,
        precision=precision,
        targets=targets,
        batch=batch_profile(bundle),
        size=None if size is None else SizeProfile.parse(size),
        workspace_mib=spec.get("workspace_mib"),
        float_path=bundle.path / files.MODEL,
        cache_path=cache if cache.is_file() else None,
        options=options,
    )


def _require_contents(bundle: Bundle, built: BuiltEngine, request: BuildRequest) -> None:
    """The gate of the export: what the graph asks for is what the engine does."""
    plain = read_census(bundle.path / files.MODEL)
    quantized = read_census(request.onnx_path).quantized
    check_engine(
        built.summary,
        request.precision,
        plain.convolutions,
        computed_weights=plain.convolutions - quantized,
        pointwise=plain.pointwise,
        allow_emulated=request.options.allow_emulated,
    )


def _manifest(bundle: Bundle, built: BuiltEngine) -> dict[str, Any]:
    found = versions()
    build = {
        "created": created(),
        "backend": built.summary.backend,
        "version": built.summary.version,
        "targets": list(built.summary.targets),
        "versions": {name: version for name, version in found.items() if version is not None},
    }
    notes = bundle.manifest.get("notes", [])
    return {
        **bundle.manifest,
        "notes": [note for note in notes if not note.startswith(NO_ENGINE_YET)],
        "targets": list(built.summary.targets),
        "engine_build": build,
    }
