"""Scales that quantization-aware training left beside the weights of a checkpoint.

pytorch-quantization (YOLOv6 among its users) and Model Optimizer give every quantized layer two
quantizers, whose only tensor is the largest magnitude that they represent,

    stage1.0.rbr_reparam.weight                      [O, I, 3, 3]
    stage1.0.rbr_reparam._input_quantizer._amax      []
    stage1.0.rbr_reparam._weight_quantizer._amax     [O, 1, 1, 1], or [] for the whole tensor

(Model Optimizer without the first underscore), and compute with ``scale = amax / 127``: the levels
are -128..127, amax itself stands on 127. Pooling layers have an input quantizer only.

Scales belong to the convolution that was quantized. Those of a train-form block are of its branches
and say nothing about the kernel that the branches fuse to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint_file import CheckpointError

LEVELS = 127
_QUANTIZER = re.compile(r"(?:(.+)\.)?_?(\w+)_quantizer\.(\w+)")
_FUSED = ".rbr_reparam"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerScales:
    """Step sizes of one layer: of its input, and float32 ``[O]`` of its weight's output channels.

    None where the layer has no such quantizer.
    """

    input_scale: float | None
    weight_scales: Tensor | None


def split_quantizers(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a state, and the tensors of its quantizers."""
    quantizers = {name: t for name, t in state.items() if _QUANTIZER.fullmatch(name)}
    return {name: t for name, t in state.items() if name not in quantizers}, quantizers


def layer_scales(
    path: Path, quantizers: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, LayerScales]:
    """The scales by layer (``stage0``, ``stage1.0``, ``linear``, ``gap``), names being ours.

    ``tensors`` are the network's, for the shapes of its weights.

    Raises:
        CheckpointError: for a train-form block, a quantizer of anything but inputs and weights, or
            an amax that is no positive finite number or does not fit its weight.
    """
    branches = [name for name in quantizers if "rbr_" in name and f"{_FUSED}." not in name]
    if branches:
        more = f" and {len(branches) - 1} more" if len(branches) > 1 else ""
        raise CheckpointError(
            f"checkpoint {path} carries scales of branches ({branches[0]}{more}), which say "
            "nothing about the kernel that they fuse to; reparameterize first, then train with "
            "quantizers, and save that deploy form"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in quantizers.items():
        match = _QUANTIZER.fullmatch(name)
        assert match is not None
        layer, kind, what = match[1] or "", match[2], match[3]
        if kind not in ("input", "weight") or what != "_amax":
            raise CheckpointError(
                f"checkpoint {path} has {name}; only the _amax of input and weight quantizers can "
                "be put into an engine"
            )
        found.setdefault(layer.removesuffix(_FUSED), {})[kind] = _amax(path, name, tensor)
    return {
        layer: LayerScales(
            input_scale=_input_scale(path, layer, amax.get("input")),
            weight_scales=_weight_scales(path, layer, amax.get("weight"), tensors),
        )
        for layer, amax in found.items()
    }


def _amax(path: Path, name: str, tensor: Tensor) -> Tensor:
    values = tensor.detach().float()
    bad = values[~(torch.isfinite(values) & (values >= 0))]
    if bad.numel() or not values.numel() or not tensor.dtype.is_floating_point:
        value = f"{bad[0].item():g}" if bad.numel() else f"{tensor.dtype} {list(tensor.shape)}"
        raise CheckpointError(
            f"checkpoint {path}: {name} is {value}, expected positive finite numbers; it was "
            "saved before calibration"
        )
    return values


def _input_scale(path: Path, layer: str, amax: Tensor | None) -> float | None:
    if amax is None:
        return None
    if amax.numel() != 1:
        raise CheckpointError(
            f"checkpoint {path}: the input quantizer of {layer} has {amax.numel()} ranges; INT8 "
            "needs one scale for the whole tensor"
        )
    scale = float(amax.reshape(()) / LEVELS)
    if scale <= 0:
        raise CheckpointError(
            f"checkpoint {path}: the input quantizer of {layer} has the range 0; it was saved "
            "before calibration"
        )
    return scale


def _weight_scales(
    path: Path, layer: str, amax: Tensor | None, tensors: Mapping[str, Tensor]
) -> Tensor | None:
    if amax is None:
        return None
    names = (f"{layer}{_FUSED}.weight", f"{layer}.weight")
    weight = next((tensors[name] for name in names if name in tensors), None)
    if weight is None:
        raise CheckpointError(f"checkpoint {path} has scales of {layer}, which has no weight")
    channels = len(weight)
    if amax.numel() != 1 and (list(amax.shape[:1]) != [channels] or amax.numel() != channels):
        raise CheckpointError(
            f"checkpoint {path}: the weight quantizer of {layer} has ranges {list(amax.shape)}, "
            f"expected one, or one for each of {channels} output channels"
        )
    scales = (amax.reshape(-1) / LEVELS).expand(channels).clone()
    empty = weight.detach().float().reshape(channels, -1).abs().amax(dim=1) == 0
    # A channel of zeros is exact at any scale, and its amax is 0.
    scales[(scales == 0) & empty] = 1 / LEVELS
    if bool((scales <= 0).any()):
        raise CheckpointError(
            f"checkpoint {path}: the weight quantizer of {layer} has the range 0 for a channel "
            "that is not zero; it was saved before calibration"
        )
    return scales
