"""Files made wrong on purpose: what `fuzz` and the tests feed to everything that reads a file.

A :class:`Corruption` makes wrong bytes of right ones and draws whatever it needs from the
``Random`` that it is given, so equal seeds give equal files. Those here know only bytes;
``corrupt_text`` (JSON, TOML), ``corrupt_weights`` (checkpoints, archives), ``corrupt_graph`` (ONNX)
and ``corrupt_pictures`` know what a format means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

Corruption = Callable[[bytes, Random], bytes]

_HEAD = 4096
_EXTREMES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\x00\x00\xc0\x7f")
"""The last is NaN in float32."""


def truncated(data: bytes, random: Random) -> bytes:
    """Cut anywhere, half of the time within the first 4 KB."""
    limit = min(len(data), _HEAD) if random.random() < 0.5 else len(data)
    return data[: random.randrange(max(limit, 1))]


def lengthened(data: bytes, random: Random) -> bytes:
    """Bytes after the end, or the whole file twice."""
    return data + (data if random.random() < 0.3 else random.randbytes(random.randint(1, _HEAD)))


def bits_flipped(data: bytes, random: Random) -> bytes:
    """1 to 16 bits."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        if changed:
            changed[_place(len(changed), random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def bytes_set(data: bytes, random: Random) -> bytes:
    """A few bytes that are extreme as numbers of any kind."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        extreme = random.choice(_EXTREMES)
        at = _place(max(len(changed), 1), random)
        changed[at : at + len(extreme)] = extreme
    return bytes(changed)


def spliced(data: bytes, random: Random) -> bytes:
    """A block of the file left out, repeated, or written over another."""
    size = random.choice((1, 4, 16, 256, 4096))
    start, at = _place(max(len(data), 1), random), _place(max(len(data), 1), random)
    block = data[start : start + size]
    how = random.randrange(3)
    if how == 0:
        return data[:start] + data[start + size :]
    return data[:at] + block + data[at if how == 1 else at + len(block) :]


def zeroed(data: bytes, random: Random) -> bytes:
    """A block of zeros, as a disk that lost a sector leaves it."""
    at, size = _place(max(len(data), 1), random), random.choice((1, 16, 512, 4096))
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


def noise(data: bytes, random: Random) -> bytes:
    """Random bytes behind the first few, or nothing at all."""
    if random.random() < 0.1:
        return b""
    return data[: random.choice((0, 1, 2, 4, 8, 64))] + random.randbytes(random.randint(1, _HEAD))


def _place(size: int, random: Random) -> int:
    """Where to strike: headers, the directory at the end and the middle alike."""
    where = random.random()
    near = random.randrange(min(size, _HEAD))
    if where < 0.4:
        return near
    return size - 1 - near if where < 0.6 else random.randrange(size)


BYTES: Mapping[str, Corruption] = {
    "truncated": truncated,
    "lengthened": lengthened,
    "bits flipped": bits_flipped,
    "bytes set": bytes_set,
    "spliced": spliced,
    "zeroed": zeroed,
    "noise": noise,
}
