"""The network in a file of weights.

:func:`load_checkpoint` builds it and refuses, by name, what is no RepVGG classifier with finite
weights. Files are read by ``checkpoint_file``, names translated by ``dialects``, variants told
apart by ``fitting``, and ``identification`` puts these together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from models.checkpoint_file import CheckpointError, read_checkpoint_file
from models.checkpoint_scales import LayerScales, layer_scales
from models.dialects import from_ours
from models.fitting import CLASSIFIER, DEPLOY, expected_shapes, fit
from models.identification import Checkpoint, Removed, identify
from models.repvgg import BlockStyle, RepVGG
from models.variants import Variant

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LayerScales",
    "LoadedCheckpoint",
    "Removed",
    "build",
    "expected_shapes",
    "identify",
    "load_checkpoint",
    "read_checkpoint_file",
    "refusal",
    "require_classifier",
    "require_network",
    "require_scales",
    "require_values",
]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A network in eval mode and what its file turned out to be.

    ``format`` is a value of :class:`models.dialects.Dialect`; ``form`` is ``train`` or ``deploy``;
    ``dtypes`` counts the tensors by the data type they were stored in. ``scales`` by layer
    (``stage0``, ``stage1.0``, ``linear``, ``gap``) are what quantization-aware training left; None
    where it left none. The weights of ``module`` are as stored, not rounded by them.
    """

    module: RepVGG
    variant: Variant
    format: str
    form: str
    num_classes: int
    style: BlockStyle
    removed: Removed
    dtypes: Mapping[str, int]
    scales: Mapping[str, LayerScales] | None = None


def load_checkpoint(path: Path, expected: Variant | None = None) -> LoadedCheckpoint:
    """Load ``path`` (safetensors or a torch file) as a RepVGG in eval mode.

    Nothing in the file is executed: torch files are read with ``weights_only=True``.

    Raises:
        CheckpointError: if the file is missing, damaged, no checkpoint, unsafe, not a RepVGG with
            its classifier, another variant than ``expected`` (the message names it), a mix of
            train and deploy form, or holds anything but finite floating-point numbers; if its
            scales belong to branches, or no engine can express them.
    """
    checkpoint = identify(read_checkpoint_file(path), expected)
    variant = require_network(checkpoint, expected)
    num_classes = require_classifier(checkpoint, variant)
    require_values(checkpoint)
    scales = require_scales(checkpoint)
    return LoadedCheckpoint(
        module=build(checkpoint),
        variant=variant,
        format=checkpoint.dialect.value,
        form=checkpoint.form,
        num_classes=num_classes,
        style=checkpoint.style,
        removed=checkpoint.removed,
        dtypes=checkpoint.dtypes,
        scales=scales,
    )


