"""A checkpoint under other key names, or in deploy form.

Renaming keeps every tensor bit for bit, data type and counters included. Going from train to deploy
form fuses in float64 and rounds once, to float32 (float64 where the file has float64). Deploy form
cannot be taken apart again: many sets of branches have the same sum.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from exporter.bundle import file_sha256
from exporter.errors import InputError
from exporter.files.whole_file import whole_file
from models.checkpoint import (
    Checkpoint,
    CheckpointError,
    build,
    identify,
    read_checkpoint_file,
    require_network,
    require_values,
)
from models.checkpoint_file import CheckpointFile
from models.dialects import Dialect, from_ours, to_ours
from models.fitting import DEPLOY, TRAIN
from models.fusion import reparameterize
from models.identification import style_name
from models.repvgg import REPVGG
from models.variants import Squeeze, Variant

_SUFFIX = ".safetensors"


class Names(str, Enum):
    """Whose key names to write."""

    OFFICIAL = "official"
    TIMM = "timm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What was written. ``dropped`` are auxiliary heads that the result has no place for."""

    path: Path
    variant: str
    source_format: str
    source_form: str
    format: str
    form: str
    tensors: int
    sha256: str
    dropped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that ``convert --json`` prints."""
        return {**asdict(self), "path": str(self.path), "dropped": list(self.dropped)}


def convert(
    path: Path, out: Path, *, to: str = "official", form: str | None = None, force: bool = False
) -> Conversion:
    """Write the checkpoint ``path`` as safetensors to ``out``, in one step.

    ``form`` is ``train``, ``deploy`` or None for the file's own.

    Raises:
        InputError: if the checkpoint is no RepVGG, the conversion is impossible (train from deploy
            form; names for blocks that the other side does not have), or ``out`` cannot be written
            or exists and ``force`` is not given.
    """
    names, wanted = _choice(to, (*Names,), "names"), form
    if form is not None:
        wanted = _choice(form, (TRAIN, DEPLOY), "form")
    _require_writable(out, force)
    try:
        file = read_checkpoint_file(path)
        checkpoint = identify(file)
        variant = require_network(checkpoint)
        wanted = wanted or checkpoint.form
        dialect = _dialect(checkpoint, variant, Names(names), wanted)
        require_values(checkpoint)
    except CheckpointError as error:
        raise InputError(str(error)) from error
    tensors, dropped = _tensors(checkpoint, file, dialect, wanted)
    _write(tensors, out, force)
    return Conversion(
        path=out,
        variant=variant.name,
        source_format=checkpoint.dialect.value,
        source_form=checkpoint.form,
        format=dialect.value,
        form=wanted,
        tensors=len(tensors),
        sha256=file_sha256(out),
        dropped=dropped,
    )


def _choice(value: str, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        names = ", ".join(str.__str__(name) for name in known)
        raise InputError(f"unknown {what} {value!r} (known: {names})")
    return value


def _dialect(checkpoint: Checkpoint, variant: Variant, names: Names, form: str) -> Dialect:
    """The dialect to write, if the blocks can be named in it."""
    if form == TRAIN and checkpoint.form == DEPLOY:
        raise InputError(
            f"checkpoint {checkpoint.path} is in deploy form: a fused kernel cannot be taken apart "
            "into branches; convert the trained checkpoint instead"
        )
    if form == TRAIN and checkpoint.style != REPVGG:
        raise InputError(
            f"checkpoint {checkpoint.path} has {style_name(checkpoint.style)} blocks, for which "
            f"{names.value} has no train form; add --form deploy"
        )
    after_relu = variant.squeeze is Squeeze.AFTER_RELU
    if names is Names.TIMM and after_relu:
        raise InputError(
            f"timm has no {variant.name}: its squeeze-and-excitation comes after the ReLU; "
            "use --to official"
        )
    if names is Names.TIMM:
        return Dialect.TIMM
    return Dialect.PLUS if after_relu else Dialect.OFFICIAL


def _tensors(
    checkpoint: Checkpoint, file: CheckpointFile, dialect: Dialect, form: str
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What to write, by the dialect's names, and the heads left out."""
    if form != checkpoint.form:
        state = _fused(checkpoint)
    else:
        # Counters are not among the checkpoint's tensors and are kept all the same.
        theirs = [name for name in file.tensors if name not in checkpoint.heads]
        ours = to_ours(checkpoint.dialect, theirs)
        state = {ours[name]: file.tensors[name] for name in theirs if ours[name] != "n_averaged"}
    named = from_ours(dialect, state)
    tensors = {named[name]: tensor for name, tensor in state.items()}
    if checkpoint.heads and dialect is Dialect.PLUS and form == TRAIN:
        return {**tensors, **checkpoint.heads}, ()
    return tensors, checkpoint.removed.heads


def _fused(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    double = any(tensor.dtype is torch.float64 for tensor in checkpoint.tensors.values())
    module = build(checkpoint, torch.float64 if double else torch.float32)
    try:
        state: Mapping[str, Tensor] = reparameterize(module).state_dict()
    except ValueError as error:
        raise InputError(f"checkpoint {checkpoint.path}: {error}") from error
    if checkpoint.num_classes is None:
        return {n: t for n, t in state.items() if not n.startswith("linear.")}
    return state


def _require_writable(out: Path, force: bool) -> None:
    if out.suffix != _SUFFIX:
        raise InputError(f"OUT {out} must end in {_SUFFIX}: that is what is written")
    if out.is_dir():
        raise InputError(f"OUT {out} is a folder")
    if out.exists() and not force:
        raise InputError(f"OUT {out} exists; name another file or add --force")


def _write(tensors: Mapping[str, Tensor], out: Path, force: bool) -> None:
    """Beside ``out``, then renamed: it is the old file whole, the new one whole, or absent."""
    try:
        with whole_file(out) as file:
            stored = {name: _stored(tensor) for name, tensor in tensors.items()}
            # By its bytes: the library does not take every name that a file can have.
            file.write(save(stored, metadata={"format": "pt"}))
            file.flush()
            os.fsync(file.fileno())
            _require_writable(out, force)
    except OSError as error:
        raise InputError(f"OUT {out} cannot be written: {error.strerror or error}") from error


def _stored(tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it: contiguous and alone in its storage."""
    tensor = tensor.detach()
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if alone and tensor.is_contiguous() else tensor.clone().contiguous()
