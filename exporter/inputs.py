"""Everything an export looks at: the network, its preprocessing, the images."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.images import Preprocess
from exporter.errors import InputError
from exporter.image_set import FolderImages, ImageSet
from exporter.source import Source, load_network
from exporter.spec import RANDOM, ExportSpec, Precision
from models.registry import BundledWeights, bundled_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The trained network and every image that the run looks at."""

    source: Source
    preprocess: Preprocess
    evaluation: ImageSet
    calibration: ImageSet | None
    notes: tuple[str, ...] = ()


def prepare(
    spec: ExportSpec, source: Source | None = None, calibration: ImageSet | None = None
) -> Inputs:
    """Load the network and find the images that ``spec`` names.

    ``source`` and ``calibration`` replace what would be loaded; parity is then measured on
    ``calibration`` too, unless ``spec`` names an evaluation folder.
    """
    source = source or load_network(spec)
    preprocess = choose_preprocess(spec, source)
    if calibration is None and spec.precision is Precision.INT8:
        calibration = calibration_images(spec, source, preprocess)
    elif calibration is not None and spec.evaluation is None:
        note = (
            "parity is measured on the calibration arrays, which the caller preprocessed; the "
            "manifest's preprocess is only what was passed as such"
        )
        return Inputs(
            source=source,
            preprocess=preprocess,
            evaluation=calibration,
            calibration=calibration,
            notes=(note,),
        )
    evaluation, notes = evaluation_images(spec, source, preprocess)
    return Inputs(
        source=source,
        preprocess=preprocess,
        evaluation=evaluation,
        calibration=calibration,
        notes=notes,
    )


def choose_preprocess(spec: ExportSpec, source: Source) -> Preprocess:
    """The user's preprocessing, else the checkpoint's own, else ImageNet's; ``image_size`` wins.

    Raises:
        InputError: if the preprocessing file is missing or wrong.
    """
    if spec.preprocess is None:
        chosen = source.preprocess or Preprocess()
    elif spec.preprocess == "imagenet":
        chosen = Preprocess()
    else:
        path = Path(spec.preprocess)
        try:
            data = json.loads(path.read_text("utf-8"))
            chosen = Preprocess.from_json(data.get("preprocess", data))
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"preprocess file {path} cannot be used: {error}") from error
    return replace(chosen, image_size=spec.image_size) if spec.image_size else chosen


def calibration_images(spec: ExportSpec, source: Source, preprocess: Preprocess) -> FolderImages:
    """The images that decide the INT8 scales; never random data.

    Raises:
        InputError: if there are none, or the folder cannot be used.
    """
    if spec.calibration is not None:
        root, words = spec.calibration, f"folder {spec.calibration}"
    elif source.origin["source"] in ("bundled", RANDOM):
        root, words = _bundled_images().calibration_images, "bundled training images"
    else:
        raise InputError(
            "int8 needs calibration images of the kind the network was trained on: pass "
            "CALIB=folder (50 to 500 images)"
        )
    return _open(spec, root, preprocess, words, spec.calibration_images)


def evaluation_images(
    spec: ExportSpec, source: Source, preprocess: Preprocess
) -> tuple[FolderImages, tuple[str, ...]]:
    """The real images on which all stages are compared, and notes on what they can show.

    The user's evaluation folder, else the bundled test images for the bundled network, else the
    calibration folder, else the bundled test images (good enough for float arithmetic, and said).
    """
    notes: tuple[str, ...] = ()
    if spec.evaluation is not None:
        root, words = spec.evaluation, f"folder {spec.evaluation}"
    elif spec.calibration is not None and source.origin["source"] != "bundled":
        root, words = spec.calibration, f"calibration folder {spec.calibration}"
        notes = (
            "parity is measured on the calibration images; pass --evaluation for held-out ones",
        )
    else:
        root, words = _bundled_images().test_images, "bundled test images"
        if source.origin["source"] != "bundled":
            notes = (
                "parity is measured on the bundled digit images, which are not this network's "
                "kind; pass --evaluation",
            )
    return _open(spec, root, preprocess, words, spec.evaluation_images), notes


def _bundled_images() -> BundledWeights:
    bundled = bundled_weights("A0")
    if bundled is None:
        raise InputError("this installation has no bundled images: pass CALIB= and --evaluation")
    return bundled


def _open(
    spec: ExportSpec, root: Path, preprocess: Preprocess, description: str, count: int
) -> FolderImages:
    return FolderImages.open(
        root, preprocess, description, count=count, skip_bad=spec.skip_bad_images
    )
