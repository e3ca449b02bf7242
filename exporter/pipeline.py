"""The road from a spec to a published bundle: the only place that knows the order of the stages.

load -> reparameterize -> export -> simplify -> contract -> [calibrate -> Q/DQ | half] -> engine
-> publish. After each of them the ledger compares its outputs with the original network's; the
first failed gate ends the run and nothing is published.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
from torch import nn

from calibration.recipe import RecipeOptions
from calibration.table import CalibrationTable
from exporter import bundle as files
from exporter import contract, parity, report
from exporter.bundle import Bundle, BundleWriter
from exporter.calibrator import calibrate
from exporter.chain_quantizer import observe_chain, quantize_observed
from exporter.contract import ContractVerdict
from exporter.engine import (
    Backend,
    BuildRequest,
    BuiltEngine,
    check_engine,
    engine_not_run_reason,
    get_backend,
    parse_targets,
)
from exporter.errors import InputError
from exporter.evidence import manifest, write_evidence
from exporter.fused_blocks import Fused, expected_blocks, fuse
from exporter.graph import pointwise_convolutions, quantizable
from exporter.inputs import Inputs, prepare
from exporter.judge import Judge
from exporter.network import torch_runner
from exporter.onnx_export import export_network, export_onnx
from exporter.onnx_runner import OnnxRunner
from exporter.parity import Gate, Ledger
from exporter.plain_chain import read_chain
from exporter.precision import largest_magnitudes, require_half_range, to_half
from exporter.quantize import quantize
from exporter.simplify import simplify
from exporter.source import Source
from exporter.spec import RANDOM, ExportSpec, Precision, Recipe
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Precise:
    """The float graph to publish, the graph that the builder will parse, and its INT8 scales."""

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable | None = None


@dataclass(slots=True)
class _Clock:
    """Tells the caller which stage runs and remembers how long each took."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        start = time.perf_counter()
        self.progress(name, 0.0)
        yield lambda fraction: self.progress(name, min(fraction, 1.0))
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.progress(name, 1.0)


