"""Deploy module -> ONNX whose nodes and tensors carry the checkpoint's layer names.

The result is exactly ``(Conv, Relu) * n, GlobalAveragePool, Flatten, Gemm``: the head is written so
that the TorchScript exporter emits no shape arithmetic. ``contract.py`` checks it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

import onnx
import torch

from models.repvgg import RepVGG

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
OPSET = 17
"""The newest opset that TensorRT 8.6's parser reads; Q/DQ with float32 scales needs 13."""

_HEAD_NAMES = {"GlobalAveragePool": "head.pool", "Flatten": "head.flatten", "Gemm": "linear"}


def export_onnx(
    module: RepVGG, image_size: tuple[int, int], metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Export the deploy form ``module`` (eval mode) with a free batch axis.

    Input ``images``: float32 ``[batch, 3, H, W]``; output ``logits``: float32
    ``[batch, num_classes]``. ``metadata`` goes into the model's ``metadata_props``.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            module,
            (torch.zeros(1, 3, *image_size),),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}},
        )
    model = onnx.load_from_string(buffer.getvalue())
    _separate_equal_parameters(model)
    _name_nodes(model, [layer.name for layer in module.variant.layers])
    model.graph.name = f"RepVGG-{module.variant.name}"
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    return model


def _separate_equal_parameters(model: onnx.ModelProto) -> None:
    """The exporter stores equal tensors once, behind Identity nodes; give each layer its own."""
    parameters = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "Identity" and node.input[0] in parameters:
            own = model.graph.initializer.add()
            own.CopyFrom(parameters[node.input[0]])
            own.name = node.output[0]
            model.graph.node.remove(node)


def _name_nodes(model: onnx.ModelProto, layer_names: list[str]) -> None:
    """``stage1.0.conv``, ``stage1.0.relu``, ``head.pool``; weights ``stage1.0.weight``."""
    new_names: dict[str, str] = {}
    remaining = iter(layer_names)
    layer = ""
    for node in model.graph.node:
        if node.op_type == "Conv":
            layer = next(remaining, layer)
            node.name = f"{layer}.conv"
            parameters = zip(node.input[1:], ("weight", "bias"), strict=False)
            new_names |= {old: f"{layer}.{kind}" for old, kind in parameters}
            new_names[node.output[0]] = f"{layer}.conv.output"
        elif node.op_type == "Relu":
            node.name = f"{layer}.relu"
            new_names[node.output[0]] = f"{layer}.output"
        elif node.op_type in _HEAD_NAMES:
            node.name = _HEAD_NAMES[node.op_type]
            new_names[node.output[0]] = f"{node.name}.output"
    new_names.pop(OUTPUT_NAME, None)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = new_names.get(name, name)
    for initializer in model.graph.initializer:
        initializer.name = new_names.get(initializer.name, initializer.name)
    del model.graph.value_info[:]
