"""From a spec to a published bundle: draft -> engine -> publish.

The draft is everything but the engine; :mod:`exporter.drafting` has its road, which needs torch and
onnx. The first failed gate ends the run and nothing is published.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter import parity
from exporter.bundle import Bundle
from exporter.bundle.writer import BundleWriter, Signer
from exporter.clock import Progress, StageClock, silent
from exporter.devices import RTX, resolve_targets
from exporter.draft import Draft
from exporter.engine import Backend, BuiltEngine, engine_not_run_reason
from exporter.parity.ledger import Ledger
from exporter.plan.engine import (
    EngineDecision,
    EngineOutcome,
    choose_backend,
    decide_engine,
    defer,
)
from exporter.running.spread import Spread
from exporter.spec import ExportSpec
from exporter.stage_cache import (
    CachedStages,
    StageStore,
    StageUse,
    draft_inputs,
    engine_inputs,
)
from exporter.stage_cache.entries import load_draft, load_engine, save_draft, save_engine
from exporter.stage_cache.keys import DRAFT, ENGINE, FLOAT, float_part
from exporter.stages.engine import build_engine, build_request, engine_build, require_possible
from exporter.stages.failure import Scene, told_if_failed
from exporter.stages.publication import publish

if TYPE_CHECKING:
    from exporter.sources.inputs import Inputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What an export made.

    ``seconds`` is the wall time of each stage that ran, ``stages`` what became of those that can be
    taken from the cache.
    """

    bundle: Bundle
    ledger: Ledger
    engine: dict[str, Any]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    stages: tuple[StageUse, ...] = ()


def run(
    spec: ExportSpec,
    progress: Progress = silent,
    *,
    inputs: Inputs | None = None,
    cache: StageStore | None = None,
    out: Path | None = None,
    signer: Signer | None = None,
    spread: Spread | None = None,
) -> ExportResult:
    """Do everything that ``spec`` asks for and publish the bundle.

    ``inputs`` replaces what :func:`exporter.sources.inputs.prepare` would load. With a ``cache``
    stages that another run has made are taken from there; only for a spec without ``inputs``, which
    alone says what they depend on. ``out`` is where to publish in place of ``spec.out``, which the
    manifest still names; ``signer`` signs what is published. ``spread`` helps to look at images,
    which changes no byte of what is made.

    Raises:
        GateFailedError: a gate failed; nothing is published.
        InputError: a checkpoint, image, folder or target cannot be used.
        EnvironmentLackError: this machine lacks something.
    """
    if inputs is not None:
        cache = None
    out = out or spec.out
    clock = StageClock(progress)
    asked = resolve_targets(spec.target)
    backend = choose_backend(spec.backend, asked, options=spec.build)
    decision = decide_engine(
        asked, backend, spec.precision, allow_emulated=spec.build.allow_emulated
    )
    require_possible(spec, asked, backend, decision)
    stages = CachedStages(cache)
    with told_if_failed(spec, clock, out) as scene, BundleWriter(out, signer) as writer:
        folder = writer.path(".")
        draft = _draft(
            spec,
            folder,
            stages,
            clock=clock,
            scene=scene,
            inputs=inputs,
            half_scales=decision.emulated,
            spread=spread,
        )
        scene.show(draft)
        built = None
        if backend is not None and decision.build_here:
            with clock.stage("engine") as advance:
                built = _engine(
                    spec,
                    folder,
                    draft,
                    stages,
                    advance=advance,
                    backend=backend,
                    decision=decision,
                )
        told = engine_build(spec, draft, half_scales=decision.emulated)
        engine = EngineOutcome(built=built, deferred=defer(decision, told))
        waits = engine.deferred if built is None else None
        reason = waits.not_run_reason if waits else engine_not_run_reason()
        ledger = draft.ledger.with_stage(parity.not_run("engine", reason))
        with clock.stage("publish"):
            published = publish(
                writer,
                spec,
                draft,
                ledger,
                engine,
                half_scales=decision.emulated,
                seconds={**draft.seconds, **clock.seconds},
            )
    replaced = [f"replaced {out}, which held {' and '.join(writer.lost)}"] if writer.lost else []
    return ExportResult(
        bundle=published,
        ledger=ledger,
        engine=engine.to_json(),
        notes=(*draft.notes, *engine.notes, *stages.notes, *replaced),
        seconds=clock.seconds,
        stages=tuple(stages.uses),
    )


def _draft(
    spec: ExportSpec,
    folder: Path,
    stages: CachedStages,
    *,
    clock: StageClock,
    scene: Scene,
    inputs: Inputs | None,
    half_scales: bool,
    spread: Spread | None,
) -> Draft:
    def make() -> Draft:
        # Loads torch and onnx, which nobody needs where the draft is there already. onnxsim's
        # process, where it will be wanted, loads its libraries meanwhile.
        from exporter.simplify import started_simplifier

        with ExitStack() as held:
            simplifier = functools.cache(lambda: held.enter_context(started_simplifier()))
            if not stages.has(FLOAT, float_part(stages.named[DRAFT])):
                simplifier()
            from exporter.drafting import make_draft

            return make_draft(
                spec,
                folder,
                clock,
                scene,
                stages,
                inputs=inputs,
                half_scales=half_scales,
                spread=spread,
                simplifier=simplifier,
            )

    return stages.get(
        DRAFT,
        lambda: draft_inputs(spec, half_scales=half_scales),
        folder,
        make=make,
        load=load_draft,
        save=save_draft(folder),
    )


def _engine(
    spec: ExportSpec,
    folder: Path,
    draft: Draft,
    stages: CachedStages,
    *,
    advance: Callable[[float], None],
    backend: Backend,
    decision: EngineDecision,
) -> BuiltEngine:
    request = build_request(spec, folder, decision.build_here)

    def make() -> BuiltEngine:
        return build_engine(backend, request, draft.convolutions, advance)

    if backend.name != RTX:
        # It times the kernels of this GPU, at this moment.
        return make()
    return stages.get(
        ENGINE,
        lambda: engine_inputs(stages.named[DRAFT], request, backend),
        folder,
        make=make,
        load=load_engine,
        save=save_engine,
    )
