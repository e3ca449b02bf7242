"""What the user asked for, validated once, all complaints together, frozen.

Standard library only: the command line, the device half and the tests import it without torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from exporter.build_options import (
    DEFAULT_OPTIONS,
    BuildOptions,
)
from exporter.pixel_input import Layout
from exporter.profiles import BatchProfile, SizeProfile
from models.registry import public_repository
from models.variants import Variant

E = TypeVar("E", bound=Enum)


class Precision(str, Enum):
    """Data type of the convolutions in the engine."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"

    def __str__(self) -> str:
        return self.value

    @property
    def is_quantized(self) -> bool:
        """Whether it needs scales, and calibration images to find them."""
        return self in (Precision.INT8, Precision.FP8)


class Recipe(str, Enum):
    """The rungs of the INT8 ladder, from plain to full (calibration.recipe.Recipe), or all."""

    MINMAX = "minmax"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"
    EQUALIZE = "equalize"
    FULL = "full"
    WIDE = "wide"
    AUTO = "auto"

    def __str__(self) -> str:
        return self.value


DEFAULT_BATCH = BatchProfile(1, 8, 32)
RANDOM = "random"
HUB = "hub"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSpec:
    """One export, valid as far as that can be told without reading the files.

    ``variant`` is None for a network of the caller's own, which ``name`` then names.
    ``dynamic_size`` leaves height and width open, within that profile.
    ``weights`` is None (the bundled checkpoint), ``random``, ``hub``, ``hub@<commit>`` or a path.
    ``target`` is still text, because which targets exist is the backend's knowledge.
    ``preprocess`` is ``imagenet``, a JSON file, or None (the checkpoint's own, else ImageNet's).
    ``with_preprocess`` puts normalization into the graphs, which then take uint8 pixels.
    ``recipe`` None is the best that the graph allows; ``keep_float`` names nodes that stay float.
    ``min_sqnr_db`` and ``min_agreement`` replace the default gate of the precision stage;
    ``max_drop`` adds one, in points of top-1. At int8, ``min_sqnr_db`` and ``max_drop`` keep as
    many layers in half as they need. ``power_of_two`` binds equalization's scales;
    ``calibration_table`` is that of an earlier run, to be used again.
    """

    variant: Variant | None
    precision: Precision
    out: Path
    name: str = ""
    weights: str | None = None
    calibration: Path | None = None
    calibration_images: int = 512
    evaluation: Path | None = None
    evaluation_images: int = 512
    recipe: Recipe | None = None
    keep_float: tuple[str, ...] = ()
    target: str | None = None
    backend: str = "auto"
    batch: BatchProfile = DEFAULT_BATCH
    image_size: tuple[int, int] | None = None
    dynamic_size: SizeProfile | None = None
    preprocess: str | None = None
    with_preprocess: Layout | None = None
    skip_bad_images: bool = False
    min_sqnr_db: float | None = None
    min_agreement: float | None = None
    max_drop: float | None = None
    per_tensor_weights: bool = False
    power_of_two: bool = False
    calibration_table: Path | None = None
    build: BuildOptions = DEFAULT_OPTIONS
    workspace_mib: int | None = None

    @property
    def title(self) -> str:
        """The network's name for people: ``RepVGG-A0``, or the class of the caller's own."""
        return f"RepVGG-{self.variant.name}" if self.variant else self.name

    def to_json(self) -> dict[str, Any]:
        """Everything that was asked for, as the manifest records it."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            values[item.name] = list(value) if isinstance(value, tuple) else value
        values["name"] = self.title
        values["build"] = self.build.to_json()
        values["variant"] = self.variant.name if self.variant else None
        for key in ("precision", "batch"):
            values[key] = str(values[key])
        for key in (
            "recipe",
            "with_preprocess",
            "out",
            "calibration",
            "calibration_table",
            "evaluation",
            "dynamic_size",
        ):
            values[key] = None if values[key] is None else str(values[key])
        return values


def choice(kind: type[E], what: str, text: str) -> E:
    """The member of ``kind`` with this value, ignoring case.

    Raises:
        ValueError: with the nearest and all known values.
    """
    known = [str(member.value) for member in kind]
    wanted = text.strip().lower()
    if wanted in known:
        return kind(wanted)
    nearest = difflib.get_close_matches(wanted, known, n=1, cutoff=0.3)
    hint = f"nearest: {nearest[0]}; " if nearest else ""
    raise ValueError(f"unknown {what} {text!r} ({hint}known: {', '.join(known)})")


def weights_advice(variant: Variant) -> str:
    """How to pass trained weights for ``variant``, in one clause."""
    hub = f" or --weights hub ({public_repository(variant.name)})"
    return f"--weights path/to/checkpoint{hub if public_repository(variant.name) else ''}"
