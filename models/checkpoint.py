"""A file of weights -> a RepVGG: load safely, translate key dialects, say what was found.

Two dialects are read, each in train and deploy form: the official repository's (``rbr_dense``,
``rbr_reparam``, ``linear``) and timm's (``conv_kxk``, ``reparam_conv``, ``head.fc``). The variant
and the number of classes follow from names and shapes, so a checkpoint of another variant is named
for what it is.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.repvgg import RepVGG
from models.variants import VARIANTS, Variant

_CLASSIFIER = ("linear.weight", "linear.bias")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "model_ema", "module")
_MAX_WRAPPERS = 3  # a damaged or malicious file may hold a mapping that holds itself
_PREFIXES = ("module.", "_orig_mod.")
_IGNORED = re.compile(r"(^|\.)num_batches_tracked$")
# timm's ByobNet -> official. Stage numbers shift by one: timm's stem is the paper's stage 0.
_TIMM_BLOCK_KEYS = (
    ("conv_kxk.", "rbr_dense."),
    ("conv_1x1.", "rbr_1x1."),
    ("identity.", "rbr_identity."),
    ("reparam_conv.", "rbr_reparam."),
)


class CheckpointError(ValueError):
    """The file cannot be used as RepVGG weights; the message says why and what would fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """A network in eval mode and what its file turned out to be.

    ``format`` is ``official`` or ``timm``; ``form`` is ``train`` or ``deploy``.
    """

    module: RepVGG
    variant: Variant
    format: str
    form: str
    num_classes: int


