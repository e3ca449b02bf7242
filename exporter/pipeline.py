"""The road from a spec to a published bundle: the only place that knows the order of the stages.

load -> reparameterize -> export -> simplify -> contract -> [calibrate -> Q/DQ | half] -> [prologue]
-> engine -> publish. After each of them the ledger compares its outputs with the original
network's; the first failed gate ends the run and nothing is published.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
from torch import nn

from exporter import bundle as files
from exporter import contract
from exporter.annotation import Description, annotate, annotate_precision
from exporter.bundle import Bundle
from exporter.bundle_writer import BundleWriter, Signer
from exporter.contract import ContractVerdict
from exporter.devices import resolve_targets
from exporter.engine import (
    BuildRequest,
    engine_not_run_reason,
)
from exporter.engine_stage import build_engine, engine_build, require_possible
from exporter.evidence import (
    gather,
    graph_metadata,
    manifest,
    write_calibration,
    write_evidence,
    write_report,
)
from exporter.failure import told_if_failed
from exporter.fused_blocks import Fused, expected_blocks, fuse
from exporter.inputs import Inputs, prepare
from exporter.judge import Judge
from exporter.ledger import Ledger
from exporter.localization import GraphPair
from exporter.module_localization import ModulePair
from exporter.network import torch_runner
from exporter.onnx_export import export_network, export_onnx
from exporter.onnx_runner import OnnxRunner
from exporter.plan_engine import (
    EngineOutcome,
    choose_backend,
    decide_engine,
    defer,
)
from exporter.precision_stage import Precise, apply_precision
from exporter.prologue_stage import choose_prologue, precede
from exporter.sbom import sbom
from exporter.simplify import simplify
from exporter.spec import ExportSpec, Precision
from models.repvgg import RepVGG
from models.variants import Squeeze

Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of it that is done, 0 to 1."""


def silent(_stage: str, _fraction: float) -> None:
    """Report nothing."""


SIMPLIFY_SAMPLE = 8
"""Images on which the simplified graph must equal its input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What an export made; ``seconds`` is the wall time of each stage."""

    bundle: Bundle
    ledger: Ledger
    engine: dict[str, Any]
    notes: tuple[str, ...]
    seconds: dict[str, float]


