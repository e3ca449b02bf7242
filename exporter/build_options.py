"""How an engine is built, beyond model, precision, targets and input sizes.

Standard library only. Which library can obey which option is decided by the backends; here stands
only what each option means and which values make sense.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

OPTIMIZATION_LEVELS = range(6)
"""From the fastest build to the most thorough search; TensorRT's default is 3."""


class Typing(str, Enum):
    """Who decides the data types of a network.

    ``STRONG``: the ONNX graph, tensor by tensor. ``WEAK``: the builder, among those that its flags
    allow; removed in TensorRT 11. ``AUTO``: strong where the library can, else weak.
    """

    AUTO = "auto"
    STRONG = "strong"
    WEAK = "weak"

    def __str__(self) -> str:
        return self.value


class Quantization(str, Enum):
    """Where the scales of an INT8 engine come from.

    ``EXPLICIT``: from the Q/DQ nodes of the graph. ``IMPLICIT``: from a calibration cache beside
    the float graph, whose weights the builder rounds; removed in TensorRT 11. ``AUTO``: explicit,
    but implicit for a DLA that takes nothing else.
    """

    AUTO = "auto"
    EXPLICIT = "explicit"
    IMPLICIT = "implicit"

    def __str__(self) -> str:
        return self.value


class HardwareCompatibility(str, Enum):
    """On which GPUs beside the building one a plan of full TensorRT runs, at some cost in speed."""

    NONE = "none"
    AMPERE_PLUS = "ampere+"
    SAME_COMPUTE_CAPABILITY = "same-compute-capability"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Dla:
    """Build for a deep learning accelerator.

    ``core`` counts from 0. ``gpu_fallback`` lets the GPU run the layers that the DLA does not take;
    without it such a layer fails the build.
    """

    core: int = 0
    gpu_fallback: bool = True

    def __post_init__(self) -> None:
        if self.core < 0:
            raise ValueError(f"DLA core must be 0 or more, not {self.core}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """The defaults leave everything to the builder.

    ``calibration_cache`` makes an INT8 build implicit, with the scales of this file in place of the
    bundle's own. ``timing_cache`` is read if it exists and written
    after the build. ``version_compatible`` plans run with later TensorRT releases too.
    ``allow_emulated`` accepts targets that compute quantized convolutions in half.
    """

    typing: Typing = Typing.AUTO
    quantization: Quantization = Quantization.AUTO
    calibration_cache: Path | None = None
    dla: Dla | None = None
    timing_cache: Path | None = None
    optimization_level: int | None = None
    hardware_compatibility: HardwareCompatibility = HardwareCompatibility.NONE
    version_compatible: bool = False
    allow_emulated: bool = False

    def __post_init__(self) -> None:
        level = self.optimization_level
        if level is not None and level not in OPTIMIZATION_LEVELS:
            raise ValueError(f"optimization level must be 0 to 5, not {level}")
        explicit = self.quantization is Quantization.EXPLICIT
        if explicit and self.calibration_cache is not None:
            raise ValueError("a calibration cache belongs to implicit quantization, not explicit")

    @property
    def is_implicit(self) -> bool:
        """Whether INT8 is to be implicit on a GPU too."""
        asked = self.quantization is Quantization.IMPLICIT
        return asked or self.calibration_cache is not None

    @property
    def full_tensorrt_only(self) -> tuple[str, ...]:
        """Those that are set and that TensorRT-RTX cannot obey, named as on the command line."""
        asked = {
            "typing weak": self.typing is Typing.WEAK,
            "quantization implicit": self.quantization is Quantization.IMPLICIT,
            "calibration cache": self.calibration_cache is not None,
            "dla": self.dla is not None,
            "timing cache": self.timing_cache is not None,
            "optimization level": self.optimization_level is not None,
            "hardware compatibility": self.hardware_compatibility is not HardwareCompatibility.NONE,
            "version compatible": self.version_compatible,
        }
        return tuple(name for name, is_set in asked.items() if is_set)

    def to_json(self) -> dict[str, Any]:
        """What is set away from its default, as text, numbers and true."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                values[item.name] = str(value) if isinstance(value, Path | Enum) else value
        if self.dla is not None:
            values["dla"] = self.dla.core
            if not self.dla.gpu_fallback:
                values["gpu_fallback"] = False
        return values


DEFAULT_OPTIONS = BuildOptions()
