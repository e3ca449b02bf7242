"""From what was typed to an :class:`ExportSpec`: every complaint at once.

Standard library only: the command line and the tests import it without torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from exporter.build_options import BuildOptions, Dla, HardwareCompatibility, Quantization, Typing
from exporter.errors import InvalidRequestError
from exporter.pixel_input import Layout
from exporter.profiles import BatchProfile, SizeProfile, parse_image_size
from exporter.spec import (
    DEFAULT_BATCH,
    HUB,
    RANDOM,
    ExportSpec,
    Precision,
    Recipe,
    choice,
    weights_advice,
)
from models.registry import bundled_weights, public_repository
from models.variants import TOTAL_STRIDE, Variant, find_variant

T = TypeVar("T")
_NO_DLA = "--with-preprocess normalizes in float32, which no DLA does: leave --no-gpu-fallback away"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What was typed, unchecked. The defaults are those of :class:`ExportSpec`."""

    model: str
    precision: str = "int8"
    weights: str | None = None
    calibration: str | None = None
    calibration_images: int = 512
    evaluation: str | None = None
    evaluation_images: int = 512
    recipe: str | None = None
    keep_float: str | None = None
    target: str | None = None
    backend: str = "auto"
    batch: str | None = None
    image_size: str | None = None
    dynamic_size: str | None = None
    preprocess: str | None = None
    with_preprocess: str | None = None
    out: str | None = None
    skip_bad_images: bool = False
    min_sqnr_db: float | None = None
    min_agreement: float | None = None
    max_drop: float | None = None
    per_tensor_weights: bool = False
    power_of_two: bool = False
    calibration_table: str | None = None
    typing: str = "auto"
    quantization: str = "auto"
    dla: int | None = None
    gpu_fallback: bool = True
    calibration_cache: str | None = None
    timing_cache: str | None = None
    optimization_level: int | None = None
    hardware_compatibility: str = "none"
    version_compatible: bool = False
    allow_emulated: bool = False
    workspace_mib: int | None = None


def validate(request: ExportRequest, network: Variant | str | None = None) -> ExportSpec:
    """Turn what was typed into a spec.

    ``network`` is the variant, or else the name, of a network which the caller has already,
    weights included; without it ``request.model`` and ``request.weights`` decide.

    Raises:
        InvalidRequestError: everything that is wrong with the request, not only the first thing.
    """
    complaints: list[str] = []

    def parsed(parse: Callable[[], T]) -> T | None:
        try:
            return parse()
        except ValueError as error:
            complaints.append(str(error))
            return None

    precision = parsed(lambda: choice(Precision, "precision", request.precision))
    wanted = request.recipe
    recipe = parsed(lambda: choice(Recipe, "recipe", wanted)) if wanted is not None else None
    layout = request.with_preprocess
    pixels = parsed(lambda: choice(Layout, "layout", layout)) if layout is not None else None
    if pixels is not None and request.dla is not None and not request.gpu_fallback:
        complaints.append(_NO_DLA)
    if request.dla is None and not request.gpu_fallback:
        complaints.append("--no-gpu-fallback belongs to --dla")
    build = parsed(lambda: _build_options(request))
    batch = parsed(lambda: BatchProfile.parse(request.batch or str(DEFAULT_BATCH)))
    size = request.image_size
    image_size = parsed(lambda: parse_image_size(size)) if size is not None else None
    dynamic = request.dynamic_size
    dynamic_size = parsed(lambda: SizeProfile.parse(dynamic)) if dynamic is not None else None
    variant = network if isinstance(network, Variant) else None
    name = network if isinstance(network, str) else ""
    if network is None:
        variant = parsed(lambda: find_variant(request.model))
        if variant is not None:
            complaints += _weights_complaints(request.weights, variant)
    if variant is not None and dynamic_size is not None:
        complaints += _dynamic_size_complaints(dynamic_size, image_size)
    complaints += _number_complaints(request)
    if precision is not None:
        complaints += _quantized_complaints(request, precision)
    if complaints or precision is None or batch is None or build is None:
        raise InvalidRequestError(complaints)
    return ExportSpec(
        variant=variant,
        name=name,
        precision=precision,
        out=Path(request.out or f"build/{variant.name if variant else name}-{precision}"),
        weights=request.weights,
        calibration=Path(request.calibration) if request.calibration else None,
        calibration_images=request.calibration_images,
        evaluation=Path(request.evaluation) if request.evaluation else None,
        evaluation_images=request.evaluation_images,
        recipe=recipe,
        keep_float=_names(request.keep_float),
        target=request.target,
        backend=request.backend,
        batch=batch,
        image_size=image_size,
        dynamic_size=dynamic_size,
        preprocess=request.preprocess,
        with_preprocess=pixels,
        skip_bad_images=request.skip_bad_images,
        min_sqnr_db=request.min_sqnr_db,
        min_agreement=request.min_agreement,
        max_drop=request.max_drop,
        per_tensor_weights=request.per_tensor_weights,
        power_of_two=request.power_of_two,
        calibration_table=Path(request.calibration_table) if request.calibration_table else None,
        build=build,
        workspace_mib=request.workspace_mib,
    )