@dataclass(slots=True)
class _Clock:
    """Tells the caller which stage runs and remembers how long each took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    running: str | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        start = time.perf_counter()
        self.running = name
        self.progress(name, 0.0)
        yield lambda fraction: self.progress(name, min(fraction, 1.0))
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.progress(name, 1.0)


def run(
    spec: ExportSpec,
    progress: Progress = silent,
    *,
    inputs: Inputs | None = None,
    signer: Signer | None = None,
) -> ExportResult:
    """Do everything that ``spec`` asks for and publish the bundle.

    ``inputs`` replaces what :func:`prepare` would load; ``signer`` signs what is published.

    Raises:
        GateFailedError: a gate failed; nothing is published.
        InputError: a checkpoint, image, folder or target cannot be used.
        EnvironmentLackError: this machine lacks something.
    """
    clock = _Clock(progress)
    asked = resolve_targets(spec.target)
    backend = choose_backend(spec.backend, asked, options=spec.build)
    decision = decide_engine(
        asked, backend, spec.precision, allow_emulated=spec.build.allow_emulated
    )
    require_possible(spec, asked, backend, decision)
    with told_if_failed(spec, clock) as scene, BundleWriter(spec.out, signer) as writer:
        with clock.stage("load"):
            inputs = scene.inputs = inputs or prepare(spec)
            prologue = choose_prologue(spec, inputs)
        with clock.stage("reparameterize"):
            judge = Judge(spec, inputs.source, inputs.evaluation, inputs.interface, prologue)
            scene.judge = judge
            fused = _reparameterize(inputs, judge)
        model, verdict = _export(spec, inputs, fused.module, judge, clock)
        precise = apply_precision(
            spec, inputs, model, judge, clock.stage, half_scales=decision.emulated
        )
        kept = {*spec.keep_float, *precise.kept_half, *precise.kept_float}
        plain = _described(spec, precise, kept)
        precise = precede(
            plain,
            prologue,
            judge,
            clock.stage,
            precision=spec.precision,
            half_scales=decision.emulated,
        )
        onnx.save(precise.model, writer.path(files.MODEL))
        graph_path = writer.path(files.MODEL)
        if spec.precision is not Precision.FP32:
            graph_path = writer.path(f"model.{spec.precision}.onnx")
            onnx.save(precise.graph, graph_path)
        pixel_inputs = [port.name for port in inputs.interface.inputs] if prologue else []
        cache = write_calibration(writer, spec.precision, precise.table, pixel_inputs)
        request = BuildRequest(
            onnx_path=graph_path,
            precision=spec.precision,
            targets=decision.build_here,
            batch=spec.batch,
            size=spec.dynamic_size,
            workspace_mib=spec.workspace_mib,
            float_path=writer.path(files.MODEL),
            cache_path=cache,
            options=spec.build,
        )
        built = None
        if backend is not None and decision.build_here:
            with clock.stage("engine") as advance:
                built = build_engine(backend, request, model, advance, kept=kept)
        told = engine_build(spec, inputs, prologue, half_scales=decision.emulated)
        deferred = defer(decision, told)
        engine = EngineOutcome(built=built, deferred=deferred)
        judge.skip(
            "engine", deferred.not_run_reason if deferred and not built else engine_not_run_reason()
        )
        with clock.stage("publish"):
            notes = inputs.source.notes + inputs.notes + fused.notes + precise.notes + judge.notes
            notes += engine.notes
            gather(judge, model, plain.model, plain.graph, str(spec.precision))
            write_evidence(writer, inputs, judge, engine, prologue)
            document = manifest(
                spec,
                inputs,
                engine,
                fused=fused,
                verdict=verdict,
                prologue=prologue,
                recipe=precise.table.method if precise.table else None,
                half_scales=decision.emulated,
                notes=notes,
            )
            writer.write_text(files.SBOM, sbom(document["created"]))
            write_report(writer, document, inputs, judge, engine, seconds=clock.seconds)
            published = writer.publish(document)
    return ExportResult(
        bundle=published,
        ledger=judge.ledger,
        engine=engine.to_json(),
        notes=notes,
        seconds=clock.seconds,
    )


def _reparameterize(inputs: Inputs, judge: Judge) -> Fused:
    source = inputs.source
    if source.form == "deploy":
        judge.skip("reparameterized", "the checkpoint is already in deploy form")
        return Fused(module=source.module)
    fused = fuse(source.module, judge.first_batch())
    judge.check("reparameterized", torch_runner(fused.module, inputs.interface))
    return fused


def _export(
    spec: ExportSpec, inputs: Inputs, fused: nn.Module, judge: Judge, clock: _Clock
) -> tuple[onnx.ModelProto, ContractVerdict]:
    metadata = graph_metadata(spec, inputs)
    plain = fused if isinstance(fused, RepVGG) and _is_plain(spec) else None
    with clock.stage("export"):
        if plain is not None:
            (_, _, height, width) = inputs.interface.example[0]
            free_size = spec.dynamic_size is not None
            model = export_onnx(plain, (height, width), metadata, free_size=free_size)
        else:
            model = export_network(fused, inputs.interface, spec.title, metadata)
        pair = ModulePair(module=fused, interface=inputs.interface, graph=model)
        judge.check("onnx", OnnxRunner(model).run, graphs=pair)
    with clock.stage("simplify"):
        exported, model = model, simplify(model, judge.samples(SIMPLIFY_SAMPLE))
        simplified = GraphPair(reference="onnx", good=exported, bad=model)
        judge.check("simplified", OnnxRunner(model).run, graphs=simplified)
        if plain is not None:
            verdict = contract.require(model, plain.variant, plain.num_classes)
            blocks = {f"{layer.name}.weight": layer.name for layer in plain.variant.layers}
        else:
            expected = expected_blocks(fused)
            verdict = contract.require_blocks(model, expected, spec.title)
            blocks = {block.weight: name for name, block in expected.items()}
    description = Description(title=spec.title, metadata=metadata, blocks=blocks)
    return annotate(model, description), verdict


def _described(spec: ExportSpec, precise: Precise, kept: Collection[str]) -> Precise:
    if spec.precision is Precision.FP32:
        return precise
    graph = annotate_precision(precise.graph, str(spec.precision), table=precise.table, kept=kept)
    return replace(precise, graph=graph)


def _is_plain(spec: ExportSpec) -> bool:
    return spec.variant is not None and spec.variant.squeeze is Squeeze.NONE
