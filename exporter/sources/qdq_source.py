"""A Q/DQ file as a plain RepVGG of a known variant: its weights, its scales, and what it computes.

The graph beneath the quantizers is rewritten as the contract wants it: from the pooling on, what
exporters make of ``flatten`` (shape arithmetic, Reshape, ReduceMean, MatMul and Add) becomes
GlobalAveragePool, Flatten and Gemm. The contract then compares it with the variant, a deploy-form
network takes its parameters, and parity compares that network with the graph it came from. So
nothing is taken on trust: a graph with another stride, or a Clip for a ReLU, fails one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from exporter import contract
from exporter.bundle import file_sha256
from exporter.errors import InputError
from exporter.graph import attributes
from exporter.quantization.qdq_import import ImportedQuantization, read_qdq
from exporter.quantization.trained_scales import LayerQuantization, TrainedScales
from exporter.running.onnx_runner import BATCH_SIZE, Batch, OnnxRunner, Outputs, Runner
from exporter.sources.trained_network import (
    EXACT_GATE,
    LOGITS,
    NEAR_GATE,
    TrainedNetwork,
    import_notes,
)
from models.repvgg import RepVGG
from models.variants import Squeeze, Variant

CLASSIFIER = "linear"
_TAIL = {
    "Add", "AveragePool", "Cast", "Concat", "Dropout", "Flatten", "Gather", "Gemm",
    "GlobalAveragePool", "Identity", "MatMul", "ReduceMean", "Reshape", "Shape", "Slice", "Squeeze",
    "Transpose", "Unsqueeze",
}  # fmt: skip
"""What exporters make of pooling, flattening and a linear layer."""


def import_quantized(path: Path, variant: Variant) -> TrainedNetwork:
    """Read a Q/DQ ONNX file as a RepVGG of ``variant``.

    Raises:
        InputError: if it is no ONNX file, carries no scales or such as INT8 in TensorRT cannot
            express, or its input is not one batch of images.
        GateFailedError: if the graph is not the variant; the message names the first node.
    """
    if variant.squeeze is not Squeeze.NONE:
        raise InputError(f"scales can be imported for a plain RepVGG only, not for {variant.name}")
    model = _load(path)
    image_size = _image_size(model)
    imported = read_qdq(model)
    plain = plain_form(imported.float_model)
    parameters = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    num_classes = _num_classes(plain, parameters)
    contract.require(plain, variant, num_classes)
    return TrainedNetwork(
        module=_module(plain, parameters, variant, num_classes),
        num_classes=num_classes,
        scales=_scales(plain, imported, variant, file_sha256(path)),
        # By the kernels that judge what is made of it, so that no rounding falls the other way.
        run=_runner(model, optimize=not _holds_half(model)),
        run_float=_runner(imported.float_model),
        gate=EXACT_GATE if imported.exact else NEAR_GATE,
        image_size=image_size,
        notes=import_notes(imported.float_layers, imported.dropped),
    )


def plain_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with its last nodes as GlobalAveragePool, Flatten, Gemm, where they are a head.

    Anything else is returned as it is, for the contract to name.
    """
    nodes = list(model.graph.node)
    body = next((i for i, n in enumerate(nodes) if n.op_type not in ("Conv", "Relu")), len(nodes))
    tail = nodes[body:]
    parameters = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    linear = _linear(tail, parameters)
    if linear is None or not body or any(node.op_type not in _TAIL for node in tail):
        return model
    (name, weight, bias), output = linear, model.graph.output[0].name
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[body:], copy.graph.value_info[:]
    copy.graph.node.extend(
        [
            helper.make_node("GlobalAveragePool", [nodes[body - 1].output[0]], ["pooled"], "pool"),
            helper.make_node("Flatten", ["pooled"], ["features"], "flatten", axis=1),
            helper.make_node(
                "Gemm",
                ["features", f"{name}.weight", f"{name}.bias"],
                [output],
                name,
                alpha=1.0,
                beta=1.0,
                transB=1,
            ),
        ]
    )
    for convolution in copy.graph.node[:body]:
        if convolution.op_type == "Conv" and len(convolution.input) == 2:
            absent = f"{convolution.output[0]}.bias"
            channels = len(parameters[convolution.input[1]])
            parameters[absent] = np.zeros(channels, dtype=np.float32)
            convolution.input.append(absent)
    parameters |= {f"{name}.weight": weight, f"{name}.bias": bias}
    read = dict.fromkeys(name for node in copy.graph.node for name in node.input)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(parameters[name]), name)
        for name in read
        if name in parameters
    )
    return copy


