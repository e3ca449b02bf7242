"""How ONNX Runtime on a CPU computes a graph of each precision, and whether its time means much.

=========  ======================================================================================
fp32       as it is
int8       as it is, rounded and scaled in float32; with half scales, where its
           optimizations can be wrong, without them
fp16       optimizations off: see :class:`exporter.running.onnx_runner.OnnxRunner`
fp8        as it is, optimizations off: it rounds and scales, and multiplies in float32
bf16       it has no bfloat16 convolution: the float32 graph of :mod:`exporter.running.emulation`
=========  ======================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.errors import EnvironmentLackError, GateFailedError
from exporter.running.onnx_runner import OnnxRunner

if TYPE_CHECKING:
    import onnx

_RIGHT_WHEN_OPTIMIZED = ("fp32", "int8")
_EMULATED = ("bf16",)
_UNTIMED = ("bf16", "fp8")
_NOTE = (
    "the {precision} row was computed in float32 and rounded wherever the graph stores bfloat16: "
    "ONNX Runtime has no such convolution on the CPU"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runnable:
    """What an OnnxRunner is made of; ``notes`` are for people who read its results."""

    model: Path | onnx.ModelProto
    optimize: bool
    notes: tuple[str, ...] = ()

    def open(self, *, threads: int = 0) -> OnnxRunner:
        """The runner; ``threads`` 0 means all cores. Raises what :class:`OnnxRunner` does."""
        return OnnxRunner(self.model, optimize=self.optimize, threads=threads)


def runnable(
    graph: Path | onnx.ModelProto, precision: str, *, half_scales: bool = False
) -> Runnable:
    """What computes the ``graph`` of this precision, a file or in memory.

    ``half_scales`` says that its quantizers have such.

    Raises:
        EnvironmentLackError: if it must be emulated, and the onnx package is not installed.
        GateFailedError: if it must be emulated, and is no graph that can be.
    """
    model = graph
    notes: tuple[str, ...] = ()
    if precision in _EMULATED:
        notes = (_NOTE.format(precision=precision),)
        try:
            import onnx

            from exporter.running.emulation import emulated
        except ImportError as error:
            raise EnvironmentLackError(
                f"ONNX Runtime has no {precision} convolutions on the CPU, and emulating them "
                "needs the onnx package: pip install onnx, or run the engine on a GPU"
            ) from error
        try:
            model = emulated(onnx.load(graph) if isinstance(graph, Path) else graph)
        except Exception as error:
            # What ONNX Runtime would refuse, onnx does not load, or cannot follow, in as many ways.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GateFailedError(f"the graph cannot be emulated: {reason}") from error
    return Runnable(
        model=model, optimize=precision in _RIGHT_WHEN_OPTIMIZED and not half_scales, notes=notes
    )


def require_timeable(precision: str) -> None:
    """Raises EnvironmentLackError where ONNX Runtime's time says nothing about ``precision``."""
    if precision in _UNTIMED:
        raise EnvironmentLackError(
            f"ONNX Runtime has no {precision} convolutions on the CPU and emulates them in "
            "float32, whose time says nothing: measure the engine on a GPU"
        )
