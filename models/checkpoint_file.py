"""A file of weights -> its tensors by name: safe reading, wrappers and prefixes taken off.

Training scripts put a state under ``state_dict``, ``model``, ``ema`` and the like, and in front of
its names ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` (Lightning) or
``backbone.``. What was taken off is recorded: a prefix goes only where every name has it.
"""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.file_names import is_text

WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "model_ema", "module")
"""In the order of preference, where a file has several."""
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")
CLASSIFIERS = ("linear.weight", "linear.bias", "head.fc.weight", "head.fc.bias")
"""Names that stand beside ``backbone.`` where only the body is in that module."""
_MAX_WRAPPERS = 4  # a damaged or malicious file may hold a mapping that holds itself
_MOST_EXPANSION = 8
_SMALL = 64 << 20
"""Bytes that any file may unpack to."""
_COUNTERS = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")


class CheckpointError(ValueError):
    """The file cannot be used as RepVGG weights; the message says why and what would fit."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckpointFile:
    """The tensors of a file under the names that its network gave them.

    ``wrappers`` and ``prefixes`` are what was taken off, outermost first; ``others`` are wrappers
    that hold tensors too and were left alone.
    """

    path: Path
    container: str
    tensors: Mapping[str, Tensor]
    wrappers: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The tensors without ``num_batches_tracked`` and an averaged model's ``n_averaged``."""
        return {n: t for n, t in self.tensors.items() if not _COUNTERS.search(n)}


def read_checkpoint_file(path: Path) -> CheckpointFile:
    """Read a safetensors or torch file. Nothing in it is executed (``weights_only=True``).

    Raises:
        CheckpointError: if the file cannot be read as weights, would run code, or has no tensors.
    """
    safe = _is_safetensors(path)
    content = _read_safetensors(path) if safe else _read_torch(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not named tensors; "
            "save model.state_dict()"
        )
    state, wrappers, others = _unwrapped(content)
    if not state:
        elsewhere = [str(key) for key, value in content.items() if _holds_tensors(value)]
        hint = (
            f" under a name known for them; {elsewhere[0]!r} does: save that" if elsewhere else ""
        )
        raise CheckpointError(f"checkpoint {path} holds no tensors{hint}")
    # A tensor can repeat one number 2^40 times, until somebody copies it.
    _require_size(path, sum(_dense_bytes(tensor) for tensor in state.values()))
    state, prefixes = _unprefixed(state)
    return CheckpointFile(
        path=path,
        container="safetensors" if safe else "torch",
        tensors=state,
        wrappers=wrappers,
        prefixes=prefixes,
        others=others,
    )


def _unwrapped(
    content: Mapping[object, object],
) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The innermost tensors, the wrappers around them and those beside them."""
    wrappers: list[str] = []
    others: list[str] = []
    for _ in range(_MAX_WRAPPERS):
        found = [name for name in WRAPPERS if _holds_tensors(content.get(name))]
        if not found:
            break
        inner = content[found[0]]
        assert isinstance(inner, Mapping)
        wrappers.append(found[0])
        others += found[1:]
        content = inner
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return state, tuple(wrappers), tuple(others)


def _holds_tensors(value: object, depth: int = _MAX_WRAPPERS) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    inside = (value.get(name) for name in WRAPPERS)
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        _holds_tensors(item, depth - 1) for item in inside
    )


def _unprefixed(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Take prefixes off for as long as all names share one."""
    removed: list[str] = []
    while state:
        prefix = next((prefix for prefix in PREFIXES if _is_prefix(prefix, state)), None)
        if prefix is None:
            break
        removed.append(prefix)
        state = _without(state, (prefix,))
    return state, tuple(removed)


def _is_prefix(prefix: str, state: Mapping[str, Tensor]) -> bool:
    rest = {name for name in state if not name.startswith(prefix)}
    shared = rest <= {"n_averaged"} or (prefix == "backbone." and rest <= set(CLASSIFIERS))
    # Two names that became one would lose a tensor.
    return shared and len(rest) < len(state) and len(_without(state, (prefix,))) == len(state)


def _without(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    names = {name: name for name in state}
    for prefix in prefixes:
        names = {theirs: name.removeprefix(prefix) for theirs, name in names.items()}
    return {name: state[theirs] for theirs, name in names.items()}


def _is_safetensors(path: Path) -> bool:
    """By content (an 8-byte header length, then JSON); by suffix only where that says nothing."""
    try:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else "is not a regular file"
            what = what if path.exists() else "does not exist"
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
    from safetensors.torch import load, load_file

    try:
        return load_file(path) if is_text(path) else load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged, truncated or not a safetensors file ({error})"
        ) from error


def _unpacked_bytes(path: Path) -> int:
    """What the entries of a zip say that they hold; 0 for other files, and for damaged ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, EOFError, NotImplementedError):
        # torch.load reads it next, and its refusal says what is damaged.
        return 0


def _dense_bytes(tensor: Tensor) -> int:
    return 0 if tensor.is_meta or tensor.is_sparse else tensor.numel() * tensor.element_size()


def _require_size(path: Path, size: int) -> None:
    """Weights hardly compress: what is much larger than its file is no checkpoint."""
    most = _MOST_EXPANSION * path.stat().st_size + _SMALL
    if size > most:
        raise CheckpointError(
            f"checkpoint {path} would unpack to {size / 1e9:.3g} GB out of a file of "
            f"{path.stat().st_size / 1e6:.3g} MB: refused, no checkpoint compresses like that"
        )


def _read_torch(path: Path) -> object:
    _require_size(path, _unpacked_bytes(path))
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
