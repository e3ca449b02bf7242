"""The Python API: ``export`` and ``reparameterize``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from exporter import pipeline
from exporter.bundle import Bundle
from exporter.errors import InputError
from exporter.network import BATCH, HEIGHT, WIDTH, Port, classifier_interface
from exporter.request import ExportRequest, validate
from exporter.running.image_set import ArrayImages
from exporter.running.onnx_runner import FloatArray
from exporter.sources.custom import array_images, example_tensors, module_source
from exporter.sources.inputs import prepare
from exporter.sources.source import Source, load_network
from exporter.spec import ExportSpec
from models.fusion import reparameterize as _reparameterize
from models.repvgg import RepVGG

Chunk: TypeAlias = FloatArray | tuple[FloatArray, ...]
Arrays: TypeAlias = Chunk | Iterable[Chunk]
Example: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]

_NAMED = {
    "model", "precision", "weights", "calibration", "evaluation", "target", "backend", "out",
}  # fmt: skip
"""Of a request, what :func:`export` has parameters for."""


def reparameterize(module: nn.Module) -> nn.Module:
    """Return a deep copy of ``module`` in eval mode whose RepVGG blocks are single convolutions.

    The fusion is computed in float64; ``module`` itself is not touched. A module in train() mode
    gives a :class:`models.TrainModeWarning`.

    Raises:
        InputError: if it is no module, or a block, which is named, cannot be fused.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"a {type(module).__name__} is no torch module")
    try:
        return _reparameterize(module)
    except ValueError as error:
        raise InputError(str(error)) from error


def export(
    module: nn.Module | str,
    *,
    example_input: Example | None = None,
    weights: str | Path | None = None,
    precision: str = "int8",
    calibration: str | Path | Arrays | None = None,
    evaluation: str | Path | Arrays | None = None,
    targets: str | Sequence[str] | None = None,
    backend: str = "auto",
    out: str | Path | None = None,
    **options: Any,
) -> Bundle:
    """Export a network with RepVGG-style blocks and return its published bundle.

    Args:
        module: a variant's name such as ``"A0"``; or a trained module of any class that contains
            RepVGG-style blocks (then ``example_input`` is required and ``weights`` must be None).
            Its forward takes float tensors ``[N, ...]`` and returns one, or tuples, lists or dicts
            of them. Only the blocks are fused; everything else is exported as it is.
        example_input: float tensor ``[N, ...]``, or a tuple of one an input; fixes all sizes but
            the batch.
        weights: as ``--weights``: a checkpoint, ``"hub"`` or ``"random"``.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"fp8"``.
        calibration: a folder of images, or float32 arrays that are already preprocessed: one
            ``[N, ...]``, a tuple of one an input, or an iterable of either, which is read once,
            into memory.
        evaluation: the same, to compare the stages on; without it the calibration arrays.
        targets: compute capabilities or devices, ``"sm86"`` or ``["sm80", "orin"]``. The engine of
            a device that builds its own is deferred, as ``engine.json`` then says.
        options: further fields of :class:`exporter.request.ExportRequest`, such as
            ``batch="1:8:32"`` or ``dynamic_size="64:96:128"``, which leaves height and width of the
            inputs open.

    Raises:
        exporter.errors.ExporterError: GateFailedError, InputError or EnvironmentLackError.
    """
    further = ExportRequest.__dataclass_fields__.keys() - _NAMED
    if unknown := sorted(options.keys() - further):
        raise InputError(f"unknown option {', '.join(unknown)}")
    request = ExportRequest(
        model=module if isinstance(module, str) else "",
        precision=str(precision),
        weights=_text(weights),
        calibration=_text(calibration) if isinstance(calibration, str | Path) else None,
        evaluation=_text(evaluation) if isinstance(evaluation, str | Path) else None,
        target=targets if targets is None or isinstance(targets, str) else ",".join(targets),
        backend=backend,
        out=_text(out),
        **options,
    )
    if isinstance(module, str):
        spec = validate(request)
        # Before the network is loaded, so that wrong arrays are refused at once.
        ports = (Port(name="images", shape=(BATCH, 3, HEIGHT, WIDTH)),)
        given = _given(calibration, evaluation, ports)
        source = load_network(spec)
    else:
        if weights is not None:
            raise InputError("pass either a module, which has its weights, or weights; not both")
        spec, source = _own_network(module, example_tensors(example_input, module), request)
        given = _given(calibration, evaluation, _ports(spec, source))
    return pipeline.run(spec, inputs=prepare(spec, source, *given)).bundle


def _own_network(
    module: nn.Module, example: tuple[torch.Tensor, ...], request: ExportRequest
) -> tuple[ExportSpec, Source]:
    variant = module.variant if isinstance(module, RepVGG) else None
    if variant is not None and request.image_size is None:
        height, width = example[0].shape[2:]
        request = replace(request, image_size=f"{height}x{width}")
    elif variant is None and request.image_size is not None:
        raise InputError("example_input fixes the image size of a module; leave image_size out")
    spec = validate(request, variant or type(module).__name__)
    return replace(spec, weights="module"), module_source(module, example, spec.dynamic_size)


def _ports(spec: ExportSpec, source: Source) -> tuple[Port, ...]:
    if source.interface is not None:
        return source.interface.inputs
    assert spec.image_size is not None
    return classifier_interface(spec.image_size, 1, spec.dynamic_size).inputs


def _given(
    calibration: Any, evaluation: Any, ports: tuple[Port, ...]
) -> tuple[ArrayImages | None, ArrayImages | None]:
    """The images that were passed as arrays."""
    images = [
        None
        if arrays is None or isinstance(arrays, str | Path)
        else array_images(arrays, what, ports)
        for what, arrays in (("calibration", calibration), ("evaluation", evaluation))
    ]
    return images[0], images[1]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
