"""Peak activation memory of one network: computed, counted by ONNX Runtime, seen by the kernel.

*Computed* is activation_memory.py on the graph as written. ONNX Runtime, told to optimize nothing
and to share no memory, must hold the same number of bytes after every single node, in the order in
which it ran them; ``measure`` refuses any other outcome. *Default* is what it holds as users run
it: branches fused into convolutions, memory shared. *Resident* is how far the process grew in such
runs if every tensor comes from the operating system and goes back to it, *arena* how far it grew
with ONNX Runtime's own allocator, which rounds up and keeps what it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from activation_memory import activation_memory

_CHILD = Path(__file__).with_name("paper_memory_child.py")
# glibc: what is freed goes back to the kernel, or loading the model would leave room for the runs.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakMemory:
    """Bytes for ``batch`` images; ``where`` is the node at which the computed peak stands."""

    batch: int
    computed: int
    where: str
    default: int
    resident: int
    arena: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class MemoryMismatchError(AssertionError):
    """Computed and counted bytes differ."""


def measure(model: Path, batch: int, image_size: tuple[int, int]) -> PeakMemory:
    """One fresh process for each way of measuring.

    Raises:
        MemoryMismatchError: naming the first node whose computed and counted bytes differ.
        subprocess.CalledProcessError: if a process fails; its standard error is ours.
    """
    counted = _child("written", model, batch, image_size)
    computed = activation_memory(onnx.load(model), batch, counted["order"])
    for name, expected, found in zip(computed.names, computed.held, counted["held"], strict=True):
        if expected != found:
            raise MemoryMismatchError(
                f"{model.name}, {name}: computed {expected} bytes, ONNX Runtime holds {found}"
            )
    default, resident, arena = (
        _child(what, model, batch, image_size)["peak"] for what in ("default", "resident", "arena")
    )
    return PeakMemory(
        batch=batch,
        computed=computed.peak,
        where=computed.where,
        default=default,
        resident=resident,
        arena=arena,
    )


def _child(what: str, model: Path, batch: int, image_size: tuple[int, int]) -> dict[str, Any]:
    command = [sys.executable, str(_CHILD), what, str(model), *map(str, (batch, *image_size))]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **_GIVE_BACK}
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