def refusal(checkpoint: Checkpoint) -> str | None:
    """Why :func:`load_checkpoint` would refuse it; None if it would not."""
    try:
        require_classifier(checkpoint, require_network(checkpoint))
        require_values(checkpoint)
        require_scales(checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def build(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> RepVGG:
    """The network of a checkpoint whose variant is known, in eval mode; values are not checked.

    Without a classifier in the file, the network's is all zeros.
    """
    assert checkpoint.variant is not None
    with torch.device("meta"):  # nothing to initialize, so no random numbers are drawn
        module = RepVGG(
            checkpoint.variant,
            num_classes=checkpoint.num_classes or 1,
            deploy=checkpoint.form == DEPLOY,
            style=checkpoint.style,
        ).to(dtype)
    module = module.to_empty(device="cpu").eval()
    classifier = checkpoint.num_classes is not None
    state = {n: t for n, t in checkpoint.tensors.items() if classifier or n not in CLASSIFIER}
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name not in state:  # counters, and a classifier that is not there
                tensor.zero_()
    module.load_state_dict(state, strict=False)
    return module


def require_network(checkpoint: Checkpoint, expected: Variant | None = None) -> Variant:
    """The variant of ``checkpoint``.

    Raises:
        CheckpointError: if it fits none, is not ``expected``, mixes the two forms, or is a part of
            a larger network.
    """
    variant = checkpoint.variant
    if checkpoint.removed.within is not None:
        problem = _part(checkpoint)
    elif variant is not None and (expected is None or variant == expected):
        return variant
    elif expected is None:
        problem = checkpoint.mixed or str(checkpoint.nearest)
    elif variant is not None:
        fits = f"its shapes fit {variant.name}; export it as {variant.name}"
        problem = f"is not RepVGG-{expected.name}: {fits}"
    else:
        problem = _misfit(checkpoint, expected)
    raise CheckpointError(f"checkpoint {checkpoint.path} {problem}")


def _part(checkpoint: Checkpoint) -> str:
    removed = checkpoint.removed
    what = "a RepVGG" if checkpoint.variant is None else f"a RepVGG-{checkpoint.variant.name}"
    beside = f" beside {', '.join(removed.beside[:3])}" if removed.beside else ""
    return (
        f"holds {what} under {removed.within!r}{beside}; export the whole network from Python, or "
        "save this part alone"
    )


def _misfit(checkpoint: Checkpoint, expected: Variant) -> str:
    nearest = checkpoint.nearest
    wanted = fit(
        checkpoint.tensors, expected, checkpoint.form, checkpoint.style, checkpoint.dialect
    )
    if checkpoint.mixed is not None:
        reason = checkpoint.mixed
    elif nearest.near and len(nearest.differences) < len(wanted.differences):
        return f"is not RepVGG-{expected.name}; it {nearest}"
    else:
        reason = (
            f"tensors that differ from {expected.name} in {wanted.form} form: "
            f"{len(wanted.differences)}, the first: {wanted.differences[0]}"
        )
    return f"is not RepVGG-{expected.name} and fits no other variant; {reason}"


def require_classifier(checkpoint: Checkpoint, variant: Variant) -> int:
    """The number of classes.

    Raises:
        CheckpointError: if there is no classifier, or one that does not fit ``variant``.
    """
    if checkpoint.num_classes is not None:
        return checkpoint.num_classes
    path, state = checkpoint.path, checkpoint.tensors
    names = from_ours(checkpoint.dialect, CLASSIFIER)
    if not all(name in state for name in CLASSIFIER):
        raise CheckpointError(
            f"checkpoint {path} is a RepVGG-{variant.name} without a classifier "
            f"({' and '.join(names.values())}); save the whole network"
        )
    weight, bias = (list(state[name].shape) for name in CLASSIFIER)
    raise CheckpointError(
        f"checkpoint {path} has a classifier that does not fit RepVGG-{variant.name}: weight "
        f"{weight} and bias {bias}, not [classes, {variant.feature_channels}] and [classes]"
    )


def require_values(checkpoint: Checkpoint) -> None:
    """Check that every tensor of the network is dense, floating-point and finite.

    Raises:
        CheckpointError: naming the first tensor that is not.
    """
    path = checkpoint.path
    for ours, tensor in checkpoint.tensors.items():
        name = checkpoint.names[ours]
        if tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            kind = f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
            raise CheckpointError(
                f"checkpoint {path}: {name} is {kind}; weights must be dense tensors of float16, "
                "bfloat16, float32 or float64"
            )
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            raise CheckpointError(f"checkpoint {path} has {bad} NaN or Inf values, first in {name}")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise CheckpointError(f"checkpoint {path} has a negative variance in {name}")


def require_scales(checkpoint: Checkpoint) -> Mapping[str, LayerScales] | None:
    """The scales by layer that quantization-aware training left; None if there are none.

    Raises:
        CheckpointError: as :func:`models.checkpoint_scales.layer_scales`.
    """
    if not checkpoint.quantizers:
        return None
    return layer_scales(checkpoint.path, checkpoint.quantizers, checkpoint.tensors)
