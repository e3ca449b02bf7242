"""From the simplified float graph to the one that the builder parses, at any precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial, reduce

import onnx

from calibration.table import CalibrationTable
from exporter import parity
from exporter.calibrator import observe_images
from exporter.errors import InputError
from exporter.localization.graphs import GraphPair
from exporter.parity import Gate
from exporter.precision import (
    BFLOAT16,
    HALF,
    NarrowType,
    larger,
    largest_magnitudes,
    require_half_range,
    to_type,
)
from exporter.quantization.fp8 import Fp8Options, quantize_fp8
from exporter.quantization.half_scales import to_half_scales
from exporter.quantization.plain_chain import PlainChain, read_chain
from exporter.quantization.quantizers import QuantizerOptions, open_quantizer
from exporter.quantization.replay import load_table, replay, require_binding
from exporter.quantization.trained_scales import quantize_trained
from exporter.running.onnx_runner import OnnxRunner
from exporter.running.runnable import runnable
from exporter.sources.inputs import Inputs
from exporter.sources.source import Source
from exporter.spec import RANDOM, ExportSpec, Precision
from exporter.stages.int8 import Int8Request, choose
from exporter.stages.judge import Judge

_NARROW = {Precision.FP16: HALF, Precision.BF16: BFLOAT16}

Stage = Callable[[str], AbstractContextManager[Callable[[float], None]]]
"""Opens a named stage of the run and gives what reports its progress, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precise:
    """The float graph to publish, the graph that the builder will parse, and its INT8 scales.

    Nodes ``kept_half`` and ``kept_float`` are not in INT8: for a gate's sake, and because the
    recipe or the weights say so.
    """

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable | None = None
    kept_half: tuple[str, ...] = ()
    kept_float: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def apply_precision(
    spec: ExportSpec,
    inputs: Inputs,
    model: onnx.ModelProto,
    judge: Judge,
    stage: Stage,
    *,
    half_scales: bool = False,
) -> Precise:
    """The graph to build from at ``spec.precision``; its row is in ``judge``'s ledger.

    With ``half_scales`` an int8 graph is half all through, for targets that compute it so.

    Raises:
        GateFailedError: if it is not close enough to the original.
        InputError: if an option or the calibration images do not fit.
    """
    _require_measurable(spec, inputs, judge)
    if spec.precision is Precision.FP32:
        return _float(spec, model, judge, stage)
    kind = _NARROW.get(spec.precision)
    if kind is not None:
        return _narrow(spec, inputs, model, judge, stage, kind=kind)
    if spec.precision is Precision.FP8:
        return _fp8(spec, inputs, model, judge, stage)
    quantize = _quantize if inputs.source.trained is None else _quantize_trained
    precise = quantize(spec, inputs, model, judge, stage)
    return _half_all_through(spec, inputs, precise, judge, stage) if half_scales else precise


def _float(spec: ExportSpec, model: onnx.ModelProto, judge: Judge, stage: Stage) -> Precise:
    """The graph is there; it is held to all images, and to the gates that were asked for."""
    gate = _as_asked(parity.GATES["simplified"], spec)
    (row,) = (row for row in judge.ledger.stages if row.stage == "simplified")
    if (row.images, row.gate) != (judge.ledger.image_count, gate):
        with stage("fp32"):
            judge.recheck("simplified", OnnxRunner(model).run, gate)
    return Precise(model=model, graph=model)


def _half_all_through(
    spec: ExportSpec, inputs: Inputs, precise: Precise, judge: Judge, stage: Stage
) -> Precise:
    """For targets that compute INT8 in half: the Q/DQ graph with half scales, judged anew."""
    with stage("half"):
        require_half_range(_magnitudes(precise.model, judge))
        graph = to_half_scales(precise.graph)
        way = runnable(graph, str(spec.precision), half_scales=True)
        judge.recheck("int8", way.open().run, _precision_gate(spec, inputs.source))
    return replace(precise, graph=graph)


def _narrow(
    spec: ExportSpec,
    inputs: Inputs,
    model: onnx.ModelProto,
    judge: Judge,
    stage: Stage,
    *,
    kind: NarrowType,
) -> Precise:
    with stage(kind.name):
        if kind is HALF:
            require_half_range(_magnitudes(model, judge))
        graph = to_type(kind, model)
        way = runnable(graph, str(spec.precision))
        pair = GraphPair(reference="simplified", good=model, bad=graph)
        judge.check(str(spec.precision), way.open().run, _precision_gate(spec, inputs.source), pair)
    return Precise(model=model, graph=graph, notes=way.notes)


def _fp8(
    spec: ExportSpec, inputs: Inputs, model: onnx.ModelProto, judge: Judge, stage: Stage
) -> Precise:
    images = inputs.calibration
    if images is None:
        raise InputError("fp8 needs calibration images: pass --calib folder")
    options = Fp8Options(
        keep_float=spec.keep_float,
        per_tensor_weights=spec.per_tensor_weights,
        preprocess=inputs.preprocess,
    )
    with stage("calibrate") as advance:
        made = quantize_fp8(model, read_chain(model), images, options, advance)
    with stage("quantize"):
        judge.recheck("simplified", OnnxRunner(made.model).run)
        way = runnable(made.graph, str(spec.precision))
        pair = GraphPair(reference="simplified", good=made.model, bad=made.graph)
        judge.check(str(spec.precision), way.open().run, _precision_gate(spec, inputs.source), pair)
    return Precise(model=made.model, graph=made.graph, table=made.table, kept_float=made.kept_float)