def load_checkpoint(path: Path, expected: Variant | None = None) -> LoadedCheckpoint:
    """Load ``path`` (safetensors or a torch file) as a RepVGG in eval mode.

    Nothing in the file is executed: torch files are read with ``weights_only=True``.

    Raises:
        CheckpointError: if the file is missing, damaged, no checkpoint, unsafe, not a RepVGG with
            its classifier, another variant than ``expected`` (the message names it), or holds
            anything but finite floating-point numbers.
    """
    state = read_state(path)
    if not state:
        raise CheckpointError(f"checkpoint {path} holds no tensors")
    state, dialect = _official_names(state)
    state = {name: tensor for name, tensor in state.items() if not _IGNORED.search(name)}
    form = "deploy" if any(".rbr_reparam." in name for name in state) else "train"
    variant = _identify(path, state, form, expected)
    num_classes = _num_classes(path, state, variant)
    _check_values(path, state)
    module = RepVGG(variant, num_classes=num_classes, deploy=form == "deploy")
    module.load_state_dict(state, strict=False)
    return LoadedCheckpoint(
        module=module.eval(), variant=variant, format=dialect, form=form, num_classes=num_classes
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of ``path`` by name, wrappers and ``module.`` prefixes removed.

    Raises:
        CheckpointError: if the file cannot be read as weights, or would run code.
    """
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not named tensors; "
            "save model.state_dict()"
        )
    for _ in range(_MAX_WRAPPERS):
        inside = (content.get(wrapper) for wrapper in _WRAPPERS)
        content = next((inner for inner in inside if isinstance(inner, Mapping)), content)
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES * 2:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _is_safetensors(path: Path) -> bool:
    """By content (an 8-byte header length, then JSON); by suffix only where that says nothing."""
    try:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise CheckpointError(f"checkpoint {path} {what}")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror})") from error
    if not head:
        raise CheckpointError(f"checkpoint {path} is empty")
    if head[8:] == b"{":
        return True
    is_torch = head.startswith((b"PK", b"\x80"))  # a zip archive, a pickle
    return path.suffix == ".safetensors" and not is_torch


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged, truncated or not a safetensors file ({error})"
        ) from error


def _read_torch(path: Path) -> object:
    try:
        # An open file, because of a path torch.load would look at the suffix.
        with path.open("rb") as file, warnings.catch_warnings():
            # Of old storage classes and pickle protocols: what is read is checked later anyway.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # On damaged bytes torch.load raises whatever its parts raise: AssertionError, KeyError,
        # struct.error, UnicodeDecodeError and a dozen others, none of them part of its contract.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        kind = (
            f"a pickle that would run {wanted[1]}, or damaged"
            if wanted
            else "damaged, truncated or not a file of weights"
        )
        raise CheckpointError(
            f"checkpoint {path} is {kind}; refused and not executed, "
            "save model.state_dict() as safetensors instead"
        ) from error


def _official_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    if not any(name.startswith("stem.") for name in state):
        return state, "official"
    return {_official_name(name): tensor for name, tensor in state.items()}, "timm"


def _official_name(timm_name: str) -> str:
    name = timm_name.replace("head.fc.", "linear.")
    name = re.sub(r"^stem\.", "stage0.", name)
    name = re.sub(r"^stages\.(\d+)\.", lambda match: f"stage{int(match[1]) + 1}.", name)
    for theirs, ours in _TIMM_BLOCK_KEYS:
        name = name.replace(f".{theirs}", f".{ours}")
    return name


@functools.cache
def expected_shapes(variant: Variant, form: str) -> Mapping[str, tuple[int, ...]]:
    """Parameter and buffer shapes of a variant in official names, the classifier left out."""
    with torch.device("meta"):
        module = RepVGG(variant, num_classes=1, deploy=form == "deploy")
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not _IGNORED.search(name) and name not in _CLASSIFIER
    }


def _mismatches(state: Mapping[str, Tensor], variant: Variant, form: str) -> list[str]:
    """How the tensors differ from ``variant``, the classifier left out; empty where they fit."""
    wanted = expected_shapes(variant, form)
    found = {n: tuple(tensor.shape) for n, tensor in state.items() if n not in _CLASSIFIER}
    complaints = [f"{name} is missing" for name in wanted if name not in found]
    complaints += [f"{name} is not expected" for name in found if name not in wanted]
    complaints += [
        f"{name} is {list(found[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return complaints


def _identify(
    path: Path, state: Mapping[str, Tensor], form: str, expected: Variant | None
) -> Variant:
    if expected is not None and not _mismatches(state, expected, form):
        return expected
    complaints = {name: _mismatches(state, variant, form) for name, variant in VARIANTS.items()}
    nearest = min(complaints, key=lambda name: len(complaints[name]))
    if expected is None and not complaints[nearest]:
        return VARIANTS[nearest]
    if expected is None:
        problem, differences = "fits no RepVGG variant", complaints[nearest]
    elif not complaints[nearest]:
        raise CheckpointError(
            f"checkpoint {path} is not RepVGG-{expected.name}: its shapes fit {nearest}; "
            f"use MODEL={nearest}"
        )
    else:
        nearest, differences = expected.name, _mismatches(state, expected, form)
        problem = f"is not RepVGG-{nearest} and fits no other variant"
    raise CheckpointError(
        f"checkpoint {path} {problem}; tensors that differ from {nearest} in {form} form: "
        f"{len(differences)}, the first: {differences[0]}"
    )


def _num_classes(path: Path, state: Mapping[str, Tensor], variant: Variant) -> int:
    if not all(name in state for name in _CLASSIFIER):
        raise CheckpointError(
            f"checkpoint {path} is a RepVGG-{variant.name} without a classifier "
            f"({' and '.join(_CLASSIFIER)}); save the whole network"
        )
    weight, bias = (list(state[name].shape) for name in _CLASSIFIER)
    if not bias or bias[0] < 1 or weight != [bias[0], variant.feature_channels]:
        raise CheckpointError(
            f"checkpoint {path} has a classifier that does not fit RepVGG-{variant.name}: weight "
            f"{weight} and bias {bias}, not [classes, {variant.feature_channels}] and [classes]"
        )
    return bias[0]


def _check_values(path: Path, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
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
