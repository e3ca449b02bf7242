"""Describe a checkpoint: whose names, which variant, what was taken off, and its INT8 outlook."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporter.bundle import file_sha256
from exporter.errors import InputError
from exporter.inspection.finding import UNKNOWN_FORMAT, Inspection, Kind
from exporter.inspection.outlook import KernelOutlook, kernel_outlook
from models.checkpoint import (
    Checkpoint,
    CheckpointError,
    build,
    identify,
    read_checkpoint_file,
    refusal,
)
from models.dialects import Dialect
from models.fusion import fuse_block
from models.identification import style_name
from models.repvgg import PlainBlock

_SHOWN = 20
"""So many differences from the nearest variant are listed."""


def inspect_checkpoint(path: Path) -> Inspection:
    """Read a file of weights and say what it is; a network that is no RepVGG is described too.

    Raises:
        InputError: if the file cannot be read as weights, would run code, or has no tensors.
    """
    try:
        file = read_checkpoint_file(path)
        checkpoint = identify(file)
    except CheckpointError as error:
        raise InputError(str(error)) from error
    known = checkpoint.dialect is not Dialect.UNKNOWN
    layers = tuple(kernel_outlooks(checkpoint)) if _is_network(checkpoint) else ()
    nan_count, inf_count = _count_values(file.weights.values())
    return Inspection(
        path=path,
        kind=Kind.CHECKPOINT,
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        format=checkpoint.dialect.value if known else UNKNOWN_FORMAT,
        form=checkpoint.form if known and checkpoint.mixed is None else None,
        variant=checkpoint.variant.name if checkpoint.variant else None,
        num_classes=checkpoint.num_classes if known else None,
        parameters=checkpoint.parameters,
        nan_count=nan_count,
        details={**_details(checkpoint), "container": file.container, "inf_count": inf_count},
        layers=layers,
        notes=tuple(_notes(checkpoint)),
    )


def _details(checkpoint: Checkpoint) -> dict[str, Any]:
    removed, nearest = checkpoint.removed, checkpoint.nearest
    trained = checkpoint.form == "train" and checkpoint.dialect is not Dialect.UNKNOWN
    return {
        "style": style_name(checkpoint.style) if trained else None,
        "dtypes": dict(checkpoint.dtypes),
        "wrappers_removed": list(removed.wrappers),
        "prefixes_removed": list(removed.prefixes),
        "heads_dropped": list(removed.heads),
        "other_wrappers": list(removed.others),
        "within": removed.within,
        "beside": list(removed.beside),
        "nearest": None if nearest.exact else nearest.variant.name,
        "differences": [str(difference) for difference in nearest.differences[:_SHOWN]],
        "difference_count": len(nearest.differences),
    }


def _notes(checkpoint: Checkpoint) -> Iterable[str]:
    removed = checkpoint.removed
    if checkpoint.variant is None:
        yield checkpoint.mixed or str(checkpoint.nearest)
    reason = refusal(checkpoint)
    if reason is not None and checkpoint.variant is not None:
        yield f"cannot be exported as it is: {reason}"
    if removed.heads:
        yield f"auxiliary heads, which inference does not run, are dropped: {_list(removed.heads)}"
    if removed.others:
        read = "".join(f"{name}." for name in removed.wrappers)
        yield f"{_list(removed.others)} in the file holds tensors too; {read.rstrip('.')} was read"
    if checkpoint.dialect is Dialect.QAREPVGG:
        yield (
            "the eps of BatchNorm is not in the file; 1e-5 is assumed (YOLOv6 trains with 1e-3: "
            "then export the network itself from Python)"
        )


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names)


def _is_network(checkpoint: Checkpoint) -> bool:
    """Whether kernels can be fused: the variant is known and all tensors are ordinary numbers."""
    return checkpoint.variant is not None and all(
        tensor.is_floating_point() and tensor.layout is torch.strided and not tensor.is_meta
        for tensor in checkpoint.tensors.values()
    )


def kernel_outlooks(checkpoint: Checkpoint) -> Iterable[KernelOutlook]:
    """The figures of every block's fused kernel, of a checkpoint whose variant is known."""
    assert checkpoint.variant is not None
    modules = dict(build(checkpoint).named_modules())
    for layer in checkpoint.variant.layers:
        block = modules[layer.name]
        if isinstance(block, PlainBlock):
            kernel = block.rbr_reparam.weight.detach()
        else:
            block.se = None  # the gates behind the branches are no part of their kernel
            kernel = fuse_block(block)[0]
        square = layer.in_channels == layer.out_channels
        yield kernel_outlook(layer.name, kernel.double().numpy(), square=square)


def _count_values(tensors: Iterable[Tensor]) -> tuple[int, int]:
    """Numbers of NaN and of infinite values."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        if values.dtype.itemsize == 1:  # the 8-bit floats have no isnan
            values = values.float()
        counts["nan"] += int(torch.isnan(values).sum())
        counts["inf"] += int(torch.isinf(values).sum())
    return counts["nan"], counts["inf"]
