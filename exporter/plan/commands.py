"""The command lines of NVIDIA's own tools that build the engine of a bundle.

What ``trtexec`` needs depends on the TensorRT it comes with:

=============  =======================  ============================================================
TensorRT       graph                    flags
=============  =======================  ============================================================
8.5, 8.6       float, or float Q/DQ     weakly typed: ``--fp16`` or ``--int8``
10.x           of the precision         ``--stronglyTyped``: data types are those of the graph
11.x           of the precision         none: every network is strongly typed, precision flags gone
=============  =======================  ============================================================

Implicit INT8, up to 10.x, is ``--int8`` with the calibration cache and the float graph.

On a DLA, TensorRT up to 10.7 takes INT8 from a calibration cache and the float graph; 10.8 to 11.3
have no DLA; from 11.4 on it takes the strongly typed graph. A DLA has no dynamic shapes.

No line names the data type of an input: ``trtexec`` takes float32 and uint8 as the graph has them.

Sources: "Migrating trtexec Usage" from 8.x to 10.x and from 10.x to 11.x, "Working with DLA" of
11.4.1, and for ``tensorrt_rtx`` "CPU-Only AOT and TensorRT-RTX Engines" (all docs.nvidia.com).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporter.devices import Version
from exporter.pixel_input import DTYPE, FLOAT, Layout
from exporter.profiles import BatchProfile, SizeProfile

BATCH, HEIGHT, WIDTH = "batch", "height", "width"
MODEL, CACHE = "model.onnx", "calibration.cache"
SAVED = "trtexec.engine"
"""What NVIDIA's tools write, in the bundle's folder: not the bundle's own, which is listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """An input of the graph: its name, and its shape with a name in place of each free extent."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = FLOAT

    @classmethod
    def of(cls, name: str, shape: Sequence[int | str], layout: Layout | None) -> GraphInput:
        """The input of the network; with a ``layout`` it takes pixels in place of ``shape``."""
        if layout is None:
            return cls(name=name, shape=tuple(shape))
        return cls(name=name, shape=layout.shape(shape), dtype=DTYPE)

    def to_json(self) -> dict[str, Any]:
        """The fields by name; a data type is named where it is not float32."""
        named = {"dtype": self.dtype} if self.dtype != FLOAT else {}
        return {"name": self.name, "shape": list(self.shape), **named}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBuild:
    """What every tool must be told. ``dla_core`` is None for the GPU.

    With ``half_scales`` the Q/DQ graph is half all through, which takes opset 19; ``implicit`` INT8
    has its scales from the calibration cache.
    """

    precision: str
    inputs: tuple[GraphInput, ...]
    batch: BatchProfile
    size: SizeProfile | None = None
    workspace_mib: int | None = None
    dla_core: int | None = None
    half_scales: bool = False
    implicit: bool = False

    @property
    def graph(self) -> str:
        """File name of the graph that holds the precision."""
        return MODEL if self.precision == "fp32" else f"model.{self.precision}.onnx"


def trtexec(build: EngineBuild, version: Version) -> str | None:
    """The line for full TensorRT ``version``; None if that cannot build it."""
    if build.dla_core is not None:
        chosen = _dla(build, version)
    elif build.implicit:
        chosen = _implicit(version)
    elif version >= (11, 0):
        chosen = build.graph, []
    elif version >= (10, 0):
        chosen = build.graph, ["--stronglyTyped"]
    else:
        chosen = _weakly_typed(build)
    if chosen is None:
        return None
    graph, flags = chosen
    words = ["trtexec", f"--onnx={graph}", f"--saveEngine={SAVED}", *flags]
    return shlex.join([*words, *_shapes(build), *_workspace(build)])


def tensorrt_rtx(build: EngineBuild, capabilities: Sequence[str]) -> str:
    """The line for TensorRT-RTX, which needs no GPU: ``--skipInference`` keeps it from running."""
    numbers = ",".join(capability.removeprefix("sm") for capability in capabilities)
    words = ["tensorrt_rtx", f"--onnx={build.graph}", f"--saveEngine={SAVED}"]
    words += [f"--computeCapabilities={numbers}", "--skipInference"]
    return shlex.join([*words, *_shapes(build), *_workspace(build)])


def _weakly_typed(build: EngineBuild) -> tuple[str, list[str]] | None:
    if build.half_scales:
        return None
    known = {
        "fp32": (MODEL, []),
        "fp16": (MODEL, ["--fp16"]),
        "int8": (build.graph, ["--int8"]),
    }
    return known.get(build.precision)


def _implicit(version: Version) -> tuple[str, list[str]] | None:
    return (MODEL, ["--int8", f"--calib={CACHE}"]) if version < (11, 0) else None


def _dla(build: EngineBuild, version: Version) -> tuple[str, list[str]] | None:
    core = [f"--useDLACore={build.dla_core}", "--allowGPUFallback"]
    if version >= (11, 4):
        return build.graph, core
    if version >= (10, 8) or build.precision not in ("fp16", "int8"):
        return None
    if build.precision == "fp16":
        return MODEL, ["--fp16", *core]
    return MODEL, ["--int8", "--fp16", f"--calib={CACHE}", *core]


def _workspace(build: EngineBuild) -> list[str]:
    return [f"--memPoolSize=workspace:{build.workspace_mib}"] if build.workspace_mib else []


def _shapes(build: EngineBuild) -> list[str]:
    """Least, best and largest shape of every input; nothing if no extent is free."""
    free = [entry for entry in build.inputs if any(isinstance(e, str) for e in entry.shape)]
    if not free:
        return []
    flags = []
    for index, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
        shapes = (f"{entry.name}:{_shape(entry, build, index)}" for entry in free)
        flags.append(f"{flag}={','.join(shapes)}")
    return flags


def _shape(entry: GraphInput, build: EngineBuild, index: int) -> str:
    batch = (build.batch.min, build.batch.opt, build.batch.max)
    extents = {BATCH: batch if build.dla_core is None else (build.batch.opt,) * 3}
    if build.size is not None:
        for axis, sizes in ((HEIGHT, build.size.height), (WIDTH, build.size.width)):
            extents[axis] = sizes if build.dla_core is None else (sizes[1],) * 3
    return "x".join(
        str(extents[extent][index] if isinstance(extent, str) else extent) for extent in entry.shape
    )