def absences(request: ExportRequest) -> list[str]:
    """A clause for each folder and file of images, preprocessing and scales that is not there.

    Only whether it is there: what it holds is for the stage that reads it.
    """
    complaints = []
    for folder in filter(None, (request.calibration, request.evaluation)):
        if not Path(folder).is_dir():
            what = "is not a folder" if Path(folder).exists() else "does not exist"
            complaints.append(f"image folder {folder} {what}")
    files = {
        "preprocess file": None if request.preprocess == "imagenet" else request.preprocess,
        "calibration table": request.calibration_table,
        "calibration cache": request.calibration_cache,
    }
    for what, file in files.items():
        if file and not Path(file).is_file():
            complaints.append(f"{what} {file} does not exist or is no file")
    return complaints


def _build_options(request: ExportRequest) -> BuildOptions:
    dla = None
    if request.dla is not None:
        dla = Dla(core=request.dla, gpu_fallback=request.gpu_fallback)
    wanted = request.hardware_compatibility
    return BuildOptions(
        typing=choice(Typing, "typing", request.typing),
        quantization=choice(Quantization, "quantization", request.quantization),
        dla=dla,
        calibration_cache=Path(request.calibration_cache) if request.calibration_cache else None,
        timing_cache=Path(request.timing_cache) if request.timing_cache else None,
        optimization_level=request.optimization_level,
        hardware_compatibility=choice(HardwareCompatibility, "hardware compatibility", wanted),
        version_compatible=request.version_compatible,
        allow_emulated=request.allow_emulated,
    )


def _names(text: str | None) -> tuple[str, ...]:
    """A comma-separated list, spaces and repetitions removed."""
    parts = (part.strip() for part in (text or "").split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def _weights_complaints(weights: str | None, variant: Variant) -> list[str]:
    if weights is None and bundled_weights(variant.name) is None:
        return [
            f"no weights are bundled for {variant.name}: pass {weights_advice(variant)}; "
            "--weights random exports an untrained network"
        ]
    name, at, revision = str(weights).partition("@")
    if name == HUB:
        complaints = []
        if public_repository(variant.name) is None:
            advice = weights_advice(variant)
            complaints.append(f"no public weights are known for {variant.name}: pass {advice}")
        if at and not _COMMIT.fullmatch(revision):
            complaints.append(f"weights {weights}: {revision!r} is no full 40-digit commit hash")
        return complaints
    if weights not in (None, RANDOM) and not Path(str(weights)).is_file():
        return [f"checkpoint {weights} does not exist or is no file"]
    return []


def _dynamic_size_complaints(profile: SizeProfile, image_size: tuple[int, int] | None) -> list[str]:
    complaints = []
    if min(profile.height[0], profile.width[0]) < TOTAL_STRIDE:
        complaints.append(
            f"dynamic size {profile} begins below {TOTAL_STRIDE}, the network's total stride"
        )
    if image_size is not None and not profile.holds(*image_size):
        complaints.append(
            f"image size {image_size[0]}x{image_size[1]} is outside dynamic size {profile}"
        )
    return complaints


_OWNERS = {
    "int8": (
        "recipe",
        "power_of_two",
        "calibration_table",
        "quantization",
        "calibration_cache",
        "allow_emulated",
    ),
    "int8 and fp8": ("keep_float", "per_tensor_weights"),
}


def _quantized_complaints(request: ExportRequest, precision: Precision) -> list[str]:
    """What only a quantized precision can obey must not be dropped in silence."""
    known = ExportRequest.__dataclass_fields__
    complaints = []
    for owners, names in _OWNERS.items():
        given = [
            f"--{name.replace('_', '-')}"
            for name in names
            if getattr(request, name) not in (known[name].default, "")
        ]
        if given and str(precision) not in owners.split(" and "):
            verb = "belongs" if len(given) == 1 else "belong"
            complaints.append(f"{', '.join(given)} {verb} to {owners}, not to {precision}")
    return complaints


def _number_complaints(request: ExportRequest) -> list[str]:
    complaints = []
    for name in ("calibration_images", "evaluation_images", "workspace_mib"):
        value = getattr(request, name)
        if value is not None and value < 1:
            complaints.append(f"{name.replace('_', ' ')} must be at least 1, not {value}")
    if request.min_sqnr_db is not None and not math.isfinite(request.min_sqnr_db):
        complaints.append(f"min sqnr must be a finite number of dB, not {request.min_sqnr_db:g}")
    if request.min_agreement is not None and not 0 <= request.min_agreement <= 1:
        complaints.append(f"min agreement must be in [0, 1], not {request.min_agreement:g}")
    if request.max_drop is not None and not 0 <= request.max_drop <= 100:
        complaints.append(f"max drop must be 0 to 100 points of top-1, not {request.max_drop:g}")
    return complaints
