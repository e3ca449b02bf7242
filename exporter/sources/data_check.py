"""Are these the images to calibrate with? Asked once, before INT8 decides anything by them.

Two witnesses answer. The images themselves (``calibration.lint``): too few, copies, blank, pixels
that are not what the preprocessing says. And the network (``models.training_statistics``): its
first BatchNorms remember how the training images were prepared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from calibration.data_report import DataReport, Finding
from calibration.images import ImageDataError, Preprocess
from calibration.lint import Linter
from calibration.pixel_checks import SCALE_CODES
from exporter.errors import InputError
from exporter.running.image_set import FolderImages, ImageSet
from exporter.running.onnx_runner import BATCH_SIZE, FloatArray
from exporter.sources.source import Source
from exporter.spec import RANDOM
from models.training_statistics import (
    NORMALIZATIONS,
    Hypothesis,
    TrainingFit,
    fit_training_statistics,
    normalization,
)

SAMPLE_IMAGES = 64
"""Images shown to the network: more do not bring the distance of the right preprocessing down."""
_SAMPLE_BYTES = 20 * 2**20
_LEAST_SAMPLE = 16
_RECORDED = "recorded"
_UNKNOWN = normalization("unknown", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """What both witnesses found; ``training`` is None where the network cannot tell."""

    report: DataReport
    training: TrainingFit | None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What makes calibration meaningless."""
        return self.report.errors

    @property
    def notes(self) -> tuple[str, ...]:
        """The warnings as sentences, for the user and the manifest."""
        return tuple(f"calibration images: {finding.message}" for finding in self.report.warnings)

    def to_json(self) -> dict[str, Any]:
        """What the manifest records: findings, figures, and D of each preprocessing tried."""
        fit = self.training
        training = fit and {
            "images": fit.images,
            "given": fit.given,
            "best": fit.best.name,
            "distances": dict(fit.distances),
        }
        return {**self.report.to_json(), "training_statistics": training}


def check_calibration(
    images: ImageSet,
    source: Source,
    preprocess: Preprocess | None,
    class_names: Sequence[str] | None = None,
) -> DataCheck:
    """Read ``images`` once and judge them; what is wrong is in the result, not raised.

    ``source`` has the network in the form in which it was trained. ``preprocess`` is what made the
    images, or None where that is not known (a folder's own wins). ``class_names`` are the network's
    classes where sub-folders are named so.

    Raises:
        InputError: naming an image that cannot be read.
    """
    folder = images.folder if isinstance(images, FolderImages) else None
    if isinstance(images, FolderImages):
        preprocess = images.preprocess
    linter, sample = Linter(preprocess), _Sample(images.count)
    for batch in images.batches():
        linter.add(*batch)
        if len(batch) == 1:
            sample.add(batch[0])
    try:
        report = linter.report(folder, class_names)
    except ImageDataError as error:
        raise InputError(str(error)) from error
    fit = None
    # An untrained network's BatchNorms remember nothing.
    if source.origin["source"] != RANDOM and not report.errors:
        fit = _fit(source, sample, _made_by(report, preprocess))
    more: Iterable[Finding] = ()
    if fit:
        more = _training_findings(fit, from_files=folder is not None)
    report = DataReport.of((*report.findings, *more), report.figures)
    return DataCheck(report=report, training=fit)


def require_usable(check: DataCheck) -> None:
    """Refuse images that would make calibration meaningless.

    Raises:
        InputError: with every error found.
    """
    if check.errors:
        raise InputError("; ".join(finding.message for finding in check.errors))


