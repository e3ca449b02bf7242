"""The engine's part of the road: what is refused before the work, built here, or told to others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import onnx

from exporter.devices import Target, check_dla
from exporter.engine import Backend, BuildRequest, BuiltEngine, check_engine, dla_complaints
from exporter.errors import InputError
from exporter.graph import pointwise_convolutions, quantizable
from exporter.inputs import Inputs
from exporter.plan_commands import EngineBuild, GraphInput
from exporter.plan_engine import EngineDecision
from exporter.prologue import Prologue
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


def engine_build(
    spec: ExportSpec, inputs: Inputs, prologue: Prologue | None, *, half_scales: bool
) -> EngineBuild:
    """What whoever builds the engine elsewhere must be told."""
    layout = prologue.layout if prologue else None
    return EngineBuild(
        precision=str(spec.precision),
        inputs=tuple(
            GraphInput.of(port.name, port.shape, layout) for port in inputs.interface.inputs
        ),
        batch=spec.batch,
        size=spec.dynamic_size,
        workspace_mib=spec.workspace_mib,
        dla_core=spec.build.dla.core if spec.build.dla else None,
        half_scales=half_scales,
        implicit=spec.build.is_implicit,
    )


def build_engine(
    backend: Backend,
    request: BuildRequest,
    model: onnx.ModelProto,
    advance: Callable[[float], None],
    *,
    kept: Collection[str],
) -> BuiltEngine:
    """The engine of ``request``; ``model`` is the float graph whose convolutions it must have.

    The nodes ``kept`` stay float or half in an INT8 or FP8 engine.
    """
    engine = backend.build(request, lambda _phase, fraction: advance(fraction))
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    quantized = sum(n.op_type == "Conv" and n.name not in kept for n in quantizable(model))
    check_engine(
        engine.summary,
        request.precision,
        convolutions,
        computed_weights=convolutions - quantized,
        pointwise=pointwise_convolutions(model),
        allow_emulated=request.options.allow_emulated,
    )
    return engine
