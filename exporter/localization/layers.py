"""Figures of every layer from a few images: SQNR against the float graph, spread of the channels.

A layer is a node that INT8 can compute, with the ReLU behind it. Equalization rescales channels
without changing a result, so a Q/DQ graph is compared with the rescaled float graph, which has the
same units; the ranges *before* come from the graph as it was exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from exporter.errors import ExporterError
from exporter.graph import QUANTIZED_OPS, attributes, quantizable
from exporter.localization.probe import Noise, Probe, as_they_are, places, steps
from exporter.parity.layer_figures import ChannelSpread, LayerFigures, LayerTable, Spreads
from exporter.running.onnx_runner import Batch, FloatArray

Maxima = npt.NDArray[np.float64]
_KINDS = {
    TensorProto.INT8: "int8",
    TensorProto.FLOAT16: "half",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E4M3FN: "fp8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSite:
    """A layer of a float graph and the tensor that it delivers."""

    node: onnx.NodeProto
    tensor: str


def layer_sites(model: onnx.ModelProto) -> tuple[LayerSite, ...]:
    """All layers, in the order of the graph."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sites = []
    for node in quantizable(model):
        behind = readers.get(node.output[0], [])
        ends_in_relu = len(behind) == 1 and behind[0].op_type == "Relu"
        sites.append(LayerSite(node=node, tensor=(behind[0] if ends_in_relu else node).output[0]))
    return tuple(sites)


def measure_layers(
    exported: onnx.ModelProto,
    model: onnx.ModelProto,
    graph: onnx.ModelProto | None,
    precision: str,
    batch: Batch,
) -> LayerTable:
    """Figures of all layers on ``batch``.

    ``model`` is the published float graph, ``exported`` the one before equalization (the same one
    where nothing was rescaled), ``graph`` what the builder parses, None where that is ``model``.
    Where ONNX Runtime cannot run ``graph``, the table says why and has ranges only.
    """
    sites = layer_sites(model)
    tensors = [site.tensor for site in sites]
    probe = Probe(model, as_they_are(tensors))
    errors, kinds, reason = _Errors(), {}, None
    after: dict[str, Maxima] = {}
    if graph is not None:
        kinds = _computed_in(graph)
        try:
            errors, after = _measure_errors(probe, graph, sites, batch)
        except ExporterError as error:
            reason = str(error)
    after = after or _channel_maxima(probe, sites, batch)
    before, old = {}, {}
    if exported is not model:
        before = _channel_maxima(Probe(exported, as_they_are(tensors)), sites, batch)
        old = _weight_maxima(exported)
    new = _weight_maxima(model)
    rows = tuple(
        LayerFigures(
            name=site.node.name,
            operator=site.node.op_type,
            computed_in=kinds.get(site.node.name, "float"),
            sqnr_db=errors.delivered(site.tensor),
            own_sqnr_db=errors.own(site.tensor),
            activations=_spreads(before.get(site.tensor), after[site.tensor]),
            weights=_spreads(old.get(site.node.name), new[site.node.name]),
        )
        for site in sites
    )
    return LayerTable(images=len(batch[0]), precision=precision, rows=rows, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Errors:
    """Of each tensor that both graphs have: with all errors before it, and without them."""

    all_before: Mapping[str, Noise] = field(default_factory=dict)
    alone: Mapping[str, Noise] = field(default_factory=dict)

    def delivered(self, tensor: str) -> float | None:
        return self.all_before[tensor].sqnr_db if tensor in self.all_before else None

    def own(self, tensor: str) -> float | None:
        return self.alone[tensor].sqnr_db if tensor in self.alone else None


def _measure_errors(
    probe: Probe, graph: onnx.ModelProto, sites: Sequence[LayerSite], batch: Batch
) -> tuple[_Errors, dict[str, Maxima]]:
    """Also the channels' maxima of the float graph, whose tensors are at hand."""
    at = places([site.tensor for site in sites], graph)
    running, cut = Probe(graph, at), Probe(graph, at, given=True)
    names = [place.tensor for place in at]
    errors = _Errors(all_before={n: Noise() for n in names}, alone={n: Noise() for n in names})
    maxima: dict[str, Maxima] = {}
    for part in steps(batch):
        exact = probe.run(part)
        _add_maxima(maxima, sites, exact)
        for noises, found in (
            (errors.all_before, running.run(part)),
            (errors.alone, cut.run(part, exact)),
        ):
            for name in names:
                noises[name].add(exact[name], found[name])
    return errors, maxima


def _computed_in(graph: onnx.ModelProto) -> dict[str, str]:
    """Data type of the multiplications of each layer of the graph that the builder parses."""
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    dequantized = {
        node.output[0]: types.get(node.input[0])
        for node in graph.graph.node
        if node.op_type == "DequantizeLinear"
    }
    kinds = {}
    for node in graph.graph.node:
        if node.op_type not in QUANTIZED_OPS:
            continue
        weight = node.input[1]
        stored = dequantized.get(weight, types.get(weight))
        kinds[node.name] = _KINDS.get(stored, "float") if stored is not None else "float"
    return kinds


def _channel_maxima(probe: Probe, sites: Sequence[LayerSite], batch: Batch) -> dict[str, Maxima]:
    maxima: dict[str, Maxima] = {}
    for part in steps(batch):
        _add_maxima(maxima, sites, probe.run(part))
    return maxima


def _add_maxima(
    maxima: dict[str, Maxima], sites: Sequence[LayerSite], values: Mapping[str, FloatArray]
) -> None:
    """Raise each layer's channel maxima to those of ``values``."""
    for site in sites:
        # A MatMul's channels are its last axis, those of Conv and Gemm the second.
        axis = -1 if site.node.op_type == "MatMul" else 1
        magnitudes = np.abs(np.moveaxis(values[site.tensor], axis, 0))
        largest = magnitudes.reshape(len(magnitudes), -1).max(axis=1).astype(np.float64)
        maxima[site.tensor] = np.maximum(maxima.get(site.tensor, largest), largest)


def _weight_maxima(model: onnx.ModelProto) -> dict[str, Maxima]:
    """max |W| of each input channel: what shares a step with the others of its output channel."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, Maxima] = {}
    for node in quantizable(model):
        values: FloatArray = np.abs(numpy_helper.to_array(weights[node.input[1]]))
        options = attributes(node)
        if node.op_type == "Conv":
            groups = options.get("group", 1)
            values = values.reshape(groups, -1, values.shape[1], int(np.prod(values.shape[2:])))
            found[node.name] = values.max(axis=(1, 3)).reshape(-1).astype(np.float64)
        else:
            axis = 0 if node.op_type == "Gemm" and options.get("transB", 0) else 1
            found[node.name] = values.max(axis=axis).astype(np.float64)
    return found


def _spreads(before: Maxima | None, after: Maxima) -> Spreads:
    return Spreads(before=None if before is None else spread(before), after=spread(after))


def spread(maxima: Maxima) -> ChannelSpread:
    """Of the channels' largest values ``[C]``, all at least 0."""
    alive = maxima[maxima > 0]
    dead = len(maxima) - len(alive)
    if not len(alive):
        return ChannelSpread(smallest=0.0, median=0.0, largest=0.0, dead=dead)
    return ChannelSpread(
        smallest=float(alive.min()),
        median=float(np.median(alive)),
        largest=float(alive.max()),
        dead=dead,
    )
