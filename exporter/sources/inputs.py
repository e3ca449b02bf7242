"""Everything an export looks at: the network, its preprocessing, the images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from calibration.images import Preprocess
from exporter.errors import InputError
from exporter.files.text_file import read_json
from exporter.network import Interface, classifier_interface
from exporter.running.image_set import ArrayImages, FolderImages, ImageSet
from exporter.running.spread import Spread
from exporter.sources.custom import require_fitting
from exporter.sources.data_check import DataCheck, check_calibration, require_usable
from exporter.sources.image_choice import (
    BUNDLED,
    calibration_root,
    evaluation_root,
    judges_answers,
)
from exporter.sources.source import Source, load_network
from exporter.spec import RANDOM, ExportSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The trained network and every image that the run looks at.

    ``preprocess`` is None where the network's input is no image ``[N, 3, H, W]``. ``data`` is what
    the calibration images look like; None without them.
    """

    source: Source
    interface: Interface
    preprocess: Preprocess | None
    evaluation: ImageSet
    calibration: ImageSet | None
    data: DataCheck | None = None
    notes: tuple[str, ...] = ()


def prepare(
    spec: ExportSpec,
    source: Source | None = None,
    calibration: ImageSet | None = None,
    evaluation: ImageSet | None = None,
    *,
    spread: Spread | None = None,
) -> Inputs:
    """Load the network and find the images that ``spec`` names.

    ``source``, ``calibration`` and ``evaluation`` replace what would be loaded; without evaluation
    images parity is measured on ``calibration``. ``spread`` helps to look at folders of images.

    Raises:
        InputError: if something cannot be loaded, or the calibration images cannot decide scales.
    """
    source = source or load_network(spec)
    preprocess = choose_preprocess(spec, source)
    notes: tuple[str, ...] = ()
    arrays_note = (
        "parity is measured on the calibration arrays, which the caller preprocessed; the "
        "manifest's preprocess is only what was passed as such"
    )
    if evaluation is None and calibration is not None and spec.evaluation is None:
        evaluation, notes = calibration, (arrays_note,)
    # Trained scales need no images, and neither need the clip values of a table.
    known = source.trained is not None or spec.calibration_table is not None
    own = source.origin["source"] in (BUNDLED, RANDOM)
    needed = spec.calibration is not None or not known or (own and source.trained is None)
    if calibration is None and spec.precision.is_quantized and needed:
        calibration = calibration_images(spec, _required(preprocess, "calibration"), spread)
    if evaluation is None:
        evaluation, notes = evaluation_images(spec, _required(preprocess, "evaluation"), spread)
    interface = source.interface or _variant_interface(spec, source, preprocess)
    for what, images in (("calibration", calibration), ("evaluation", evaluation)):
        if isinstance(images, ArrayImages):
            require_fitting(images.chunks, what, interface.inputs)
    notes += _label_notes(evaluation, source, interface)
    data = None
    if spec.precision.is_quantized and calibration is not None:
        # ImageNet's is a guess where the caller prepared the arrays and does not say how.
        stated = preprocess if spec.preprocess or source.preprocess else None
        data = check_calibration(calibration, source, stated, source.class_names)
        require_usable(data)
        notes += data.notes
    return Inputs(
        source=source,
        interface=interface,
        preprocess=preprocess,
        evaluation=evaluation,
        calibration=calibration,
        data=data,
        notes=notes,
    )


def _variant_interface(
    spec: ExportSpec, source: Source, preprocess: Preprocess | None
) -> Interface:
    size = _required(preprocess, "calibration").image_size
    return classifier_interface(size, source.origin["num_classes"], spec.dynamic_size)


def _required(preprocess: Preprocess | None, what: str) -> Preprocess:
    if preprocess is None:
        raise InputError(
            f"the network's inputs are not one image [N, 3, H, W]: pass {what}= arrays, a tuple of "
            "them for several inputs"
        )
    return preprocess


def choose_preprocess(spec: ExportSpec, source: Source) -> Preprocess | None:
    """The user's preprocessing, else the checkpoint's own, else ImageNet's; ``image_size`` wins.

    None for a network that takes no single image.

    Raises:
        InputError: if the preprocessing file is missing or wrong.
    """
    size = spec.image_size
    if source.interface is not None:
        size = source.interface.image_size
        if size is None:
            return None
    if spec.preprocess is None:
        chosen = source.preprocess or Preprocess()
    elif spec.preprocess == "imagenet":
        chosen = Preprocess()
    else:
        path = Path(spec.preprocess)
        try:
            data = read_json(path)
            chosen = Preprocess.from_json(data.get("preprocess", data))
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"preprocess file {path} cannot be used: {error}") from error
    dynamic = spec.dynamic_size
    if size is None and dynamic is not None:
        size = (dynamic.height[1], dynamic.width[1])
    return replace(chosen, image_size=size) if size else chosen


def calibration_images(
    spec: ExportSpec, preprocess: Preprocess, spread: Spread | None = None
) -> FolderImages:
    """The images that decide the scales; never random data.

    Raises:
        InputError: if there are none, or the folder cannot be used.
    """
    found = calibration_root(spec)
    if found is None:
        raise InputError(
            f"{spec.precision} needs calibration images of the kind the network was trained on: "
            "pass --calib folder (50 to 500 images)"
        )
    root, words = found
    return _open(spec, root, preprocess, words, count=spec.calibration_images, spread=spread)


def evaluation_images(
    spec: ExportSpec, preprocess: Preprocess, spread: Spread | None = None
) -> tuple[FolderImages, tuple[str, ...]]:
    """The real images on which all stages are compared, and notes on what they can show.

    Raises:
        InputError: if the folder cannot be used.
    """
    root, words, notes = evaluation_root(spec)
    images = _open(spec, root, preprocess, words, count=spec.evaluation_images, spread=spread)
    return replace(images, labelled=judges_answers(spec)), notes


def _label_notes(images: ImageSet, source: Source, interface: Interface) -> tuple[str, ...]:
    """Class folders that are of no use must not be missed in silence."""
    count = interface.num_classes
    if not isinstance(images, FolderImages) or not images.labelled or count is None:
        return ()
    names = images.folder.label_names()
    if names is None or images.labels(source.class_names, count) is not None:
        return ()
    return (
        f"no top-1: the images to compare on lie in folders of {len(set(names))} classes, which "
        f"are not the network's {count}",
    )


def _open(
    spec: ExportSpec,
    root: Path,
    preprocess: Preprocess,
    description: str,
    *,
    count: int,
    spread: Spread | None,
) -> FolderImages:
    return FolderImages.open(
        root,
        preprocess,
        description,
        count=count,
        skip_bad=spec.skip_bad_images,
        spread=spread,
    )