def _require_measurable(spec: ExportSpec, inputs: Inputs, judge: Judge) -> None:
    """A gate that was asked for must not go unmeasured."""
    if spec.max_drop is not None and judge.labels is None:
        raise InputError(
            "--max-drop needs labels: pass --evaluation with a folder for each of the classes"
        )
    if spec.min_agreement is not None and inputs.interface.num_classes is None:
        raise InputError(
            "--min-agreement compares the answers of a classifier, which this network is not"
        )


def _quantize_trained(
    spec: ExportSpec,
    inputs: Inputs,
    model: onnx.ModelProto,
    judge: Judge,
    stage: Stage,
) -> Precise:
    """INT8 by the scales that came with the weights; calibration images only check them."""
    trained = inputs.source.trained
    assert trained is not None
    if spec.recipe or spec.per_tensor_weights or spec.power_of_two:
        raise InputError(
            f"{spec.weights} carries its scales, which are respected: leave --recipe, "
            "--per-tensor-weights and --power-of-two away"
        )
    images, observers = inputs.calibration, None
    if images is not None:
        with stage("calibrate") as advance:
            observers = observe_images(model, images, advance)
    with stage("quantize"):
        made = quantize_trained(
            model,
            trained.scales,
            keep_float=spec.keep_float,
            observers=observers,
            image_count=images.count if images else 0,
            preprocess=inputs.preprocess,
        )
        gate = _precision_gate(spec, inputs.source)
        pair = GraphPair(reference="simplified", good=model, bad=made.graph)
        judge.check("int8", OnnxRunner(made.graph).run, gate, pair)
    return Precise(
        model=model,
        graph=made.graph,
        table=made.table,
        kept_float=made.float_convolutions,
        notes=made.notes,
    )


def _quantize(
    spec: ExportSpec, inputs: Inputs, model: onnx.ModelProto, judge: Judge, stage: Stage
) -> Precise:
    images = inputs.calibration
    request = Int8Request(
        recipe=spec.recipe,
        gate=_precision_gate(spec, inputs.source),
        dial=spec.min_sqnr_db is not None or spec.max_drop is not None,
        title=spec.title,
    )
    options = QuantizerOptions(
        keep_float=spec.keep_float,
        per_tensor_weights=spec.per_tensor_weights,
        power_of_two=spec.power_of_two,
        preprocess=inputs.preprocess,
    )
    chain = read_chain(model)
    if spec.calibration_table is not None:
        return _replay(spec, inputs, model, chain, options=options, judge=judge, stage=stage)
    if images is None:
        raise InputError("int8 needs calibration images: pass --calib folder")
    with stage("calibrate") as advance:
        quantizer = open_quantizer(model, chain, images, options, advance)
    with stage("quantize") as advance:
        made, kept = choose(quantizer, request, judge, advance)
    return Precise(
        model=made.model,
        graph=made.graph,
        table=made.table,
        kept_half=kept,
        kept_float=chain.float_nodes if chain is not None else (),
    )


def _replay(
    spec: ExportSpec,
    inputs: Inputs,
    model: onnx.ModelProto,
    chain: PlainChain | None,
    *,
    options: QuantizerOptions,
    judge: Judge,
    stage: Stage,
) -> Precise:
    """INT8 by the table of an earlier run."""
    assert spec.calibration_table is not None
    with stage("calibrate"):
        table = load_table(spec.calibration_table)
        require_binding(table, model, inputs.calibration, options, spec.recipe)
    with stage("quantize"):
        made = replay(model, chain, inputs.calibration, table)
        if chain is not None:
            judge.recheck("simplified", OnnxRunner(made.model).run)
        gate = _precision_gate(spec, inputs.source)
        pair = GraphPair(reference="simplified", good=made.model, bad=made.graph)
        judge.check("int8", OnnxRunner(made.graph).run, gate, pair)
    return Precise(
        model=made.model,
        graph=made.graph,
        table=made.table,
        kept_half=tuple(table.options.get("keep_half", ())),
        kept_float=(*table.options.get("keep_float", ()), *(chain.float_nodes if chain else ())),
    )


def _precision_gate(spec: ExportSpec, source: Source) -> Gate:
    gate = parity.GATES[str(spec.precision)]
    if source.origin["source"] == RANDOM and spec.precision.is_quantized:
        gate = parity.UNTRAINED_GATE
    trained = source.trained
    if trained is not None and not spec.keep_float:
        gate = trained.gate
    return _as_asked(gate, spec)


def _as_asked(gate: Gate, spec: ExportSpec) -> Gate:
    if spec.min_sqnr_db is not None:
        gate = replace(gate, min_sqnr_db=spec.min_sqnr_db)
    if spec.min_agreement is not None:
        gate = replace(gate, min_top1_agreement=spec.min_agreement)
    if spec.max_drop is not None:
        gate = replace(gate, max_top1_drop=spec.max_drop / 100)
    return gate


def _magnitudes(model: onnx.ModelProto, judge: Judge) -> Mapping[str, float]:
    """Of every tensor that half may not hold, over all that is judged."""
    return reduce(larger, judge.images.in_parts(partial(largest_magnitudes, model)))
