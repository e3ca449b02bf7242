"""The data-set linter: what is wrong with the images, before INT8 is calibrated on them.

One pass over what the network will receive finds too few images, copies, blank pictures, one-sided
classes and, where the preprocessing is known, pixels that are not what it says (``pixel_checks``).
Good images of another kind than ImageNet's give no finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from calibration import pixel_checks
from calibration.data_report import DataReport, Figures, Finding
from calibration.image_statistics import (
    ColourStatistics,
    ImageRecord,
    PooledColour,
    measure,
    pool,
)
from calibration.images import FloatArray, ImageDataError, ImageFolder, Preprocess

LEAST_IMAGES = 8
"""Fewer distinct pictures say nothing about the range of an activation."""
ENOUGH_IMAGES = 32
"""From 20 to 50 real images on, calibration hardly gains from more."""
TOLERATED = 0.1
"""The share of copies, blank or badly sized pictures that does no harm."""
ONE_SIDED = 0.5
"""The share of one class, among at least four, beyond which the images are one-sided."""
ENLARGED = 2
"""A picture is tiny if it must be enlarged by more than this both ways."""
CROPPED = 3
"""A picture is cropped away if it is that many times longer than the network's input."""


class Linter:
    """Takes batches in, in any grouping and order, and reports on all of them.

    ``preprocess`` is what made the batches, or None where that is not known.
    """

    def __init__(self, preprocess: Preprocess | None = None) -> None:
        self._preprocess = preprocess
        self._records: list[ImageRecord] = []

    def add(self, *arrays: FloatArray) -> None:
        """Measure one batch: float32 ``[n, ...]`` for each input of the network."""
        self._records += measure(arrays, self._preprocess)

    def report(
        self, folder: ImageFolder | None = None, class_names: Sequence[str] | None = None
    ) -> DataReport:
        """Everything found; ``folder`` is where the batches came from, for sizes and labels.

        Raises:
            ImageDataError: naming the file of ``folder`` that cannot be read.
        """
        seen = _Seen(tuple(self._records), self._preprocess, folder)
        figures = _figures(seen)
        findings = [
            *_count_findings(figures, seen.distinct),
            *_pixel_findings(seen),
            *_size_findings(figures, self._preprocess),
            *_class_findings(seen.classes, class_names),
        ]
        return DataReport.of(findings, figures)


