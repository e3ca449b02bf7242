"""The road from a spec to everything of a bundle but its engine, and the order of its stages.

load -> float graph -> [calibrate -> Q/DQ | half] -> [prologue] -> evidence

After each of them the ledger compares its outputs with the original network's; the first failed
gate ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import onnx

from exporter import bundle as files
from exporter.clock import StageClock
from exporter.draft import Draft, ExpectedConvolutions
from exporter.files.private_folder import scratch_folder
from exporter.float_graph import (
    FloatGraph,
    fuse_network,
    load_float_graph,
    make_float_graph,
    save_float_graph,
)
from exporter.graph import pointwise_convolutions, quantizable
from exporter.graph.annotation import annotate_precision
from exporter.graph.prologue import Prologue
from exporter.plan.commands import GraphInput
from exporter.running.spread import Spread
from exporter.simplify import Simplifier
from exporter.sources.inputs import Inputs, prepare
from exporter.spec import ExportSpec, Precision
from exporter.stage_cache import CachedStages, float_inputs
from exporter.stage_cache.keys import FLOAT
from exporter.stages.evidence import (
    document,
    gather,
    pictures,
    what_went_in,
    write_calibration,
    write_reference,
)
from exporter.stages.failure import Scene, Told
from exporter.stages.judge import Judge, Judged
from exporter.stages.precision import Precise, apply_precision
from exporter.stages.prologue import choose_prologue, precede


def make_draft(
    spec: ExportSpec,
    folder: Path,
    clock: StageClock,
    scene: Scene,
    stages: CachedStages,
    *,
    simplifier: Callable[[], Simplifier],
    inputs: Inputs | None = None,
    half_scales: bool = False,
    spread: Spread | None = None,
) -> Draft:
    """Make the graphs that ``spec`` asks for, in ``folder``, and measure them.

    ``inputs`` replaces what :func:`prepare` would load; ``spread`` helps to look at images;
    ``simplifier`` gives the one that is running, or starts it.
    ``half_scales`` is for targets that compute INT8 in half. ``scene`` learns what a failed gate
    will have to tell. The float graph comes from ``stages``.

    Raises:
        GateFailedError: a gate failed.
        InputError: a checkpoint, image or folder cannot be used.
        EnvironmentLackError: this machine lacks something.
    """
    with clock.stage("load"):
        inputs = inputs or prepare(spec, spread=spread)
        prologue = choose_prologue(spec, inputs)
    if inputs.source.trained is not None:
        stages.leave("the weights carry INT8 scales, whose network is not kept")
    float_graph, judge = _float_graph(
        spec,
        inputs,
        prologue,
        clock=clock,
        scene=scene,
        stages=stages,
        simplifier=simplifier,
    )
    model = float_graph.model
    plain = apply_precision(spec, inputs, model, judge, clock.stage, half_scales=half_scales)
    kept = {*spec.keep_float, *plain.kept_half, *plain.kept_float}
    plain = _described(spec, plain, kept)
    precise = precede(
        plain, prologue, judge, clock.stage, precision=spec.precision, half_scales=half_scales
    )
    with clock.stage("evidence"):
        _write(folder, precise, inputs, judge, precision=spec.precision, prologue=prologue)
        gather(judge, model, plain.model, plain.graph, str(spec.precision))
        drawn = pictures(inputs, judge)
    layout = prologue.layout if prologue else None
    return Draft(
        document=document(
            inputs,
            figures=float_graph.figures,
            blocks=float_graph.blocks,
            verdict=float_graph.verdict,
            prologue=prologue,
            recipe=precise.table.method if precise.table else None,
        ),
        notes=inputs.source.notes
        + inputs.notes
        + float_graph.notes
        + precise.notes
        + judge.images.notes,
        ledger=judge.ledger,
        pictures=drawn,
        inputs=tuple(
            GraphInput.of(port.name, port.shape, layout) for port in inputs.interface.inputs
        ),
        convolutions=_expected_convolutions(model, kept),
        # In the order of the road, also where the float graph was made by another run.
        seconds={"load": 0.0, **float_graph.seconds, **clock.seconds},
    )


def _float_graph(
    spec: ExportSpec,
    inputs: Inputs,
    prologue: Prologue | None,
    *,
    clock: StageClock,
    scene: Scene,
    stages: CachedStages,
    simplifier: Callable[[], Simplifier],
) -> tuple[FloatGraph, Judge]:
    """The graph, and a judge that has its rows."""

    def judge_of(before: Judged | None = None) -> Judge:
        judge = Judge(
            spec, inputs.source, inputs.evaluation, inputs.interface, prologue, before=before
        )
        _watch(scene, inputs, judge)
        return judge

    judges: list[Judge] = []

    def make() -> FloatGraph:
        started = simplifier()
        with clock.stage("reparameterize"):
            judges.append(judge_of())
            fused = fuse_network(inputs, judges[0])
        return make_float_graph(spec, inputs, fused, judges[0], clock=clock, simplifier=started)

    with scratch_folder("stages") as temporary:
        made = stages.get(
            FLOAT,
            lambda: float_inputs(spec),
            temporary,
            make=make,
            load=load_float_graph,
            save=save_float_graph,
        )
    return made, judges[0] if judges else judge_of(made.judged)


def _write(
    folder: Path,
    precise: Precise,
    inputs: Inputs,
    judge: Judge,
    *,
    precision: Precision,
    prologue: Prologue | None,
) -> None:
    """The files of the draft."""
    onnx.save(precise.model, folder / files.MODEL)
    if precision is not Precision.FP32:
        onnx.save(precise.graph, folder / files.graph_name(str(precision)))
    pixel_inputs = [port.name for port in inputs.interface.inputs] if prologue else []
    write_calibration(folder, precision, precise.table, pixel_inputs)
    write_reference(folder, inputs, judge, prologue)


def _watch(scene: Scene, inputs: Inputs, judge: Judge) -> None:
    """A gate that fails from here on tells what ``judge`` will have seen by then."""

    def tell() -> Told:
        return Told(
            document=what_went_in(inputs),
            notes=inputs.source.notes + inputs.notes + judge.images.notes,
            ledger=judge.ledger,
            pictures=pictures(inputs, judge),
        )

    scene.tell = tell


def _expected_convolutions(model: onnx.ModelProto, kept: Collection[str]) -> ExpectedConvolutions:
    """Those of the float graph ``model``; the nodes ``kept`` are not quantized."""
    total = sum(node.op_type == "Conv" for node in model.graph.node)
    quantized = sum(n.op_type == "Conv" and n.name not in kept for n in quantizable(model))
    return ExpectedConvolutions(
        total=total, unquantized=total - quantized, pointwise=pointwise_convolutions(model)
    )


def _described(spec: ExportSpec, precise: Precise, kept: Collection[str]) -> Precise:
    if spec.precision is Precision.FP32:
        return precise
    graph = annotate_precision(precise.graph, str(spec.precision), table=precise.table, kept=kept)
    return replace(precise, graph=graph)
