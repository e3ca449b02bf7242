"""The graph of a plain RepVGG as the chain that calibration/ equalizes and rounds, and back.

Only a graph that is nothing but Conv, Relu pairs, GlobalAveragePool, Flatten and Gemm is a chain:
there every per-channel rescaling is exact, and every stage's input has one reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from calibration.chain import Chain, ChainError, Classifier, ConvStage
from calibration.convolution import run_chain
from calibration.images import Preprocess
from calibration.moments import ChannelObserver
from calibration.recipe import Outcome, RecipeOptions, quantize_by_recipe
from calibration.recipe import Recipe as Rung
from calibration.sample import ImageSample, sample_size
from calibration.table import CalibrationTable, TensorRange
from exporter.errors import GateFailedError, InputError
from exporter.graph import attributes, with_outputs
from exporter.image_set import ImageSet
from exporter.onnx_runner import OnnxRunner
from exporter.quantize import RoundedWeight, quantize

_HEAD = ["GlobalAveragePool", "Flatten", "Gemm"]
_CHECKED_IMAGES = 4
_MAX_RELATIVE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainChain:
    """``chain`` and the tensors it reads: each convolution's input, then the pooling's."""

    chain: Chain
    boundaries: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedGraphs:
    """The equalized float graph, the Q/DQ graph made from it, and the table that binds them."""

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable


def read_chain(model: onnx.ModelProto) -> PlainChain | None:
    """The chain that ``model`` is, or None where it is anything else."""
    nodes = list(model.graph.node)
    body, head = nodes[:-3], nodes[-3:]
    ops = [node.op_type for node in body]
    if ops != ["Conv", "Relu"] * (len(body) // 2) or [n.op_type for n in head] != _HEAD or not body:
        return None
    gemm = attributes(head[-1])
    if gemm.get("transB", 0) != 1 or gemm.get("alpha", 1.0) != 1.0 or gemm.get("beta", 1.0) != 1.0:
        return None
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    convolutions = [node for node in body if node.op_type == "Conv"]
    try:
        stages = tuple(_stage(node, weights) for node in convolutions)
        weight, bias = (weights[name].astype(np.float64) for name in head[-1].input[1:3])
        chain = Chain(stages=stages, classifier=Classifier(weight=weight, bias=bias))
    except ChainError as error:
        raise InputError(f"the network cannot be quantized: {error}") from error
    boundaries = (*(node.input[0] for node in convolutions), head[0].input[0])
    return PlainChain(chain=chain, boundaries=boundaries)


def quantize_chain_graph(
    model: onnx.ModelProto,
    plain: PlainChain,
    images: ImageSet,
    recipe: str,
    *,
    keep_float: tuple[str, ...] = (),
    preprocess: Preprocess | None = None,
    progress: Callable[[float], None] = lambda _fraction: None,
) -> QuantizedGraphs:
    """Calibrate, equalize, round and correct ``model`` by one of calibration.recipe's rungs.

    The classifier and the nodes in ``keep_float`` stay float. One pass over the images.

    Raises:
        InputError: if an image cannot be read, or ``keep_float`` names no convolution.
        GateFailedError: if the chain or its equalization computes something else than ``model``.
    """
    outcome = _outcome(
        model, plain, images, rung=Rung(recipe), keep_float=keep_float, progress=progress
    )
    done = outcome.quantized
    equalized = with_chain(model, outcome.equalization.chain)
    digest = hashlib.sha256(equalized.SerializeToString()).hexdigest()
    boundary = dict(zip([s.name for s in plain.chain.stages], plain.boundaries, strict=False))
    statistics = dict(zip(boundary, outcome.equalization.statistics, strict=False))
    table = CalibrationTable(
        method=recipe,
        activation_scales={boundary[n]: float(s.input_scale) for n, s in done.stages.items()},
        ranges={
            boundary[name]: TensorRange(
                minimum=float(statistics[name].minimum.min()),
                maximum=float(statistics[name].maximum.max()),
                threshold=float(outcome.clips[name].clip),
            )
            for name in done.stages
        },
        onnx_sha256=digest,
        data_sha256=images.to_json()["sha256"],
        image_count=images.count,
        preprocess=preprocess.to_json() if preprocess else {},
    )
    biases = {name: stage.bias for name, stage in done.stages.items()}
    corrected = with_chain(model, done.chain, biases)
    nodes = {node.name: node for node in model.graph.node}
    rounded = {
        nodes[name].input[1]: RoundedWeight(integers=stage.weight, scales=stage.weight_scales)
        for name, stage in done.stages.items()
    }
    kept = [*keep_float, model.graph.node[-1].name]
    return QuantizedGraphs(
        model=equalized,
        graph=quantize(corrected, table, keep_float=kept, rounded=rounded),
        table=table,
    )


def _stage(node: onnx.NodeProto, weights: Mapping[str, np.ndarray]) -> ConvStage:
    found = attributes(node)
    top, left, bottom, right = found.get("pads", (0, 0, 0, 0))
    return ConvStage(
        name=node.name,
        weight=weights[node.input[1]].astype(np.float64),
        bias=weights[node.input[2]].astype(np.float64),
        groups=found.get("group", 1),
        stride=tuple(found.get("strides", (1, 1))),
        padding=(top, left, bottom, right),
        dilation=tuple(found.get("dilations", (1, 1))),
    )


def _outcome(
    model: onnx.ModelProto,
    plain: PlainChain,
    images: ImageSet,
    *,
    rung: Rung,
    keep_float: tuple[str, ...],
    progress: Callable[[float], None],
) -> Outcome:
    known = {stage.name for stage in plain.chain.stages}
    unknown = sorted(set(keep_float) - known)
    if unknown:
        raise InputError(
            f"no convolution is called {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    (image_name, *inner) = plain.boundaries
    runner = OnnxRunner(with_outputs(model, inner))
    widths = [s.weight.shape[1] * s.groups for s in plain.chain.stages]
    channels = [*widths, len(plain.chain.stages[-1].weight)]
    observers = [ChannelObserver(width) for width in channels]
    sample: ImageSample | None = None
    seen = 0
    for (batch,) in images.batches():
        if sample is None:
            sample = ImageSample(sample_size((batch.shape[2], batch.shape[3])))
        sample.update(batch)
        found = {image_name: batch, **runner.run((batch,))}
        for name, observer in zip(plain.boundaries, observers, strict=True):
            observer.update(found[name])
        seen += len(batch)
        progress(0.5 * seen / images.count)
    if sample is None:
        raise InputError("there are no calibration images")
    _require_same(model, plain.chain, sample.images[:_CHECKED_IMAGES])
    try:
        return quantize_by_recipe(
            rung,
            plain.chain,
            [observer.statistics() for observer in observers],
            sample.images,
            RecipeOptions(keep_float=frozenset(keep_float)),
        )
    except ChainError as error:
        raise GateFailedError(f"equalization failed: {error}") from error


def _require_same(model: onnx.ModelProto, chain: Chain, images: np.ndarray) -> None:
    (expected,) = OnnxRunner(model).run((images,)).values()
    error = float(np.max(np.abs(run_chain(chain, images) - expected)))
    span = float(np.ptp(expected)) or 1.0
    if not error <= _MAX_RELATIVE * span:
        raise GateFailedError(
            f"the chain read from the graph differs from it by {error / span:.2g} of the range"
        )


def with_chain(
    model: onnx.ModelProto,
    chain: Chain,
    biases: Mapping[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """A copy of ``model`` with the weights of ``chain``, and with ``biases`` where given."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    values: dict[str, np.ndarray] = {}
    nodes = {node.name: node for node in copy.graph.node}
    for stage in chain.stages:
        _, weight, bias = nodes[stage.name].input
        values[weight] = stage.weight
        values[bias] = (biases or {}).get(stage.name, stage.bias)
    _, weight, bias = copy.graph.node[-1].input
    values |= {weight: chain.classifier.weight, bias: chain.classifier.bias}
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            array = np.ascontiguousarray(values[tensor.name], dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy
