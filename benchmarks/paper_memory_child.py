"""The child that measures one network's activation memory (see paper_memory.py).

    paper_memory_child.py written|default|resident|arena MODEL.onnx BATCH HEIGHT WIDTH

A process for each measurement, because memory that an earlier session freed would be used again.
The answer is one JSON object on the last line of standard output.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ort_profile import held_by_activations, open_session, profiled, session_options
from quantizer_job import resident_mib

from exporter.onnx_export import INPUT_NAME

Images = npt.NDArray[np.float32]


def written(model: Path, images: Images) -> dict[str, Any]:
    """Bytes held at every node of the graph as written, and the order in which they ran."""
    runs = profiled(model, images, 1, as_written=True)
    return {"order": [node.name for node in runs[0]], "held": held_by_activations(runs)[0]}


def default(model: Path, images: Images) -> dict[str, Any]:
    """The most bytes held in the second run, when the memory plan of the first is in use."""
    return {"peak": max(held_by_activations(profiled(model, images, 2))[1])}


def resident(model: Path, images: Images) -> dict[str, Any]:
    """How far the resident set grew in two runs whose tensors come from the operating system."""
    return {"peak": _growth(model, images, arena=False)}


def arena(model: Path, images: Images) -> dict[str, Any]:
    """The same with ONNX Runtime's arena, which keeps what it once had: the default."""
    return {"peak": _growth(model, images, arena=True)}


def _growth(model: Path, images: Images, *, arena: bool) -> int:
    options = session_options()
    options.enable_cpu_mem_arena = arena
    session = open_session(model, options)
    before, _ = resident_mib(reset_peak=True)
    for _ in range(2):
        session.run(None, {INPUT_NAME: images})
    _, peak = resident_mib()
    return round((peak - before) * 2**20)


MEASUREMENTS: dict[str, Callable[[Path, Images], dict[str, Any]]] = {
    "written": written,
    "default": default,
    "resident": resident,
    "arena": arena,
}


def main() -> None:
    what, model, *extents = sys.argv[1:]
    batch, height, width = map(int, extents)
    images = np.random.default_rng(0).standard_normal((batch, 3, height, width), np.float32)
    print(json.dumps(MEASUREMENTS[what](Path(model), images)))


if __name__ == "__main__":
    main()