def _linear(
    tail: list[onnx.NodeProto], parameters: Mapping[str, np.ndarray]
) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Name, weight ``[classes, features]`` and bias of the only linear layer in ``tail``."""
    layers = [node for node in tail if node.op_type in ("Gemm", "MatMul")]
    if len(layers) != 1 or layers[0].input[1] not in parameters:
        return None
    (node,) = layers
    found = attributes(node)
    weight = parameters[node.input[1]]
    if any(found.get(key, normal) != normal for key, normal in _GEMM_DEFAULTS.items()):
        return None
    weight = weight if found.get("transB", 0) else weight.T
    added = [n for n in tail if n.op_type == "Add" and node.output[0] in n.input]
    names = [name for n in (node, *added) for name in n.input if name in parameters]
    biases = [parameters[name] for name in names if name != node.input[1]]
    bias = sum(biases, np.zeros(len(weight), dtype=np.float32))
    return node.name, weight, np.asarray(bias, dtype=np.float32).reshape(-1)


_GEMM_DEFAULTS = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
        names = [text for n in model.graph.node for text in (n.name, *n.input, *n.output)]
        if not all(isinstance(name, str) for name in names):
            # protobuf hands out what is no UTF-8 as bytes.
            raise ValueError("a node has a damaged name")
    except Exception as error:
        # protobuf and the checker raise errors of their own, external data OSError or onnx's.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is damaged, truncated or not an ONNX model ({reason})") from error
    return model


def _image_size(model: onnx.ModelProto) -> tuple[int, int] | None:
    """Height and width that the graph's only input is fixed to."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    shapes = [[dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in inputs]
    if any(v.type.tensor_type.elem_type == onnx.TensorProto.UINT8 for v in inputs):
        raise InputError(
            f"the graph's input {inputs[0].name} is uint8: pass the graph without normalization in "
            "it, as exported without --with-preprocess"
        )
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in (0, 3):
        found = ", ".join(f"{v.name} {s}" for v, s in zip(inputs, shapes, strict=True))
        raise InputError(f"the graph's inputs are {found}, expected one batch of images")
    if len(model.graph.output) != 1:
        names = ", ".join(value.name for value in model.graph.output)
        raise InputError(f"the graph's outputs are {names}, expected the logits only")
    if shapes[0][0] > BATCH_SIZE:
        raise InputError(
            f"the graph is fixed to a batch of {shapes[0][0]}; export it with a free batch, or one "
            f"of at most {BATCH_SIZE}"
        )
    (_, _, height, width) = shapes[0]
    return (height, width) if height and width else None


def _num_classes(plain: onnx.ModelProto, parameters: Mapping[str, np.ndarray]) -> int:
    head = plain.graph.node[-1]
    return len(parameters[head.input[1]]) if head.op_type == "Gemm" else 1


def _module(
    plain: onnx.ModelProto,
    parameters: Mapping[str, np.ndarray],
    variant: Variant,
    num_classes: int,
) -> RepVGG:
    """The deploy form with the parameters of a graph that satisfies the contract."""
    state: dict[str, torch.Tensor] = {}
    for layer, node in _named(plain, variant).items():
        prefix = layer if layer == CLASSIFIER else f"{layer}.rbr_reparam"
        for kind, name in zip(("weight", "bias"), node.input[1:3], strict=True):
            state[f"{prefix}.{kind}"] = torch.from_numpy(parameters[name].copy())
    with torch.device("meta"):
        module = RepVGG(variant, num_classes=num_classes, deploy=True)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(requires_grad=False)


def _named(plain: onnx.ModelProto, variant: Variant) -> dict[str, onnx.NodeProto]:
    layers = [node for node in plain.graph.node if node.op_type in ("Conv", "Gemm")]
    names = [*(layer.name for layer in variant.layers), CLASSIFIER]
    return dict(zip(names, layers, strict=True))


def _scales(
    plain: onnx.ModelProto, imported: ImportedQuantization, variant: Variant, sha256: str
) -> TrainedScales:
    before = {node.name: node for node in imported.float_model.graph.node}
    layers: dict[str, LayerQuantization] = {}
    for layer, node in _named(plain, variant).items():
        tensor, weight = before[node.name].input[:2]
        if weight in imported.weights and node.name not in imported.float_layers:
            layers[layer] = LayerQuantization(
                input_scale=imported.activation_scales[tensor], weight=imported.weights[weight]
            )
    return TrainedScales(layers=layers, sha256=sha256)


def _holds_half(model: onnx.ModelProto) -> bool:
    return any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)


def _runner(model: onnx.ModelProto, *, optimize: bool = True) -> Runner:
    """``model`` as a function of one batch of images, whatever batch it is fixed to."""
    constants = {tensor.name for tensor in model.graph.initializer}
    (value,) = (v for v in model.graph.input if v.name not in constants)
    step = value.type.tensor_type.shape.dim[0].dim_value
    runner = OnnxRunner(model, optimize=optimize)

    def run(batch: Batch) -> Outputs:
        (images,) = batch
        if not step:
            return {LOGITS: runner(images)}
        missing = -len(images) % step
        padded = np.concatenate([images, images[:1].repeat(missing, axis=0)])
        parts = [runner(padded[at : at + step]) for at in range(0, len(padded), step)]
        return {LOGITS: np.concatenate(parts)[: len(images)]}

    return run
