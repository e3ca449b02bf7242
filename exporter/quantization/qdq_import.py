"""A Q/DQ graph that somebody trained -> the float graph beneath it, its integers and its scales.

Quantization-aware training leaves its result in QuantizeLinear, DequantizeLinear pairs:
pytorch-quantization and Model Optimizer write float weights through Q and DQ, ONNX Runtime's
``quantize_static`` int8 weights behind DQ and int32 biases behind DQ. :func:`read_qdq` reads both.

An engine quantizes the input of a convolution and nothing else, so a quantizer counts where it is
the last one on the way to a layer whose weight is integers. It may stand further up: with zero
point 0 a quantizer FQ_s commutes exactly with every operator that moves or drops values, and with
ReLU,

    relu(s clip(round(x / s))) = s clip(round(relu(x) / s)),        FQ_s(FQ_s(x)) = FQ_s(x),

so ``Conv, FQ_s, Relu, Conv`` and ``Conv, Relu, FQ_s, Conv`` are one function. All other quantizers
(around the pooling, on the logits, between Conv and Relu with another scale) are dropped and named:
without them the network computes slightly more exactly than it was trained to, which parity with
the imported graph shows.

A BatchNormalization behind a convolution is folded into the integers' scales, which is exact too:
``g (s q) = (|g| s) (sign(g) q)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from exporter.errors import InputError
from exporter.graph import QUANTIZED_OPS, attributes, label
from exporter.quantization.qdq_removal import Edge, Grid, Removal, remove_quantizers
from exporter.quantize import RoundedWeight

_COMMUTING = {
    "Dropout", "Flatten", "Identity", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose",
    "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportedQuantization:
    """``float_model`` has no Q/DQ, and weights that are exactly integers times scales.

    ``activation_scales`` by tensor and ``weights`` by initializer are those of the quantized Conv,
    Gemm and MatMul nodes; ``float_layers`` names the other ones. ``dropped`` names the tensors
    whose quantizer has no place in an engine. All names are of ``float_model``. ``exact`` says that
    quantizing ``float_model`` gives the imported graph's roundings in the same places: nothing was
    dropped, and no BatchNormalization folded.
    """

    float_model: onnx.ModelProto
    activation_scales: Mapping[str, float]
    weights: Mapping[str, RoundedWeight]
    float_layers: tuple[str, ...]
    dropped: tuple[str, ...]
    exact: bool


def read_qdq(model: onnx.ModelProto) -> ImportedQuantization:
    """Separate ``model`` into a float graph and its quantization.

    Raises:
        InputError: if it carries no scales, or INT8 in TensorRT cannot express them; one sentence
            that names the node.
    """
    _require_float(model)
    if not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        # Integer operators are refused by name; without them there is nothing to import.
        remove_quantizers(model)
        raise InputError("this ONNX carries no scales; pass the checkpoint instead")
    graph = remove_quantizers(model)
    count = len(graph.nodes)
    _fold_norms(graph)
    folded = count - len(graph.nodes)
    _name_nodes(graph)
    scales, used = _input_scales(graph)
    layers = [node for node in graph.nodes if _is_layer(node, graph)]
    quantized = [node for node in layers if label(node) in scales]
    if not quantized:
        raise InputError(
            "this ONNX has scales for no Conv or Gemm whose weight carries scales too; export it "
            "with both, or pass the checkpoint instead"
        )
    dropped = {
        graph.quantizers[name].tensor
        for edge, names in graph.edges.items()
        for name in names
        if (edge, name) not in used
    }
    # An output that a quantizer computed gives its name to the tensor that was quantized.
    outputs = {v.name: graph.quantizers.get(v.name) for v in model.graph.output}
    renamed = {quantizer.tensor: name for name, quantizer in outputs.items() if quantizer}
    return ImportedQuantization(
        float_model=_float_model(model, graph, renamed),
        activation_scales=_by_tensor(quantized, scales),
        weights={node.input[1]: _rounded(node, graph) for node in quantized},
        float_layers=tuple(label(node) for node in layers if label(node) not in scales),
        dropped=tuple(sorted(renamed.get(name, name) for name in dropped | renamed.keys())),
        exact=not (dropped or renamed or folded),
    )


def _require_float(model: onnx.ModelProto) -> None:
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        kind = value.type.tensor_type.elem_type
        if value.name not in constants and kind != onnx.TensorProto.FLOAT:
            raise InputError(
                f"the graph's input {value.name} is {onnx.TensorProto.DataType.Name(kind)}; "
                "export the network with float32 inputs, quantized inside"
            )


def _is_layer(node: onnx.NodeProto, graph: Removal) -> bool:
    """Whether INT8 could compute it: an activation times a constant weight."""
    return node.op_type in QUANTIZED_OPS and node.input[1] in graph.constants


def _name_nodes(graph: Removal) -> None:
    """Every node gets a name of its own; what has none is called as what it computes."""
    counts = Counter(label(node) for node in graph.nodes)
    for node in graph.nodes:
        node.name = label(node) if counts[label(node)] == 1 else str(node.output[0])


def _input_scales(graph: Removal) -> tuple[dict[str, float], set[tuple[Edge, str]]]:
    """The scale of each quantized layer's input, and the quantizers that are in those scales."""
    makers = {name: place for place, node in enumerate(graph.nodes) for name in node.output}
    scales: dict[str, float] = {}
    used: set[tuple[Edge, str]] = set()
    for place, node in enumerate(graph.nodes):
        if not _is_layer(node, graph) or node.input[1] not in graph.grids:
            continue
        edge: Edge | None = (place, 0)
        found: float | None = None
        while edge is not None:
            for name in reversed(graph.edges.get(edge, ())):
                found = graph.quantizers[name].scale if found is None else found
                if graph.quantizers[name].scale == found:
                    used.add((edge, name))
            maker = makers.get(graph.nodes[edge[0]].input[edge[1]])
            commutes = maker is not None and graph.nodes[maker].op_type in _COMMUTING
            edge = (maker, 0) if commutes and maker is not None else None
        if found is not None:
            scales[label(node)] = found
    return scales, used


