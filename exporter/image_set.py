"""Images for calibration and for parity: from a folder, or arrays that the caller preprocessed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from calibration.images import ImageDataError, ImageFolder, Preprocess, batches, unreadable
from exporter.errors import InputError
from exporter.onnx_runner import BATCH_SIZE, FloatArray

LabelArray = npt.NDArray[np.int64]


class ImageSet(Protocol):
    """Preprocessed images, batch by batch, and where they come from."""

    @property
    def description(self) -> str:
        """In words, for the report."""
        ...

    @property
    def count(self) -> int:
        """How many images there are."""
        ...

    def batches(self) -> Iterator[FloatArray]:
        """``[n, C, H, W]`` float32; raises InputError naming an image that cannot be read."""
        ...

    def labels(self, class_names: Sequence[str] | None, num_classes: int) -> LabelArray | None:
        """Class indices ``[count]``, or None where the images carry no usable labels."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What the manifest records, the sha256 of the data included."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderImages:
    """Image files through a Preprocess. ``skipped`` were unreadable and left out on request."""

    folder: ImageFolder
    preprocess: Preprocess
    description: str
    skipped: int = 0

    @classmethod
    def open(
        cls, root: Path, preprocess: Preprocess, description: str, *, count: int, skip_bad: bool
    ) -> FolderImages:
        """At most ``count`` images of ``root``, spread evenly.

        Raises:
            InputError: if the folder is missing, empty or holds nothing readable.
        """
        try:
            folder = ImageFolder.open(root).take(count)
        except ImageDataError as error:
            raise InputError(str(error)) from error
        bad = unreadable(folder, preprocess) if skip_bad else ()
        folder = folder.without(bad)
        if not folder.files:
            raise InputError(f"image folder {root} holds no readable image ({len(bad)} skipped)")
        return cls(folder=folder, preprocess=preprocess, description=description, skipped=len(bad))

    @property
    def count(self) -> int:
        return len(self.folder.files)

    def batches(self) -> Iterator[FloatArray]:
        try:
            yield from batches(self.folder, self.preprocess, BATCH_SIZE)
        except ImageDataError as error:
            raise InputError(f"{error}; --skip-bad-images leaves such files out") from error

    def labels(self, class_names: Sequence[str] | None, num_classes: int) -> LabelArray | None:
        names = self.folder.label_names()
        if names is None:
            return None
        classes = sorted(set(names)) if class_names is None else list(class_names)
        if len(classes) != num_classes or not set(names) <= set(classes):
            return None
        return np.array([classes.index(name) for name in names], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        try:
            digest = self.folder.sha256()
        except ImageDataError as error:
            raise InputError(str(error)) from error
        return {
            "description": self.description,
            "images": self.count,
            "skipped": self.skipped,
            "sha256": digest,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayImages:
    """Images that the caller of the Python API has already preprocessed, ``[N, C, H, W]``."""

    array: FloatArray
    description: str = "arrays passed by the caller"

    @property
    def count(self) -> int:
        return len(self.array)

    def batches(self) -> Iterator[FloatArray]:
        for start in range(0, len(self.array), BATCH_SIZE):
            yield self.array[start : start + BATCH_SIZE]

    def labels(
        self,
        class_names: Sequence[str] | None,  # noqa: ARG002
        num_classes: int,  # noqa: ARG002
    ) -> LabelArray | None:
        return None

    def to_json(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.ascontiguousarray(self.array).tobytes()).hexdigest()
        return {
            "description": self.description,
            "images": self.count,
            "skipped": 0,
            "sha256": digest,
        }


def logits_of(run: Callable[[FloatArray], FloatArray], images: ImageSet) -> FloatArray:
    """Run a network over a whole set: ``[count, num_classes]`` float32."""
    return np.concatenate([run(batch) for batch in images.batches()])
