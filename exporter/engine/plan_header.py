"""The first bytes of a serialized TensorRT-RTX plan, which can be read without any library.

Measured on plans of TensorRT-RTX 1.7.1, little-endian::

    0x00  "vtrt"                 0x10  u64, bytes of the whole plan
    0x18  u8 x 3, version        0x20  u64, one bit for each compute capability
    0x38  u64, bytes of weights
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputError

MAGIC = b"vtrt"
_LENGTH = 0x40
_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""From bit 0 upwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanHeader:
    """What a plan says about itself; ``targets`` names an unknown bit ``bit N``."""

    version: str
    targets: tuple[str, ...]
    weight_bytes: int
    plan_bytes: int


def read_plan_header(path: Path) -> PlanHeader:
    """Read the header of a plan and check its length against the file's.

    Raises:
        InputError: if the file is no such plan, or shorter or longer than it says.
    """
    with path.open("rb") as file:
        head = file.read(_LENGTH)
    size = path.stat().st_size
    if not head.startswith(MAGIC) or len(head) < _LENGTH:
        raise InputError(f"{path} is not a TensorRT-RTX plan, or is cut within its header")
    stated, mask, weights = (struct.unpack_from("<Q", head, at)[0] for at in (0x10, 0x20, 0x38))
    if stated != size:
        raise InputError(
            f"engine {path} is damaged: its header speaks of {stated} bytes, the file has {size}"
        )
    bits = [bit for bit in range(64) if mask >> bit & 1]
    return PlanHeader(
        version=".".join(map(str, head[0x18:0x1B])),
        targets=tuple(_TARGETS[b] if b < len(_TARGETS) else f"bit {b}" for b in bits),
        weight_bytes=weights,
        plan_bytes=size,
    )