def _by_tensor(quantized: list[onnx.NodeProto], scales: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for node in quantized:
        tensor, scale = node.input[0], scales[label(node)]
        if found.setdefault(tensor, scale) != scale:
            raise InputError(
                f"{tensor} is read with the scales {found[tensor]:g} and {scale:g}; INT8 needs one "
                "scale for a tensor"
            )
    return found


def _rounded(node: onnx.NodeProto, graph: Removal) -> RoundedWeight:
    """The layer's integers with the output channels first, and a scale for each of them."""
    grid = graph.grids[node.input[1]]
    first = node.op_type == "Conv" or attributes(node).get("transB", 0)
    axis = 0 if first else 1
    if grid.axis not in (None, axis):
        raise InputError(
            f"node {label(node)}: the scales of its weight lie along axis {grid.axis}, expected "
            f"its output channels, axis {axis}"
        )
    integers = np.ascontiguousarray(np.moveaxis(grid.integers, axis, 0))
    scales = np.broadcast_to(grid.scales, (len(integers),))
    return RoundedWeight(integers=integers, scales=np.ascontiguousarray(scales))


def _fold_norms(graph: Removal) -> None:
    """Put every BatchNormalization that follows a Conv, and is its only reader, into the Conv."""
    readers = Counter(name for node in graph.nodes for name in node.input)
    makers = {node.output[0]: node for node in graph.nodes if node.op_type == "Conv"}
    kept: list[onnx.NodeProto] = []
    places: dict[int, int] = {}
    for place, node in enumerate(graph.nodes):
        convolution = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if convolution is None or readers[node.input[0]] > 1 or (place, 0) in graph.edges:
            places[place] = len(kept)
            kept.append(node)
        elif all(name in graph.constants for name in (*convolution.input[1:], *node.input[1:])):
            _fold_norm(convolution, node, graph)
        else:
            raise InputError(f"node {label(node)}: its statistics are computed at run time")
    graph.nodes = kept
    graph.edges = {(places[p], i): names for (p, i), names in graph.edges.items() if p in places}


def _fold_norm(convolution: onnx.NodeProto, norm: onnx.NodeProto, graph: Removal) -> None:
    gain, shift, mean, variance = (
        graph.constants[name].astype(np.float64) for name in norm.input[1:5]
    )
    gain = gain / np.sqrt(variance + float(attributes(norm).get("epsilon", 1e-5)))
    weight = f"{convolution.output[0]}.weight"
    bias = f"{convolution.output[0]}.bias"
    before = graph.constants[convolution.input[2]] if len(convolution.input) > 2 else 0.0
    old = convolution.input[1]
    if old in graph.grids:
        grid = graph.grids[weight] = _scaled(graph.grids[old], gain)
        graph.constants[weight] = grid.values
    else:
        kernel = graph.constants[old]
        scaled = kernel * gain.reshape(-1, *[1] * (kernel.ndim - 1))
        graph.constants[weight] = scaled.astype(np.float32)
    graph.constants[bias] = (shift + gain * (before - mean)).astype(np.float32)
    convolution.input[:] = [convolution.input[0], weight, bias]
    convolution.output[0] = norm.output[0]


def _scaled(grid: Grid, gain: np.ndarray) -> Grid:
    """``gain`` times the weight, output channel by output channel (axis 0)."""
    if grid.axis not in (None, 0):
        raise InputError("the scales of a convolution's weight do not lie along its channels")
    shape = (-1, *[1] * (grid.integers.ndim - 1))
    # A channel that is multiplied with 0 is integers 0 at any scale.
    integers = grid.integers.astype(np.int16) * np.sign(gain).astype(np.int16).reshape(shape)
    scales = np.where(gain == 0, grid.scales, np.abs(gain) * grid.scales).astype(np.float32)
    return Grid(integers=np.clip(integers, -128, 127).astype(np.int8), scales=scales, axis=0)


def _float_model(
    model: onnx.ModelProto, graph: Removal, renamed: Mapping[str, str]
) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in graph.nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = renamed.get(name, name)
    computed = {name for node in graph.nodes for name in node.output}
    for value in model.graph.output:
        if value.name not in computed:
            raise InputError(f"the output {value.name} is no float tensor that the graph computes")
    read = {name for node in graph.nodes for name in node.input}
    inputs = [v for v in model.graph.input if v.name not in graph.constants]
    del copy.graph.node[:], copy.graph.initializer[:], copy.graph.value_info[:], copy.graph.input[:]
    copy.graph.input.extend(inputs)
    copy.graph.node.extend(graph.nodes)
    copy.graph.initializer.extend(
        numpy_helper.from_array(np.array(array, order="C"), name)
        for name, array in graph.constants.items()
        if name in read
    )
    try:
        onnx.checker.check_model(copy)
    except onnx.checker.ValidationError as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"the graph without its quantizers is invalid: {first_line}") from error
    return copy
