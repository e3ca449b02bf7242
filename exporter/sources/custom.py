"""From what the caller of the Python API passes to a source and its images."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.network import HEIGHT, WIDTH, Port, probe
from exporter.profiles import SizeProfile
from exporter.running.image_set import ArrayImages
from exporter.running.onnx_runner import fits
from exporter.sources.source import Source
from models.repvgg import PlainBlock, RepVGG


def module_source(
    module: nn.Module, example: tuple[Tensor, ...], size: SizeProfile | None
) -> Source:
    """The caller's module, copied to the CPU in eval mode and float32.

    Raises:
        InputError: if it cannot be copied, does not run on ``example`` or has outputs that cannot
            be compared.
    """
    notes = ["the network was passed by the caller"]
    if any(child.training for child in module.modules()):
        notes.append("the module is in train() mode; a copy switched to eval() is exported")
    try:
        own = copy.deepcopy(module).cpu().float().eval()
    except (RuntimeError, TypeError) as error:
        name = type(module).__name__
        raise InputError(f"a {name} cannot be exported: copying it fails: {error}") from error
    variant = own.variant if isinstance(own, RepVGG) else None
    interface = None if variant else probe(own, example, size)
    deploy = variant and any(isinstance(child, PlainBlock) for child in own.modules())
    form = "deploy" if deploy else "train"
    num_classes = own.num_classes if isinstance(own, RepVGG) else None
    return Source(
        module=own,
        variant=variant,
        form=form,
        origin={
            "source": "module",
            "file": None,
            "sha256": _digest(module),
            "form": form,
            "num_classes": interface.num_classes if interface else num_classes,
        },
        notes=tuple(notes),
        interface=interface,
    )


def example_tensors(example_input: Any, module: nn.Module) -> tuple[Tensor, ...]:
    """The example as float32 tensors on the CPU, one an input.

    Raises:
        InputError: if it is missing, or is something else.
    """
    wanted = "a float tensor [N, 3, H, W]" if isinstance(module, RepVGG) else "a float tensor"
    if example_input is None:
        more = "" if isinstance(module, RepVGG) else " [N, ...], or a tuple of them"
        raise InputError(f"a module needs example_input, {wanted}{more}")
    tensors = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
            found = (
                f"{tensor.dtype} {list(tensor.shape)}"
                if isinstance(tensor, Tensor)
                else type(tensor).__name__
            )
            raise InputError(f"example_input is {found}, expected float [N, ...]")
    if isinstance(module, RepVGG) and (
        len(tensors) != 1 or tensors[0].ndim != 4 or tensors[0].shape[1] != 3
    ):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise InputError(f"example_input is {shapes}, expected [N, 3, H, W]")
    if not tensors or any(len(tensor) != len(tensors[0]) or not len(tensor) for tensor in tensors):
        raise InputError("example_input needs tensors with one batch size, at least 1")
    return tuple(tensor.detach().cpu().float() for tensor in tensors)


def array_images(arrays: Any, what: str, ports: tuple[Port, ...]) -> ArrayImages:
    """Arrays that the caller preprocessed; an iterable is read once, into memory.

    An array, or a tuple of one array an input, is all there is. Any other iterable is read chunk by
    chunk, each an array or such a tuple. ``ports`` are the network's inputs; chunks of different
    height and width are accepted where these are free.

    Raises:
        InputError: naming what does not fit the network.
    """
    chunks = [arrays] if isinstance(arrays, (np.ndarray, tuple)) else list(arrays)
    batches = [chunk if isinstance(chunk, tuple) else (chunk,) for chunk in chunks]
    for batch in batches:
        _check_batch(batch, what, ports)
    filled = tuple(batch for batch in batches if len(batch[0]))
    if not filled:
        raise InputError(f"{what} holds no images")
    return ArrayImages(chunks=filled)


def require_fitting(batches: Iterable[tuple[Any, ...]], what: str, ports: tuple[Port, ...]) -> None:
    """Raises InputError where an array has not the type and shape that the input takes."""
    for batch in batches:
        for array, port in zip(batch, ports, strict=True):
            _check_shape(array, what, port)


def _check_batch(batch: tuple[Any, ...], what: str, ports: tuple[Port, ...]) -> None:
    if len(batch) != len(ports):
        names = ", ".join(port.name for port in ports)
        raise InputError(f"{what} holds {len(batch)} arrays, expected one an input: {names}")
    for array, port in zip(batch, ports, strict=True):
        _check_shape(array, what, port)
        if not np.isfinite(array).all():
            raise InputError(f"{what} holds NaN or Inf values")
        if len(array) != len(batch[0]):
            raise InputError(f"{what} holds {len(batch[0])} of {ports[0].name} and {len(array)} of "
                             f"{port.name}: as many of each are needed")  # fmt: skip


def _check_shape(array: Any, what: str, port: Port) -> None:
    is_array = isinstance(array, np.ndarray)
    if not is_array or not fits(array, port.shape[1:]):
        found = f"{array.dtype} {list(array.shape)}" if is_array else type(array).__name__
        extents = ", ".join(
            {HEIGHT: "H", WIDTH: "W"}.get(str(extent), str(extent)) for extent in port.shape[1:]
        )
        raise InputError(f"{what} holds {found}, expected float32 [N, {extents}]")


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            # numpy has no bfloat16; its bits are hashed.
            bits = value.view(torch.int16) if value.dtype is torch.bfloat16 else value
            digest.update(name.encode() + b"\0" + bits.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
