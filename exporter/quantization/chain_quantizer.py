"""Equalizes, rounds and corrects a plain graph by any rung of the ladder."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from calibration.chain import Chain, ChainError
from calibration.images import Preprocess
from calibration.recipe import Outcome, RecipeOptions, quantize_by_recipe
from calibration.recipe import Recipe as Rung
from calibration.sequential import QuantizedChain
from calibration.table import CalibrationTable, TensorRange
from exporter.errors import GateFailedError
from exporter.graph import graph_sha256, require_nodes
from exporter.quantization.chain_observer import Observed
from exporter.quantization.full_range import use_full_range
from exporter.quantization.onnx_kernels import OnnxKernels
from exporter.quantization.plain_chain import PlainChain, with_chain
from exporter.quantize import RoundedWeight, quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGraphs:
    """The equalized float graph, the Q/DQ graph made from it, and the table that binds them.

    ``outcome`` is the chain of both, before it was written into graphs.
    """

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable
    outcome: Outcome


def quantize_observed(
    model: onnx.ModelProto,
    plain: PlainChain,
    observed: Observed,
    recipe: str,
    *,
    options: RecipeOptions | None = None,
    preprocess: Preprocess | None = None,
) -> QuantizedGraphs:
    """Equalize, round and correct ``model`` by one of calibration.recipe's rungs.

    The classifier, the convolutions inside gates and the options' ``keep_float`` stay float.

    Raises:
        InputError: if ``keep_float`` names no convolution.
        GateFailedError: if equalization would change the float network.
    """
    options = options or RecipeOptions()
    # What stays float anyway may be asked for too.
    chosen = frozenset(options.keep_float).difference(plain.float_nodes)
    options = replace(options, keep_float=chosen)
    outcome = _outcome(plain.chain, observed, Rung(recipe), options)
    equalized = with_chain(model, outcome.equalization.chain)
    table = _table(model, equalized, plain, observed, outcome, method=recipe, preprocess=preprocess)
    return QuantizedGraphs(
        model=equalized,
        graph=integer_graph(model, plain, outcome.quantized, table, options),
        table=table,
        outcome=outcome,
    )


def integer_graph(
    model: onnx.ModelProto,
    plain: PlainChain,
    done: QuantizedChain,
    table: CalibrationTable,
    options: RecipeOptions,
) -> onnx.ModelProto:
    """The Q/DQ graph of ``model`` with the integers and biases of ``done``."""
    biases = {name: stage.bias for name, stage in done.stages.items()}
    nodes = {node.name: node for node in model.graph.node}
    rounded = {
        nodes[name].input[1]: RoundedWeight(integers=stage.weight, scales=stage.weight_scales)
        for name, stage in done.stages.items()
    }
    graph = quantize(
        with_chain(model, done.chain, biases),
        table,
        keep_float=[*options.keep_float, *plain.float_nodes],
        rounded=rounded,
        per_tensor_weights=options.per_tensor_weights,
    )
    return use_full_range(graph, table.unsigned)


def _table(
    model: onnx.ModelProto,
    equalized: onnx.ModelProto,
    plain: PlainChain,
    observed: Observed,
    outcome: Outcome,
    *,
    method: str,
    preprocess: Preprocess | None,
) -> CalibrationTable:
    stages = outcome.quantized.stages
    boundary = dict(zip([s.name for s in plain.chain.stages], plain.boundaries, strict=False))
    statistics = dict(zip(boundary, outcome.equalization.statistics, strict=False))
    return CalibrationTable(
        method=method,
        activation_scales={boundary[n]: float(s.input_scale) for n, s in stages.items()},
        ranges={
            boundary[name]: TensorRange(
                minimum=float(statistics[name].minimum.min()),
                maximum=float(statistics[name].maximum.max()),
                threshold=float(outcome.clips[name].clip),
            )
            for name in stages
        },
        onnx_sha256=graph_sha256(equalized),
        data_sha256=observed.data_sha256,
        image_count=observed.image_count,
        preprocess=preprocess.to_json() if preprocess else {},
        source_sha256=graph_sha256(model),
        channel_scales={
            stage.name: tuple(map(float, found))
            for stage, found in zip(plain.chain.stages, outcome.equalization.scales, strict=True)
            if found is not None
        },
        unsigned=frozenset(boundary[name] for name, stage in stages.items() if stage.unsigned),
    )


def _outcome(chain: Chain, observed: Observed, rung: Rung, options: RecipeOptions) -> Outcome:
    require_nodes(options.keep_float, (stage.name for stage in chain.stages), "convolution")
    try:
        return quantize_by_recipe(
            rung,
            chain,
            observed.statistics,
            observed.sample,
            options,
            floats=observed.floats,
            kernels=OnnxKernels(),
        )
    except ChainError as error:
        raise GateFailedError(f"equalization failed: {error}") from error
