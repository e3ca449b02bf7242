"""Checkpoints and archives made wrong: types, shapes, bombs, and pickles that run code.

Such a pickle writes the file that the environment variable ``CANARY`` names: who finds it knows
that the code ran.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import torch
from corrupt_text import changed
from corruption import Corruption

CANARY = "CANARY"
_BOMB_BYTES = (10**6, 10**6, 10**8, 1_500_000_000)
_SHELL = f'echo ran > "${CANARY}"'
_NAMES: tuple[Any, ...] = ("", "\ud800", "a\nb\nc\nd", 0, None, ("a", 1), "x" * 5000, "linear", ".")
_DTYPES = (
    torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.bfloat16,
    torch.float64, torch.uint8,
)  # fmt: skip


class _Runs:
    """Unpickled carelessly, runs code."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.made = (call, arguments)

    def __reduce__(self) -> Any:
        return self.made


def code(random: Random) -> Any:
    """An object whose unpickling would write the canary file."""
    return random.choice(
        (
            _Runs(os.system, _SHELL),
            _Runs(eval, f"__import__('os').system({_SHELL!r})"),
            _Runs(exec, f"import os; os.system({_SHELL!r})"),
            {"state_dict": {"stage0.weight": _Runs(os.system, _SHELL)}},
        )
    )


# --- safetensors -------------------------------------------------------------------------------


