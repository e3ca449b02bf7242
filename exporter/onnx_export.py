"""Deploy module -> ONNX whose nodes and tensors carry the module's layer names.

For a plain RepVGG the result is exactly ``(Conv, Relu) * n, GlobalAveragePool, Flatten, Gemm``: the
head is written so that the TorchScript exporter emits no shape arithmetic. Any other network keeps
the nodes that the exporter makes of it; ``body.3.act.relu`` is the ReLU in module ``body.3.act``,
``body.3.act.relu.output`` what it computes, and parameters are called as in the state dict.
``contract.py`` checks both.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

import onnx
import torch
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.network import HEIGHT, WIDTH, Interface, flatten
from models.repvgg import RepVGG

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
OPSET = 17
"""The newest opset that TensorRT 8.6's parser reads; Q/DQ with float32 scales needs 13."""

_HEAD_NAMES = {"GlobalAveragePool": "head.pool", "Flatten": "head.flatten", "Gemm": "linear"}


def export_onnx(
    module: RepVGG,
    image_size: tuple[int, int],
    metadata: Mapping[str, str],
    *,
    free_size: bool = False,
) -> onnx.ModelProto:
    """Export the deploy form ``module`` (eval mode) of a plain RepVGG with a free batch axis.

    Input ``images``: float32 ``[batch, 3, H, W]``; output ``logits``: float32
    ``[batch, num_classes]``. ``metadata`` goes into the model's ``metadata_props``. Height
    and width are free too if ``free_size`` says so.
    """
    sides = {2: HEIGHT, 3: WIDTH} if free_size else {}
    model = _traced(
        module,
        [(1, 3, *image_size)],
        {INPUT_NAME: {0: "batch", **sides}},
        {OUTPUT_NAME: {0: "batch"}},
    )
    _name_nodes(model, [layer.name for layer in module.variant.layers])
    return _finished(model, f"RepVGG-{module.variant.name}", metadata)


class _FlatModule(nn.Module):
    """``module``, with its outputs as one flat tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor for _, tensor in flatten(self.module(*inputs)))


def export_network(
    module: nn.Module, interface: Interface, title: str, metadata: Mapping[str, str]
) -> onnx.ModelProto:
    """Export any ``module`` in eval mode, with the names and free axes of ``interface``.

    Raises:
        InputError: if it has something that ONNX cannot express.
    """
    try:
        model = _traced(
            _FlatModule(module).eval(),
            list(interface.example),
            {port.name: port.free_axes for port in interface.inputs},
            {port.name: port.free_axes for port in interface.outputs},
        )
    except Exception as error:
        # The caller's forward runs here, and the exporter has error classes of its own.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{title} cannot be exported to ONNX: {first_line}") from error
    _name_after_modules(model)
    for value, port in zip(model.graph.output, interface.outputs, strict=True):
        # The exporter forgets extents that it cannot infer, such as the channels behind a Resize.
        value.CopyFrom(
            onnx.helper.make_tensor_value_info(port.name, onnx.TensorProto.FLOAT, port.shape)
        )
    return _finished(model, title, metadata)


def _traced(
    module: nn.Module,
    shapes: list[tuple[int, ...]],
    inputs: dict[str, dict[int, str]],
    outputs: dict[str, dict[int, str]],
) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Values that tracing freezes are found by comparing at other batch and image sizes.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.export(
            module,
            tuple(torch.zeros(shape) for shape in shapes),
            buffer,  # type: ignore[arg-type]
            dynamo=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=inputs | outputs,
        )
    model = onnx.load_from_string(buffer.getvalue())
    _separate_equal_parameters(model)
    return model


def _finished(model: onnx.ModelProto, title: str, metadata: Mapping[str, str]) -> onnx.ModelProto:
    model.graph.name = title
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
    _rename_tensors(model, new_names)


def _name_after_modules(model: onnx.ModelProto) -> None:
    """Nodes by module and operator, tensors by node, parameters as in the state dict."""
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    stripped = {t.name: t.name.removeprefix("module.") for t in model.graph.initializer}
    new_names = {old: old if new in ends else new for old, new in stripped.items()}
    taken: set[str] = set()
    for node in model.graph.node:
        path = _module_path(node.name)
        name = f"{path}.{node.op_type.lower()}" if path else node.op_type.lower()
        count = 1
        node.name = name
        while node.name in taken:
            node.name = f"{name}_{count}"
            count += 1
        taken.add(node.name)
        for index, output in enumerate(node.output):
            new_names[output] = f"{node.name}.output{f'_{index}' if index else ''}"
        for index, operand in enumerate(node.input):
            # A folded constant: the exporter has no better name for it than its number.
            if operand.startswith("onnx::") and new_names.get(operand) == operand:
                kind = "bias" if index == 2 else "weight"
                new_names[operand] = f"{node.name}.{kind}"
    _rename_tensors(model, new_names)


def _module_path(node_name: str) -> str:
    """``/module/body/body.0/act/Relu`` -> ``body.0.act``."""
    parts: list[str] = []
    for part in node_name.split("/")[1:-1]:
        # A child of a Sequential carries its parent's name.
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()
        parts.append(part)
    path = ".".join(parts)
    return "" if path == "module" else path.removeprefix("module.")


def _rename_tensors(model: onnx.ModelProto, new_names: dict[str, str]) -> None:
    for output in model.graph.output:
        new_names.pop(output.name, None)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = new_names.get(name, name)
    for initializer in model.graph.initializer:
        initializer.name = new_names.get(initializer.name, initializer.name)
    del model.graph.value_info[:]
