"""Which graph a build reads and which data-type flags it sets, from what the library can do.

==============  ==========================  ==========================  ===========================
                strongly typed              weakly typed                implicit INT8
==============  ==========================  ==========================  ===========================
fp32            float graph                 float graph                 -
fp16            half graph                  float graph, FP16           -
bf16            bfloat16 graph              float graph, BF16           -
int8            Q/DQ graph                  Q/DQ graph, INT8            float graph, INT8, scales
                                                                        from the calibration cache
fp8             Q/DQ graph                  Q/DQ graph, FP8             -
available       TensorRT >= 10, RTX         TensorRT <= 10              TensorRT <= 10
==============  ==========================  ==========================  ===========================

bf16 and fp8 came with TensorRT 10; the flag FP8 of 8.6 is for plugins only.

INT8 is implicit if that is asked for, and on a DLA before TensorRT 11, whose networks are weakly
typed: there with FP16 beside it, for the layers that have no scale. Pure functions of capabilities;
no TensorRT is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.build_options import Quantization, Typing
from exporter.engine.backend import BuildRequest
from exporter.engine.capabilities import Capability
from exporter.engine.refusal import BadInputError
from exporter.engine.summary import EngineTyping
from exporter.spec import Precision

_WEAK = (Capability.FP16_FLAG, Capability.INT8_FLAG)
_LATER = {
    Precision.BF16: (Capability.BF16_FLAG,),
    Precision.FP8: (Capability.FP8_FLAG, Capability.STRONG_TYPING),
}
"""What tells that a weakly typed network may use a type that TensorRT 8.6 lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Approach:
    """The graph to parse, whether its types bind, and the types that the builder may choose."""

    graph: Path
    strongly_typed: bool
    allowed: frozenset[Precision] = frozenset()
    calibration_cache: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def typing(self) -> EngineTyping:
        """Who chooses the data types."""
        if self.calibration_cache is not None:
            return EngineTyping.IMPLICIT
        return EngineTyping.STRONG if self.strongly_typed else EngineTyping.WEAK


def choose_approach(
    request: BuildRequest, capabilities: frozenset[Capability], library: str
) -> Approach:
    """Decide how to build; ``library`` is name and version for messages.

    Raises:
        BadInputError: if the library cannot do it the way that was asked for.
    """
    options = request.options
    weak_exists = capabilities.issuperset(_WEAK)
    on_weak_dla = options.dla is not None and weak_exists
    if _is_implicit(request, on_weak_dla=on_weak_dla):
        return _implicit(request, capabilities, library)
    if on_weak_dla:
        if request.precision is Precision.INT8:
            raise BadInputError(
                f"the DLA of {library} takes INT8 from a calibration cache and not from Q/DQ "
                "nodes: pass one, or leave quantization at auto where the bundle has its own"
            )
        return _weak(request, capabilities, library)
    if options.typing is Typing.WEAK:
        if not weak_exists:
            raise BadInputError(
                f"{library} builds strongly typed networks only: weak typing was removed in "
                "TensorRT 11; leave typing at auto"
            )
        return _weak(request, capabilities, library)
    if weak_exists and Capability.STRONG_TYPING not in capabilities:
        if options.typing is Typing.STRONG:
            raise BadInputError(
                f"{library} has no strongly typed networks: they came with TensorRT 10; leave "
                "typing at auto"
            )
        return _weak(request, capabilities, library)
    return Approach(graph=request.onnx_path, strongly_typed=True)


def _is_implicit(request: BuildRequest, *, on_weak_dla: bool) -> bool:
    options = request.options
    by_dla = on_weak_dla and request.precision is Precision.INT8 and request.cache_path is not None
    return options.is_implicit or (by_dla and options.quantization is Quantization.AUTO)


def _weak(request: BuildRequest, capabilities: frozenset[Capability], library: str) -> Approach:
    """Flags allow the precision; a graph without Q/DQ is read in float where there is one."""
    if not capabilities.issuperset(_LATER.get(request.precision, ())):
        raise BadInputError(
            f"{library} does not build {request.precision}, which came with TensorRT 10: use fp16"
        )
    if request.precision is Precision.FP32:
        return Approach(graph=request.onnx_path, strongly_typed=False)
    graph = (
        request.onnx_path
        if request.precision.is_quantized
        else request.float_path or request.onnx_path
    )
    note = f"weakly typed: the builder itself chooses among fp32 and {request.precision}"
    return Approach(
        graph=graph,
        strongly_typed=False,
        allowed=frozenset({request.precision}),
        notes=(note,),
    )


def _implicit(request: BuildRequest, capabilities: frozenset[Capability], library: str) -> Approach:
    if not capabilities.issuperset({*_WEAK, Capability.CALIBRATOR}):
        raise BadInputError(
            f"{library} takes no calibration cache: implicit INT8 was removed in TensorRT 11; "
            "build the Q/DQ graph without one"
        )
    if request.precision is not Precision.INT8:
        raise BadInputError(f"a calibration cache belongs to int8, not to {request.precision}")
    if request.options.typing is Typing.STRONG:
        raise BadInputError("a calibration cache needs a weakly typed network, not a strong one")
    cache = request.options.calibration_cache or request.cache_path
    if cache is None:
        raise BadInputError("implicit INT8 needs a calibration cache, and none is given")
    if request.float_path is None:
        raise BadInputError("implicit INT8 is built from the float graph, and none is given")
    on_dla = request.options.dla is not None
    allowed = {Precision.INT8, Precision.FP16} if on_dla else {Precision.INT8}
    types = "fp32, fp16 and int8" if on_dla else "fp32 and int8"
    return Approach(
        graph=request.float_path,
        strongly_typed=False,
        allowed=frozenset(allowed),
        calibration_cache=cache,
        notes=(
            "implicit INT8: scales come from the calibration cache, weights are rounded by the "
            f"builder, which itself chooses among {types}",
        ),
    )