class _Sample:
    """Some of the pictures, evenly spread over all, so that every class of a folder is in."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._seen = 0
        self._room = 0
        self.images: list[FloatArray] = []

    def add(self, batch: FloatArray) -> None:
        """Keep what is due of one batch, if it is one of pictures ``[n, 3, H, W]``."""
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.size:
            return
        # Sizes may differ where they are free; the first one decides how many there is room for.
        self._room = self._room or max(_SAMPLE_BYTES // batch[0].nbytes, _LEAST_SAMPLE)
        room = min(self._room, SAMPLE_IMAGES, self._count)
        for index, image in enumerate(batch, start=self._seen):
            if index * room % self._count < room:
                self.images.append(image.copy())
        self._seen += len(batch)

    def batches(self) -> Iterator[torch.Tensor]:
        """The pictures, those of one size together."""
        sizes = sorted({image.shape for image in self.images})
        for size in sizes:
            same = [image for image in self.images if image.shape == size]
            for start in range(0, len(same), BATCH_SIZE):
                yield torch.from_numpy(np.stack(same[start : start + BATCH_SIZE]))


def _made_by(report: DataReport, preprocess: Preprocess | None) -> Hypothesis | None:
    """The normalization that made the values: the known one if they fit it, else by their range.

    Pictures have dark and light spots, so that their values fill at least half of the range.
    """
    low, high = report.figures.low, report.figures.high
    contradicted = any(finding.code in SCALE_CODES for finding in report.findings)
    if preprocess is not None and not contradicted:
        known = normalization("known", preprocess.mean, preprocess.std)
        if _share_of_range(known, low, high) is not None:
            return known
    imagenet, unit, symmetric, raw, centred = NORMALIZATIONS
    for candidate in (unit, symmetric, imagenet, raw, centred):
        if (_share_of_range(candidate, low, high) or 0) >= 0.5:
            return candidate
    return None


def _share_of_range(made_by: Hypothesis, low: float, high: float) -> float | None:
    """How much of its range the values fill; None if they leave it."""
    pairs = list(zip(made_by.mean, made_by.std, strict=True))
    least, most = min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)
    slack = 0.01 * (most - least)
    within = least - slack <= low and high <= most + slack
    return (high - low) / (most - least) if within else None


def _fit(source: Source, sample: _Sample, made_by: Hypothesis | None) -> TrainingFit | None:
    if made_by is None:
        made_by, candidates = _UNKNOWN, ()
    else:
        recorded = source.preprocess
        own = (normalization(_RECORDED, recorded.mean, recorded.std),) if recorded else ()
        candidates = (*own, *NORMALIZATIONS)
    return fit_training_statistics(
        source.module,
        sample.batches(),
        mean=made_by.mean,
        std=made_by.std,
        candidates=candidates,
    )


def _training_findings(fit: TrainingFit, *, from_files: bool) -> Iterator[Finding]:
    mistake = fit.mistake
    if mistake is not None:
        distance = fit.distances[mistake.name]
        yield Finding(
            "wrong-preprocessing",
            "warning",
            f"the network's own BatchNorm statistics fit these images {fit.times_better:.0f} times "
            f"better {_words(mistake)} ({distance:.2g} against {fit.given:.2g} nats a "
            f"channel): {_advice(mistake, from_files=from_files)}",
        )
    elif fit.foreign:
        yield Finding(
            "unlike-training",
            "warning",
            "the network's own BatchNorm statistics say that it was trained on other images or "
            f"with another preprocessing ({fit.given:.2g} nats a channel; 0.05 is usual): check "
            "both",
        )


_NAMES = {
    "imagenet": "with ImageNet's mean and std",
    "unit": "on [0, 1], not normalized",
    "symmetric": "on [-1, 1], with mean 0.5 and std 0.5",
    "bytes": "on 0..255, not normalized",
    "centred-bytes": "on 0..255 less ImageNet's mean",
    _RECORDED: "with the mean and std that came with the network",
}


def _words(mistake: Hypothesis) -> str:
    """How the network was trained, as far as that is not how the images were made."""
    order = ["in blue-green-red order"] if mistake.swapped else []
    scale = [_NAMES[mistake.normalization]] if mistake.normalization in _NAMES else []
    return " and ".join(order + scale)


def _advice(mistake: Hypothesis, *, from_files: bool) -> str:
    if not from_files:
        return "pass arrays that are prepared so"
    if mistake.swapped:
        return "pass arrays that are prepared so from Python, as exporter.export(calibration=...)"
    if mistake.name == "imagenet":
        return "pass --preprocess imagenet"
    mean, std = (
        [float(f"{value:.6g}") for value in values] for values in (mistake.mean, mistake.std)
    )
    return f'pass --preprocess FILE in which "mean" is {mean} and "std" {std}'
