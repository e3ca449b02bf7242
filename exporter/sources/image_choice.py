"""Which folders an export looks at, decided before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import InputError
from exporter.spec import HUB, RANDOM, ExportSpec
from models.registry import BundledWeights, bundled_weights

BUNDLED = "bundled"


def weights_kind(spec: ExportSpec) -> str:
    """Where the weights come from: ``bundled``, ``random``, ``hub``, ``file`` or ``module``."""
    if spec.variant is None or spec.weights == "module":
        return "module"
    if spec.weights is None:
        return BUNDLED
    if spec.weights == RANDOM:
        return RANDOM
    return HUB if spec.weights.partition("@")[0] == HUB else "file"


def calibration_root(spec: ExportSpec) -> tuple[Path, str] | None:
    """The folder of the images that decide the scales, and what it is in words.

    None where nobody named any: other networks' images are no use.
    """
    if spec.calibration is not None:
        return spec.calibration, f"folder {spec.calibration}"
    if weights_kind(spec) in (BUNDLED, RANDOM):
        return bundled_images().calibration_images, "bundled training images"
    return None


def evaluation_root(spec: ExportSpec) -> tuple[Path, str, tuple[str, ...]]:
    """The folder of the images to compare on, what it is, and notes on what they can show.

    The user's evaluation folder, else the bundled test images for the bundled network, else the
    calibration folder, else the bundled test images (good enough for float arithmetic, and said).
    """
    kind = weights_kind(spec)
    if spec.evaluation is not None:
        return spec.evaluation, f"folder {spec.evaluation}", ()
    if spec.calibration is not None and kind != BUNDLED:
        note = "parity is measured on the calibration images; pass --evaluation for held-out ones"
        return spec.calibration, f"calibration folder {spec.calibration}", (note,)
    notes: tuple[str, ...] = ()
    if kind != BUNDLED:
        notes = (
            "parity is measured on the bundled digit images, which are not this network's kind; "
            "pass --evaluation",
        )
    return bundled_images().test_images, "bundled test images", notes


def judges_answers(spec: ExportSpec) -> bool:
    """Whether the evaluation images' folders can be the network's classes: not another network's.

    The bundled images have ten, and so may any network.
    """
    named = spec.evaluation is not None or spec.calibration is not None
    return named or weights_kind(spec) == BUNDLED


def bundled_images() -> BundledWeights:
    """The images that come with this project.

    Raises:
        InputError: if they were not installed.
    """
    bundled = bundled_weights("A0")
    if bundled is None:
        raise InputError("this installation has no bundled images: pass --calib and --evaluation")
    return bundled