def run(
    spec: ExportSpec,
    progress: Progress = silent,
    *,
    inputs: Inputs | None = None,
) -> ExportResult:
    """Do everything that ``spec`` asks for and publish the bundle.

    ``inputs`` replaces what :func:`prepare` would load.

    Raises:
        GateFailedError: a gate failed; nothing is published.
        InputError: a checkpoint, image, folder or target cannot be used.
        EnvironmentLackError: this machine lacks something.
    """
    clock = _Clock(progress)
    backend = get_backend(spec.backend)
    targets = parse_targets(spec.target, backend, spec.precision)
    with BundleWriter(spec.out) as writer:
        with clock.stage("load"):
            inputs = inputs or prepare(spec)
        with clock.stage("reparameterize"):
            judge = Judge(spec, inputs.source, inputs.evaluation, inputs.interface)
            fused = _reparameterize(inputs, judge)
        model, verdict = _export(spec, inputs, fused.module, judge, clock)
        precise = _apply_precision(spec, inputs, model, judge, clock)
        onnx.save(precise.model, writer.path(files.MODEL))
        graph_path = writer.path(files.MODEL)
        if spec.precision is not Precision.FP32:
            graph_path = writer.path(f"model.{spec.precision}.onnx")
            onnx.save(precise.graph, graph_path)
        request = BuildRequest(
            onnx_path=graph_path,
            precision=spec.precision,
            targets=targets,
            batch=spec.batch,
            size=spec.dynamic_size,
            workspace_mib=spec.workspace_mib,
        )
        with clock.stage("engine") as advance:
            engine = _build(backend, request, model, advance, kept=len(spec.keep_float))
        judge.skip("engine", engine_not_run_reason())
        with clock.stage("publish"):
            notes = inputs.source.notes + inputs.notes + fused.notes + judge.notes
            write_evidence(writer, inputs, judge, engine, precise.table)
            document = manifest(
                spec,
                inputs,
                engine,
                fused=fused,
                verdict=verdict,
                recipe=precise.table.method if precise.table else None,
                notes=notes,
            )
            report.write(writer, document, judge.ledger, engine.summary.to_json(), clock.seconds)
            published = writer.publish(document)
    return ExportResult(
        bundle=published,
        ledger=judge.ledger,
        engine=engine.summary.to_json(),
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
    preprocess = inputs.preprocess
    metadata = {
        "variant": spec.variant.name if spec.variant else spec.title,
        "weights_sha256": str(inputs.source.origin.get("sha256")),
        "preprocess": files.dumps(preprocess.to_json() if preprocess else None),
    }
    plain = fused if isinstance(fused, RepVGG) and _is_plain(spec) else None
    with clock.stage("export"):
        if plain is not None:
            (_, _, height, width) = inputs.interface.example[0]
            free_size = spec.dynamic_size is not None
            model = export_onnx(plain, (height, width), metadata, free_size=free_size)
        else:
            model = export_network(fused, inputs.interface, spec.title, metadata)
        judge.check("onnx", OnnxRunner(model).run)
    with clock.stage("simplify"):
        model = simplify(model, judge.samples(SIMPLIFY_SAMPLE))
        judge.check("simplified", OnnxRunner(model).run)
        if plain is not None:
            verdict = contract.require(model, plain.variant, plain.num_classes)
        else:
            verdict = contract.require_blocks(model, expected_blocks(fused), spec.title)
    return model, verdict


def _is_plain(spec: ExportSpec) -> bool:
    return spec.variant is not None and spec.variant.squeeze is Squeeze.NONE


def _apply_precision(
    spec: ExportSpec, inputs: Inputs, model: onnx.ModelProto, judge: Judge, clock: _Clock
) -> Precise:
    if spec.precision is Precision.FP32:
        return Precise(model=model, graph=model)
    gate = _precision_gate(spec, inputs.source)
    if spec.precision is Precision.FP16:
        with clock.stage("half"):
            require_half_range(largest_magnitudes(model, judge.batches()))
            graph = to_half(model)
            judge.check("fp16", OnnxRunner(graph, optimize=False).run, gate)
        return Precise(model=model, graph=graph)
    return _quantize(spec, inputs, model, judge, clock)


def _quantize(
    spec: ExportSpec,
    inputs: Inputs,
    model: onnx.ModelProto,
    judge: Judge,
    clock: _Clock,
) -> Precise:
    gate = _precision_gate(spec, inputs.source)
    images = inputs.calibration
    if images is None:
        raise InputError("int8 needs calibration images: pass CALIB=folder")
    plain = read_chain(model) if spec.recipe is None or spec.recipe.needs_chain else None
    recipe = spec.recipe or (Recipe.FULL if plain else Recipe.MSE)
    if recipe.needs_chain and plain is None:
        raise InputError(
            f"recipe {recipe} rescales a plain chain of convolutions, which {spec.title} is not; "
            "use --recipe mse"
        )
    if plain is not None:
        with clock.stage("calibrate") as advance:
            observed = observe_chain(model, plain, images, advance)
        with clock.stage("quantize"):
            made = quantize_observed(
                model,
                plain,
                observed,
                str(recipe),
                options=RecipeOptions(keep_float=frozenset(spec.keep_float)),
                preprocess=inputs.preprocess,
            )
            # Equalization changes no float result: the graph that is published is judged anew.
            judge.recheck("simplified", OnnxRunner(made.model).run)
            judge.check("int8", OnnxRunner(made.graph).run, gate)
        return Precise(model=made.model, graph=made.graph, table=made.table)
    with clock.stage("calibrate") as advance:
        table = calibrate(
            model,
            images,
            str(recipe),
            inputs.preprocess,
            lambda done: advance(done / images.count),
        )
    with clock.stage("quantize"):
        graph = quantize(model, table, keep_float=spec.keep_float)
        judge.check("int8", OnnxRunner(graph).run, gate)
    return Precise(model=model, graph=graph, table=table)


def _precision_gate(spec: ExportSpec, source: Source) -> Gate:
    gate = parity.GATES[str(spec.precision)]
    if source.origin["source"] == RANDOM and spec.precision is Precision.INT8:
        gate = parity.UNTRAINED_INT8_GATE
    if spec.min_sqnr_db is not None:
        gate = replace(gate, min_sqnr_db=spec.min_sqnr_db)
    if spec.min_agreement is not None:
        gate = replace(gate, min_top1_agreement=spec.min_agreement)
    return gate


def _build(
    backend: Backend,
    request: BuildRequest,
    model: onnx.ModelProto,
    advance: Callable[[float], None],
    *,
    kept: int,
) -> BuiltEngine:
    """The engine of ``request``; ``model`` is the float graph whose convolutions it must have.

    ``kept`` of them were asked to stay float in an INT8 engine.
    """
    engine = backend.build(request, lambda _phase, fraction: advance(fraction))
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    constant = sum(node.op_type == "Conv" for node in quantizable(model))
    check_engine(
        engine.summary,
        request.precision,
        convolutions,
        computed_weights=convolutions - constant + kept,
        pointwise=pointwise_convolutions(model),
    )
    return engine
