"""The Python API: ``export`` and ``reparameterize``."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from exporter import pipeline
from exporter.bundle import Bundle
from exporter.errors import InputError
from exporter.image_set import ArrayImages
from exporter.inputs import prepare
from exporter.source import Source, load_network
from exporter.spec import ExportRequest, validate
from models.fusion import reparameterize as _reparameterize
from models.repvgg import PlainBlock, RepVGG

FloatArray = npt.NDArray[np.float32]


def reparameterize(module: nn.Module) -> nn.Module:
    """Return a deep copy of ``module`` in eval mode whose RepVGG blocks are single convolutions.

    The fusion is computed in float64; ``module`` itself is not touched. A module in train() mode
    gives a :class:`models.TrainModeWarning`.

    Raises:
        InputError: naming the block, if one cannot be fused.
    """
    try:
        return _reparameterize(module)
    except ValueError as error:
        raise InputError(str(error)) from error


def export(
    module: nn.Module | str,
    *,
    example_input: torch.Tensor | None = None,
    weights: str | Path | None = None,
    precision: str = "int8",
    calibration: str | Path | FloatArray | Iterable[FloatArray] | None = None,
    targets: str | Sequence[str] | None = None,
    backend: str = "auto",
    out: str | Path | None = None,
    **options: Any,
) -> Bundle:
    """Export a RepVGG and return its published bundle.

    Args:
        module: a variant's name such as ``"A0"``, or a trained :class:`models.RepVGG` in either
            form (then ``example_input`` is required and ``weights`` must be None).
        example_input: float tensor ``[N, 3, H, W]``; fixes the image size.
        weights: as ``WEIGHTS=``: a checkpoint, ``"hub"`` or ``"random"``.
        precision: ``"fp32"``, ``"fp16"`` or ``"int8"``.
        calibration: a folder of images, or an array or an iterable of arrays ``[N, 3, H, W]``
            float32, already preprocessed. An iterable is read once, into memory.
        targets: compute capabilities such as ``"sm86"`` or ``["sm80", "sm86"]``.
        options: further fields of :class:`exporter.spec.ExportRequest`, such as ``batch="1:8:32"``.

    Raises:
        exporter.errors.ExporterError: GateFailedError, InputError or EnvironmentLackError.
    """
    unknown = sorted(set(options) - set(ExportRequest.__dataclass_fields__))
    if unknown:
        raise InputError(f"unknown option {', '.join(unknown)}")
    folder, arrays = None, None
    if isinstance(calibration, str | Path):
        folder = calibration
    elif calibration is not None:
        arrays = _array_images(calibration)
    request = ExportRequest(
        model=module if isinstance(module, str) else "",
        precision=str(precision),
        weights=_text(weights),
        calibration=_text(folder),
        target=targets if targets is None or isinstance(targets, str) else ",".join(targets),
        backend=backend,
        out=_text(out),
        **options,
    )
    if isinstance(module, str):
        spec = validate(request)
        source = load_network(spec)
    else:
        network = _require_network(module, weights)
        size = _image_size(example_input)
        spec = validate(request, network.variant)
        spec = replace(spec, weights="module", image_size=spec.image_size or size)
        source = _module_source(network)
    return pipeline.run(spec, inputs=prepare(spec, source, arrays)).bundle


def _require_network(module: nn.Module, weights: str | Path | None) -> RepVGG:
    if not isinstance(module, RepVGG):
        raise InputError(
            f"a {type(module).__name__} cannot be exported; pass a models.RepVGG or a variant name"
        )
    if weights is not None:
        raise InputError("pass either a module, which has its weights, or weights; not both")
    return module


def _module_source(module: RepVGG) -> Source:
    notes = ["the network was passed by the caller"]
    if any(child.training for child in module.modules()):
        notes.append("the module is in train() mode; a copy switched to eval() is exported")
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + b"\0" + tensor.detach().cpu().numpy().tobytes())
    form = "deploy" if any(isinstance(m, PlainBlock) for m in module.modules()) else "train"
    return Source(
        module=copy.deepcopy(module).cpu().float().eval(),
        form=form,
        origin={
            "source": "module",
            "file": None,
            "sha256": digest.hexdigest(),
            "form": form,
            "num_classes": module.num_classes,
        },
        notes=tuple(notes),
    )


def _image_size(example_input: torch.Tensor | None) -> tuple[int, int]:
    if example_input is None:
        raise InputError("a module needs example_input, a float tensor [N, 3, H, W]")
    if example_input.ndim != 4 or example_input.shape[1] != 3:
        raise InputError(f"example_input is {list(example_input.shape)}, expected [N, 3, H, W]")
    return int(example_input.shape[2]), int(example_input.shape[3])


def _array_images(calibration: FloatArray | Iterable[FloatArray]) -> ArrayImages:
    chunks = [calibration] if isinstance(calibration, np.ndarray) else list(calibration)
    for chunk in chunks:
        if not isinstance(chunk, np.ndarray) or chunk.dtype != np.float32 or chunk.ndim != 4:
            found = (
                f"{chunk.dtype} {list(chunk.shape)}"
                if isinstance(chunk, np.ndarray)
                else type(chunk).__name__
            )
            raise InputError(f"calibration holds {found}, expected float32 [N, 3, H, W]")
        if not np.isfinite(chunk).all():
            raise InputError("calibration holds NaN or Inf values")
    if not sum(len(chunk) for chunk in chunks):
        raise InputError("calibration holds no images")
    try:
        return ArrayImages(array=np.concatenate(chunks))
    except ValueError as error:
        raise InputError(f"calibration arrays do not fit together: {error}") from error


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)
