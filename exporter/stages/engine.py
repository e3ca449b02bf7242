"""The engine's part of the road: what is refused before the work, built here, or told to others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from exporter import bundle as files
from exporter.devices import Target, check_dla
from exporter.draft import Draft, ExpectedConvolutions
from exporter.engine import Backend, BuildRequest, BuiltEngine, check_engine, dla_complaints
from exporter.errors import InputError
from exporter.plan.commands import EngineBuild
from exporter.plan.engine import EngineDecision
from exporter.spec import ExportSpec


def require_possible(
    spec: ExportSpec, asked: Sequence[Target], backend: Backend | None, decision: EngineDecision
) -> None:
    """Refuse now what the builder, here or on the device, would refuse after all the work."""
    if spec.build.dla is not None and asked:
        check_dla(asked, spec.build.dla.core, str(spec.precision))
    if backend is not None and decision.build_here:
        backend.require_options(spec.build)
    complaints = dla_complaints(spec.build, spec.precision, spec.batch, spec.dynamic_size)
    if complaints:
        raise InputError("; ".join(complaints))


def engine_build(spec: ExportSpec, draft: Draft, *, half_scales: bool) -> EngineBuild:
    """What whoever builds the engine elsewhere must be told."""
    return EngineBuild(
        precision=str(spec.precision),
        inputs=draft.inputs,
        batch=spec.batch,
        size=spec.dynamic_size,
        workspace_mib=spec.workspace_mib,
        dla_core=spec.build.dla.core if spec.build.dla else None,
        half_scales=half_scales,
        implicit=spec.build.is_implicit,
    )


def build_request(spec: ExportSpec, folder: Path, targets: tuple[str, ...]) -> BuildRequest:
    """The engine of ``spec`` for ``targets`` from the files of a draft in ``folder``."""
    cache = folder / files.CALIBRATION_CACHE
    return BuildRequest(
        onnx_path=folder / files.graph_name(str(spec.precision)),
        precision=spec.precision,
        targets=targets,
        batch=spec.batch,
        size=spec.dynamic_size,
        workspace_mib=spec.workspace_mib,
        float_path=folder / files.MODEL,
        cache_path=cache if cache.exists() else None,
        options=spec.build,
    )


def build_engine(
    backend: Backend,
    request: BuildRequest,
    expected: ExpectedConvolutions,
    advance: Callable[[float], None],
) -> BuiltEngine:
    """The engine of ``request``, whose convolutions are what is ``expected``.

    Raises:
        GateFailedError: if they are not, or do not run in the precision asked for.
    """
    engine = backend.build(request, lambda _phase, fraction: advance(fraction))
    check_engine(
        engine.summary,
        request.precision,
        expected.total,
        computed_weights=expected.unquantized,
        pointwise=expected.pointwise,
        allow_emulated=request.options.allow_emulated,
    )
    # The folder that a bundle is made in has another name each time, and is gone afterwards.
    log = engine.build_log.replace(f"{request.onnx_path.parent}/", "")
    return replace(engine, build_log=log)
