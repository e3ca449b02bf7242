"""The process that `kill` kills: an export of a small network, or only the writing of a bundle."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter import export, pipeline
from exporter.bundle import PARITY, dumps
from exporter.bundle.writer import BundleWriter
from exporter.files import replacing
from models import RepVGG, Variant

FILE_STEP = "file step"
_STEPS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod",
                    "os.utime", "os.scandir", "os.listdir", "shutil.rmtree", "tempfile.mkdtemp",
                    "fcntl.flock", "ctypes.dlsym"})  # fmt: skip
"""Audit events before file operations; ``ctypes.dlsym`` comes before the swap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run to be killed: ``after`` is seconds into the phase, or the number of a file step."""

    phase: str
    after: float
    swap: bool = True
    group: bool = False
    simplifier: bool = True
    fresh: bool = False
    """OUT is absent before."""


def network() -> RepVGG:
    """Eleven convolutions of 16 to 64 channels."""
    torch.manual_seed(0)
    variant = Variant(
        name="small", num_blocks=(2, 3, 4, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125)
    )
    return RepVGG(variant, num_classes=6).eval()


IMAGES = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)


def in_child(run: Run, out: Path, temporary: Path, home: Path, told: int) -> None:
    """Never returns. Stages are told through the descriptor ``told``, one line each."""
    os.setsid()
    os.environ["HOME"] = str(home)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    if not run.swap:
        replacing.exchange = lambda _first, _second: False
    code = 1
    try:
        if run.phase == FILE_STEP:
            die_at_step(int(run.after))
            write_bundle(out)
        else:
            export_small(run, out, told)
        code = 0
    finally:
        os._exit(code)


def export_small(run: Run, out: Path, told: int) -> None:
    """Export the small network, telling the stages."""
    real = pipeline.run

    def told_run(spec: Any, *_progress: Any, **options: Any) -> Any:
        def tell(stage: str, fraction: float) -> None:
            if fraction == 0.0:
                os.write(told, f"{stage}\n".encode())

        return real(spec, tell, **options)

    pipeline.run = told_run
    if not run.simplifier:
        pipeline.simplify = lambda model, _samples: model
    torch.set_num_threads(1)
    export(
        network(), example_input=torch.zeros(1, 3, 32, 32), evaluation=IMAGES,
        precision="fp16", targets="sm86", out=out,
    )  # fmt: skip


def write_bundle(out: Path) -> None:
    """Only what an export does at its end: a few files, published."""
    with BundleWriter(out) as writer:
        writer.write_text(PARITY, dumps({"verdict": "pass", "stages": []}))
        writer.path("model.onnx").write_bytes(os.urandom(1000))
        writer.publish({"spec": {"precision": "fp32", "batch": "1:8:32"}, "model": {}})


def die_at_step(number: int) -> None:
    """End this process by SIGKILL at its ``number``-th file operation from now on."""
    left = [number]

    def count(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in _STEPS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
