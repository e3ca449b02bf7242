"""A deploy-form network that was trained with quantizers: what it computes, and its INT8.

The function that was trained has its roundings in it, so that is what parity holds an engine
against. Here it is torch's own fake quantization, in the levels -128..127 that pytorch-quantization
and Model Optimizer use for their exports:

    conv(FQ(x, s_x), FQ(W, s_w)) + b        FQ(x, s) = s clip(round(x / s), -128, 127)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.parity import GATES, Gate
from exporter.quantization.trained_scales import LayerQuantization, TrainedScales
from exporter.quantize import RoundedWeight
from exporter.running.onnx_runner import Batch, Outputs, Runner
from models.checkpoint import LayerScales, LoadedCheckpoint
from models.repvgg import RepVGG
from models.variants import Squeeze

LOGITS = "logits"
EXACT_GATE = Gate(min_sqnr_db=40.0, min_top1_agreement=0.98)
"""For a graph that ONNX Runtime computed before and after, with every rounding in its old place.

Measured on A0: 200 dB for a graph of this project's, 130 dB for torch's export of fake
quantization. Where only the order of additions differs, as between torch and ONNX Runtime or behind
a folded BatchNormalization, the last bit of a sum decides a rounding now and then, and the layers
spread it: 38 dB are left on A0, 34 on an untrained B1g4, and the usual gate holds."""
NEAR_GATE = GATES["int8"]
"""For everything else."""
_LEVELS = (-128, 127)
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedNetwork:
    """What a checkpoint or graph with scales holds.

    ``module`` is the deploy form in eval mode; the weights of layers with scales are integers times
    scales. ``run`` computes what was trained, quantizers included, ``run_float`` the same without
    them; both map one batch of images to ``logits``. ``gate`` is for the INT8 graph against
    ``run``. ``image_size`` is None where it is free.
    """

    module: RepVGG
    num_classes: int
    scales: TrainedScales
    run: Runner
    run_float: Runner
    gate: Gate
    image_size: tuple[int, int] | None
    notes: tuple[str, ...]


def from_checkpoint(loaded: LoadedCheckpoint, sha256: str) -> TrainedNetwork:
    """The network of a checkpoint with scales; ``sha256`` is the file's.

    Raises:
        InputError: if it is no plain RepVGG in deploy form, or no layer has both its scales.
    """
    if loaded.variant.squeeze is not Squeeze.NONE or loaded.form != "deploy":
        raise InputError(
            "scales can be imported for a plain RepVGG in deploy form only, not for "
            f"{loaded.variant.name} in {loaded.form} form"
        )
    scales = loaded.scales or {}
    layers = {
        name: LayerQuantization(
            input_scale=layer.input_scale,
            weight=_rounded(_module_of(loaded.module, name).weight, layer.weight_scales),
        )
        for name, layer in scales.items()
        if layer.input_scale is not None and layer.weight_scales is not None
    }
    if not layers:
        raise InputError("the checkpoint has no layer with scales for its input and its weight")
    module = _on_grid(loaded.module, layers)
    unknown = sorted(scales.keys() - dict(module.named_modules()).keys())
    if unknown:
        raise InputError(
            f"the checkpoint has scales of {unknown[0]}, which is no layer of a RepVGG"
        )
    quantized = _fake_quantized(loaded.module, scales)
    known = [*(layer.name for layer in loaded.variant.layers), "linear"]
    dropped = tuple(name for name in scales if name not in layers)
    return TrainedNetwork(
        module=module,
        num_classes=loaded.num_classes,
        scales=TrainedScales(layers=layers, sha256=sha256),
        run=_runner(quantized),
        run_float=_runner(module),
        gate=NEAR_GATE,
        image_size=None,
        notes=import_notes(tuple(name for name in known if name not in layers), dropped),
    )


def import_notes(float_layers: tuple[str, ...], dropped: tuple[str, ...]) -> tuple[str, ...]:
    """What the user should know: layers without scales, quantizers without a layer."""
    found = []
    if float_layers:
        found.append(f"no scales for {_some(float_layers)}: computed in float")
    if dropped:
        found.append(
            f"dropped the quantizers of {_some(dropped)}, which stand in front of no INT8 layer: "
            "the engine computes without their rounding"
        )
    return tuple(found)


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"


def _module_of(module: RepVGG, layer: str) -> nn.Conv2d | nn.Linear:
    found = module.get_submodule(layer)
    found = getattr(found, "rbr_reparam", found)
    assert isinstance(found, nn.Conv2d | nn.Linear)
    return found


def _rounded(weight: Tensor, scales: Tensor) -> RoundedWeight:
    """As QuantizeLinear rounds: half to even, after a division in float32."""
    steps = torch.round(weight.detach() / scales.reshape(-1, *[1] * (weight.ndim - 1)))
    integers = steps.clamp(*_LEVELS).to(torch.int8)
    return RoundedWeight(integers=integers.numpy(), scales=scales.numpy().astype(np.float32))


def _on_grid(module: RepVGG, layers: Mapping[str, LayerQuantization]) -> RepVGG:
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name, layer in layers.items():
            weight, rounded = _module_of(twin, name).weight, layer.weight
            scales = torch.from_numpy(rounded.scales).reshape(-1, *[1] * (weight.ndim - 1))
            weight.copy_(torch.from_numpy(rounded.integers).float() * scales)
    return twin


def _fake_quantized(module: RepVGG, scales: Mapping[str, LayerScales]) -> RepVGG:
    """A copy that computes with every quantizer of the checkpoint."""
    twin = copy.deepcopy(module)
    for name, layer in scales.items():
        place = twin.get_submodule(name)
        place = getattr(place, "rbr_reparam", place)
        if layer.weight_scales is not None:
            weight = _module_of(twin, name).weight
            zeros = torch.zeros(len(weight), dtype=torch.int32)
            with torch.no_grad():
                weight.copy_(
                    torch.fake_quantize_per_channel_affine(
                        weight, layer.weight_scales, zeros, 0, *_LEVELS
                    )
                )
        if layer.input_scale is not None:
            place.register_forward_pre_hook(_input_quantizer(layer.input_scale))
    return twin


def _input_quantizer(scale: float) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    """A hook that rounds the only input of a module to multiples of ``scale``."""

    def rounded(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        return (torch.fake_quantize_per_tensor_affine(x, scale, 0, *_LEVELS),)

    return rounded


def _runner(module: nn.Module) -> Runner:
    def run(batch: Batch) -> Outputs:
        (images,) = batch
        with torch.no_grad():
            return {LOGITS: module(torch.from_numpy(images)).numpy()}

    return run