@dataclass(frozen=True)
class _Seen:
    """All records, and what follows from them."""

    records: tuple[ImageRecord, ...]
    preprocess: Preprocess | None
    folder: ImageFolder | None

    @cached_property
    def distinct(self) -> int:
        return len({record.digest for record in self.records})

    @cached_property
    def usable(self) -> list[ImageRecord]:
        good = (record for record in self.records if record.finite and not record.constant)
        return list({record.digest: record for record in good}.values())

    @cached_property
    def colours(self) -> list[ColourStatistics]:
        return [record.colour for record in self.usable if record.colour is not None]

    @cached_property
    def pooled(self) -> PooledColour | None:
        return pool(self.colours, self.preprocess) if self.preprocess and self.colours else None

    @cached_property
    def classes(self) -> Counter[str]:
        """Images of each label; empty where there are no labels."""
        return Counter(self.folder.label_names() or ()) if self.folder else Counter()

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Width and height of each file, from its header alone."""
        sizes = []
        for path in self.folder.files if self.folder else ():
            try:
                with Image.open(path) as image:
                    sizes.append(image.size)
            except OSError as error:
                raise ImageDataError(f"image {path} cannot be read ({error})") from error
        return sizes


def _figures(seen: _Seen) -> Figures:
    finite = [record for record in seen.records if record.finite]
    optional: dict[str, Any] = {}
    if seen.pooled and seen.preprocess:
        optional |= pixel_checks.colour_figures(seen.colours, seen.pooled, seen.preprocess)
    if seen.sizes and seen.preprocess:
        target = seen.preprocess.image_size
        optional["tiny"] = sum(_is_tiny(size, target) for size in seen.sizes)
        optional["cropped"] = sum(_is_cropped(size, target) for size in seen.sizes)
    if seen.classes:
        optional["classes"] = len(seen.classes)
        optional["smallest_class"] = min(seen.classes.values())
        optional["largest_class"] = max(seen.classes.values())
    return Figures(
        images=len(seen.records),
        usable=len(seen.usable),
        duplicates=len(seen.records) - seen.distinct,
        constant=sum(record.constant for record in seen.records),
        not_finite=len(seen.records) - len(finite),
        low=min((record.low for record in finite), default=0.0),
        high=max((record.high for record in finite), default=0.0),
        **optional,
    )


def _is_tiny(size: tuple[int, int], target: tuple[int, int]) -> bool:
    (width, height), (target_height, target_width) = size, target
    return width * ENLARGED < target_width and height * ENLARGED < target_height


def _is_cropped(size: tuple[int, int], target: tuple[int, int]) -> bool:
    across, down = size[0] / target[1], size[1] / target[0]
    return max(across, down) > CROPPED * min(across, down)


def _count_findings(figures: Figures, distinct: int) -> Iterator[Finding]:
    images, usable = figures.images, figures.usable
    if figures.not_finite:
        text = f"{figures.not_finite} of {images} calibration images hold NaN or Inf: "
        yield Finding("not-finite", "error", text + "look for a division by zero where they arise")
    few = f"only {usable} of {images} calibration images are usable (distinct, finite, not blank)"
    if images > 1 and distinct == 1:
        text = f"all {images} calibration images are one and the same: pass different ones"
        yield Finding("identical-images", "error", text)
    elif usable < LEAST_IMAGES:
        text = f"{few}, and fewer than {LEAST_IMAGES} decide no INT8 range: pass 50 to 500"
        yield Finding("few-images", "error", text)
    elif usable < ENOUGH_IMAGES:
        text = f"{few}; INT8 ranges settle from about {ENOUGH_IMAGES} on: pass 50 to 500"
        yield Finding("few-images", "warning", text)
    if distinct > 1 and figures.duplicates > TOLERATED * images:
        text = f"{figures.duplicates} of {images} calibration images are copies of others"
        yield Finding("duplicates", "warning", f"{text}, which add nothing: leave them out")
    if figures.constant > TOLERATED * images:
        text = f"{figures.constant} of {images} calibration images are blank, of one colour"
        yield Finding("blank-images", "warning", f"{text}, and calibrate nothing: leave them out")


def _pixel_findings(seen: _Seen) -> Iterator[Finding]:
    """About the values; where their scale is wrong, statistics mean nothing."""
    if not seen.usable:
        return
    low = min(record.low for record in seen.usable)
    high = max(record.high for record in seen.usable)
    wrong_scale = pixel_checks.scale_mistake(low, high, seen.preprocess)
    if wrong_scale:
        yield wrong_scale
    elif seen.pooled and seen.preprocess:
        yield from pixel_checks.colour_mistakes(seen.colours, seen.pooled, seen.preprocess)


def _size_findings(figures: Figures, preprocess: Preprocess | None) -> Iterator[Finding]:
    if preprocess is None:
        return
    height, width = preprocess.image_size
    of_all = f"of {figures.images} calibration images are"
    if (figures.tiny or 0) > TOLERATED * figures.images:
        text = (
            f"{figures.tiny} {of_all} less than half the network's {width} x {height} pixels both "
            "ways, and enlarging blurs them: pass the originals"
        )
        yield Finding("tiny-images", "warning", text)
    if (figures.cropped or 0) > TOLERATED * figures.images:
        text = (
            f"{figures.cropped} {of_all} more than {CROPPED} times as long as the network's "
            f"{width} x {height} pixels, which see only their centre: cut them as for training"
        )
        yield Finding("cropped-away", "warning", text)


def _class_findings(counts: Counter[str], class_names: Sequence[str] | None) -> Iterator[Finding]:
    """What the labels say; sub-folders named like no class are taken for no labels."""
    names = set(class_names or counts)
    if not names & set(counts):
        return
    images = sum(counts.values())
    largest, most = min(counts.items(), key=lambda item: (-item[1], item[0]))
    missing = sorted(names - set(counts))
    if len(counts) == 1:
        text = f"all {images} calibration images lie in one sub-folder, {largest!r}: "
        advice = "if that is a class, pass images of the others too"
        yield Finding("single-class", "warning", text + advice)
        return
    if missing and images >= len(names):
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        text = f"{len(missing)} of {len(names)} classes have no calibration image ({some}): "
        yield Finding("missing-classes", "warning", text + "pass some of each")
    if len(names) >= 4 and most > ONE_SIDED * images:
        text = f"{most} of {images} calibration images are of one class, {largest!r}: "
        yield Finding("uneven-classes", "warning", text + "pass about as many of each")