def safetensors_header(data: bytes, random: Random) -> bytes:
    """Entries of the header with other types, offsets and sizes: 2^60 elements, or none."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[random.choice(names)]
    how = random.randrange(5)
    if how == 0:
        shapes = ([2**60], [2**30, 2**30], [0], [], [-1], [2**64], [1] * 5000)
        entry["shape"] = random.choice(shapes)
    elif how == 1:
        entry["dtype"] = random.choice(("F64", "I8", "BOOL", "F8_E4M3", "F4", "BF16", "", None, 3))
    elif how == 2:
        ends = (0, 1, 2**62, -1, len(data))
        entry["data_offsets"] = [random.choice(ends), random.choice(ends)]
    elif how == 3:
        header = changed(header, random, 2)
    else:
        header[random.choice(_NAMES[:4])] = header.pop(random.choice(names))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    stated = random.choice((len(text),) * 5 + (0, 2**62, len(text) - 1, len(data), 100_000_000))
    return struct.pack("<Q", stated) + text + data[8 + length :]


# --- torch files -------------------------------------------------------------------------------


def strange_state(state: Mapping[str, torch.Tensor], random: Random) -> Any:
    """A state in which a tensor is of another kind, shape, layout or name, or is not one."""
    mine: dict[Any, Any] = dict(state)
    name = random.choice(list(mine))
    tensor = mine[name]
    float_tensor = tensor.float()
    kinds: list[Any] = [
        lambda: tensor.to(random.choice(_DTYPES)),
        lambda: torch.zeros(1).expand(random.choice(((2**40,), (2**20, 2**20), (2**31, 3, 3, 3)))),
        lambda: torch.zeros(()).expand(tensor.shape),
        lambda: torch.empty((2**60,), device="meta"),
        lambda: torch.empty(tensor.shape, device="meta"),
        float_tensor.to_sparse,
        lambda: torch.sparse_coo_tensor([[0]], torch.ones(1), (2**40,), check_invariants=True),
        lambda: torch.quantize_per_tensor(float_tensor, 0.1, 0, torch.qint8),
        lambda: tensor.new_full(tensor.shape, random.choice((float("nan"), float("inf"), 0.0)))
        if tensor.is_floating_point() else tensor,
        lambda: tensor.new_zeros((0, *tensor.shape[1:])),
        lambda: tensor.reshape(-1),
        lambda: torch.nn.Parameter(float_tensor),
        lambda: random.choice((None, 3, "text", [tensor], {"a": tensor}, b"bytes", 2.5)),
    ]  # fmt: skip
    for _ in range(random.choice((1, 1, 2))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of quantized tensors, which old files hold
            mine[name] = random.choice(kinds)()
    if random.random() < 0.2:
        mine[random.choice(_NAMES)] = mine.pop(random.choice(list(mine)))
    if random.random() < 0.1:
        mine["model"] = mine
    wrap = random.choice(("", "", "state_dict", "model", "ema"))
    return {wrap: mine} if wrap else mine


def state_changed(data: bytes, random: Random) -> bytes:
    """The file saved again with :func:`strange_state` in it, in either of torch's formats."""
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    state = loaded.get("state_dict", loaded)
    buffer = io.BytesIO()
    zipped = random.random() < 0.7
    torch.save(strange_state(state, random), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def pickle_with_code(data: bytes, random: Random) -> bytes:
    """The state, or all of the file, is an object that runs code."""
    payload = pickle.dumps(code(random), protocol=random.choice((0, 2, 4)))
    if random.random() < 0.4 or not data.startswith(b"PK"):
        return payload
    name = _entry_names(data, "data.pkl")[0]
    return _zip_with(data, {name: payload})


def pickle_changed(data: bytes, random: Random) -> bytes:
    """Opcodes of the pickle in a zip replaced: bottomless nesting, huge numbers, lists of lists."""
    if not data.startswith(b"PK"):
        return random.choice(_PICKLES)
    name = _entry_names(data, "data.pkl")[0]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        stream = archive.read(name)
    if random.random() < 0.4:
        return _zip_with(data, {name: random.choice(_PICKLES)})
    places = [place for _, _, place in pickletools.genops(stream) if place is not None]
    at = random.choice(places)
    opcode = random.choice(pickletools.opcodes).code.encode("latin-1")
    return _zip_with(data, {name: stream[:at] + opcode + stream[at + random.choice((0, 1)) :]})


def _doubling(depth: int) -> bytes:
    """A list of twice the same list, and so on: 2^depth elements when written out."""
    content: Any = ["x"]
    for _ in range(depth):
        content = [content, content]
    return pickle.dumps(content, protocol=2)


_PICKLES = (
    b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    b"\x80\x02" + b"}" * 3 + b".",
    b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\x01" * 100 + b".",  # an integer of 2 GB
    b"\x80\x02T\xff\xff\xff\x7f" + b"x" * 100 + b".",  # a text of 2 GB
    b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"x.",  # a bytearray of 2^62 bytes
    b"\x80\x02]r\xff\xff\xff\xff.",
    _doubling(30),
    b"\x80\x02N.", b"\x80\x02K\x01.", b".", b"\x80\x7f.", b"\x80\x02", b"",
)  # fmt: skip
"""All without code, and none a state."""


# --- zip archives ------------------------------------------------------------------------------


def zip_bomb(data: bytes, random: Random) -> bytes:
    """One entry is zeros, a thousandth of its size in the file."""
    name = random.choice(_entry_names(data, ""))
    size = random.choice(_BOMB_BYTES)
    if name.endswith(".npy"):
        return _zip_with(data, {name: _npy_header((size // 4,)) + bytes(size)}, compress=True)
    return _zip_with(data, {name: bytes(size)}, compress=True)


def zip_changed(data: bytes, random: Random) -> bytes:
    """An entry is empty, cut, another's, or compressed; the archive is written anew around it."""
    names = _entry_names(data, "")
    name = random.choice(names)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        own, other = archive.read(name), archive.read(random.choice(names))
    content = random.choice((b"", own[: len(own) // 2], own + b"x", other, bytes(len(own)), own))
    return _zip_with(data, {name: content}, compress=random.random() < 0.5)


def _entry_names(data: bytes, suffix: str) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [name for name in archive.namelist() if name.endswith(suffix)]


def _zip_with(data: bytes, entries: Mapping[str, bytes], *, compress: bool = False) -> bytes:
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, "w", how, compresslevel=1) as new,
    ):
        for name in old.namelist():
            content = entries.get(name) if name in entries else old.read(name)
            # Without a time: equal seeds make equal files.
            new.writestr(zipfile.ZipInfo(name), content, how, compresslevel=1)
    return buffer.getvalue()


# --- numpy archives ----------------------------------------------------------------------------


def array_changed(data: bytes, random: Random) -> bytes:
    """An array of another type, shape or kind: objects with code, 2^60 elements declared."""
    name = random.choice(_entry_names(data, ".npy"))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        array = np.load(io.BytesIO(archive.read(name)))
    how = random.randrange(4)
    if how == 0:
        shape = random.choice(((2**60,), (2**20, 2**20), (-1,), (2**64,), (), (0,) * 40))
        return _zip_with(data, {name: _npy_header(shape) + bytes(64)})
    buffer = io.BytesIO()
    if how == 1:
        objects = np.array([code(random)], dtype=object)
        np.save(buffer, objects, allow_pickle=True)
    elif how == 2:
        kind = random.choice(("<f8", "<i8", "?", "<c8", "<U3", "S3", "<f2", ">f4"))
        np.save(buffer, array.astype(kind))
    else:
        made = (array[:0], array[:1], array[..., :1], array * np.float32("nan"), array.reshape(-1),
                np.float32(3), array * np.float32(1e38))  # fmt: skip
        np.save(buffer, random.choice(made))
    return _zip_with(data, {name: buffer.getvalue()})


def _npy_header(shape: tuple[int, ...]) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape!r}, }}"
    text += " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


SAFETENSORS: Mapping[str, Corruption] = {"header changed": safetensors_header}
TORCH: Mapping[str, Corruption] = {
    "state changed": state_changed,
    "pickle with code": pickle_with_code,
    "pickle changed": pickle_changed,
}
ZIP: Mapping[str, Corruption] = {"zip bomb": zip_bomb, "archive changed": zip_changed}
NUMPY: Mapping[str, Corruption] = {"array changed": array_changed}
