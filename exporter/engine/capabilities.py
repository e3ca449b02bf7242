"""What an installed TensorRT can do, asked of the library itself instead of its version.

Each capability is the dotted path of a name that the bindings have exactly if they can do it. All
that differs between releases is reached through functions marked with `needs`, which refuse to run
without their capability; a test reads these marks, so an unmarked use of a name that one release
lacks fails there.

===================  =====  =====  =====  =====  ==========
capability           8.6    10.3   10.16  11.4   RTX 1.7
===================  =====  =====  =====  =====  ==========
EXPLICIT_BATCH       yes    yes    yes    -      -
STRONG_TYPING        -      yes    yes    yes    yes
FP16_FLAG            yes    yes    yes    -      -
BF16_FLAG            -      yes    yes    -      -
FP8_FLAG             yes    yes    yes    -      -
INT8_FLAG            yes    yes    yes    -      -
CALIBRATOR           yes    yes    yes    -      -
PROGRESS_MONITOR     -      yes    yes    yes    yes
PARSER_NODES         -      yes    yes    yes    yes
SAME_CAPABILITY      -      -      yes    yes    yes
NAMED_TARGETS        -      -      -      -      yes
RUNTIME_CACHE        -      -      -      -      yes
===================  =====  =====  =====  =====  ==========
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Capability(Enum):
    """Something that only some releases have; the value is the name that tells."""

    EXPLICIT_BATCH = "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"
    STRONG_TYPING = "NetworkDefinitionCreationFlag.STRONGLY_TYPED"
    FP16_FLAG = "BuilderFlag.FP16"
    BF16_FLAG = "BuilderFlag.BF16"
    FP8_FLAG = "BuilderFlag.FP8"
    INT8_FLAG = "BuilderFlag.INT8"
    CALIBRATOR = "IInt8EntropyCalibrator2"
    PROGRESS_MONITOR = "IProgressMonitor"
    PARSER_NODES = "ParserError.node_name"
    SAME_CAPABILITY = "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"
    NAMED_TARGETS = "ComputeCapability"
    RUNTIME_CACHE = "IRuntimeCache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Api:
    """A TensorRT module, ``tensorrt`` or ``tensorrt_rtx``, and what it can do."""

    trt: Any
    capabilities: frozenset[Capability]

    @property
    def version(self) -> str:
        """The module's own version text."""
        return str(self.trt.__version__)

    def can(self, *capabilities: Capability) -> bool:
        """Whether it has all of them."""
        return self.capabilities.issuperset(capabilities)


def probe(trt: Any) -> Api:
    """Ask ``trt`` for each capability's name."""
    return Api(trt=trt, capabilities=frozenset(c for c in Capability if _has(trt, c.value)))


def _has(value: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def needs(
    *capabilities: Capability,
) -> Callable[[Callable[Concatenate[Api, P], R]], Callable[Concatenate[Api, P], R]]:
    """Mark a function of an `Api` that may be called only where it has these capabilities."""

    def mark(function: Callable[Concatenate[Api, P], R]) -> Callable[Concatenate[Api, P], R]:
        @functools.wraps(function)
        def checked(api: Api, /, *args: P.args, **kwargs: P.kwargs) -> R:
            if not api.can(*capabilities):
                lacking = ", ".join(c.name for c in capabilities if not api.can(c))
                raise RuntimeError(f"{function.__name__} called on a TensorRT without {lacking}")
            return function(api, *args, **kwargs)

        return checked

    return mark
