"""What ONNX Runtime's profiler says of every node of a run: time, shapes, memory in use.

The allocator's counters stand in the profile since some release before 1.32. They are read when a
node has finished and before what it read last is freed, so they are the M(i) of
activation_memory.py plus whatever the session held before the first node.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from exporter.onnx_export import INPUT_NAME

_ENDING = "_kernel_time"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRun:
    """One node in one run, with the shapes that the profiler lists, packed weights left out.

    ``held_bytes`` are requested of the allocator when the node ends, ``new_bytes`` more than
    when it began; both are None where the release does not count.
    """

    name: str
    op: str
    seconds: float
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    held_bytes: int | None
    new_bytes: int | None


class MissingCountersError(RuntimeError):
    """This ONNX Runtime's profile does not count memory."""


def session_options(*, as_written: bool = False) -> onnxruntime.SessionOptions:
    """The defaults; ``as_written`` runs the graph's own nodes, each tensor in its own memory."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_reuse = False
        options.enable_mem_pattern = False
    return options


def open_session(
    model: Path, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """``model`` on the CPU."""
    return onnxruntime.InferenceSession(
        str(model), options or session_options(), providers=["CPUExecutionProvider"]
    )


def profiled(
    model: Path, images: npt.NDArray[np.float32], runs: int, *, as_written: bool = False
) -> list[list[NodeRun]]:
    """``runs`` runs of ``model``, each as its nodes in the order in which they ran."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(as_written=as_written)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = open_session(model, options)
        for _ in range(runs):
            session.run(None, {INPUT_NAME: images})
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    nodes = [
        _node_run(event)
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(_ENDING)
    ]
    each = len(nodes) // runs
    return [nodes[start : start + each] for start in range(0, len(nodes), each)]


def _node_run(event: dict[str, Any]) -> NodeRun:
    found = event["args"]

    def shapes(key: str) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(extents) for kind in found[key] for extents in kind.values())

    def count(key: str) -> int | None:
        return int(found[key]) if key in found else None

    return NodeRun(
        name=event["name"].removesuffix(_ENDING),
        op=found["op_name"],
        seconds=event["dur"] / 1e6,
        inputs=shapes("input_type_shape"),
        outputs=shapes("output_type_shape"),
        held_bytes=count("mem_bytes_requested_in_use"),
        new_bytes=count("mem_requested_in_use_delta"),
    )


def held_by_activations(runs: Sequence[Sequence[NodeRun]]) -> list[list[int]]:
    """Bytes at each node's end beyond what was held before the first node of the first run.

    Raises:
        MissingCountersError: if the profile has none.
    """
    first = runs[0][0]
    if first.held_bytes is None or first.new_bytes is None:
        raise MissingCountersError(
            f"the profile of onnxruntime {onnxruntime.__version__} has no memory counters; "
            "install the release that constraints.txt names"
        )
    before = first.held_bytes - first.new_bytes
    return [[(node.held_bytes or 0) - before for node in run] for run in runs]
