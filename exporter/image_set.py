"""Images for calibration and for parity: from a folder, or arrays that the caller preprocessed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from calibration.decoding import PixelMemory, batches
from calibration.images import (
    ImageDataError,
    ImageFolder,
    Preprocess,
    unreadable,
)
from exporter.errors import InputError
from exporter.onnx_runner import BATCH_SIZE, Batch, FloatArray, Outputs, Runner

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

    def batches(self) -> Iterator[Batch]:
        """Float32 arrays; raises InputError naming an image that cannot be read."""
        ...

    def labels(self, class_names: Sequence[str] | None, num_classes: int) -> LabelArray | None:
        """Class indices ``[count]``, or None where the images carry no usable labels."""
        ...

    def image(self, index: int) -> Batch:
        """One image as a batch of its own; raises InputError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What a person can find the image by."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What the manifest records, the sha256 of the data included."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderImages:
    """Image files, decoded once. ``skipped`` were unreadable and left out on request."""

    folder: ImageFolder
    memory: PixelMemory
    description: str
    skipped: int = 0

    @property
    def preprocess(self) -> Preprocess:
        """What makes arrays of the files."""
        return self.memory.preprocess

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
        memory = PixelMemory(preprocess)
        return cls(folder=folder, memory=memory, description=description, skipped=len(bad))

    @property
    def count(self) -> int:
        return len(self.folder.files)

    def batches(self) -> Iterator[Batch]:
        try:
            for images in batches(self.folder, self.memory, BATCH_SIZE):
                yield (images,)
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

    def image(self, index: int) -> Batch:
        try:
            return (self.memory.image(self.folder.files[index])[None],)
        except ImageDataError as error:
            raise InputError(str(error)) from error

    def name(self, index: int) -> str:
        return self.folder.files[index].relative_to(self.folder.root).as_posix()

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
    """Inputs that the caller of the Python API has already preprocessed.

    ``chunks`` may differ in height and width, where the network leaves these open.
    """

    chunks: tuple[Batch, ...]
    description: str = "arrays passed by the caller"

    @classmethod
    def of(cls, *inputs: FloatArray) -> ArrayImages:
        """One array ``[N, ...]`` for each input of the network."""
        return cls(chunks=(inputs,))

    @property
    def count(self) -> int:
        return sum(len(chunk[0]) for chunk in self.chunks)

    def batches(self) -> Iterator[Batch]:
        for chunk in self._merged():
            for start in range(0, len(chunk[0]), BATCH_SIZE):
                yield tuple(array[start : start + BATCH_SIZE] for array in chunk)

    def _merged(self) -> Iterator[Batch]:
        """Neighbours of one size as one, so that batches do not depend on how they were passed."""
        for _, group in itertools.groupby(self.chunks, key=_sizes):
            yield tuple(np.concatenate(column) for column in zip(*group, strict=True))

    def labels(
        self,
        class_names: Sequence[str] | None,  # noqa: ARG002
        num_classes: int,  # noqa: ARG002
    ) -> LabelArray | None:
        return None

    def image(self, index: int) -> Batch:
        for chunk in self.chunks:
            if index < len(chunk[0]):
                return tuple(array[index : index + 1] for array in chunk)
            index -= len(chunk[0])
        raise IndexError("there are fewer images")

    def name(self, index: int) -> str:
        return f"image {index}"

    def to_json(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for chunk in self._merged():
            for array in chunk:
                digest.update(np.ascontiguousarray(array).tobytes())
        return {
            "description": self.description,
            "images": self.count,
            "skipped": 0,
            "sha256": digest.hexdigest(),
        }


def _sizes(chunk: Batch) -> list[tuple[int, ...]]:
    return [array.shape[1:] for array in chunk]


def outputs_of(run: Runner, batches: Iterable[Batch]) -> Outputs:
    """Run a network over all batches and join what it returns: each output ``[count, ...]``.

    Batches of another size than the first have outputs of their own, ``NAME@HxW``.
    """
    found: dict[str, list[FloatArray]] = {}
    own: list[tuple[int, ...]] = []
    for batch in batches:
        own = own or _sizes(batch)
        mark = "" if own == _sizes(batch) else f"@{'x'.join(map(str, batch[0].shape[2:]))}"
        for name, values in run(batch).items():
            found.setdefault(f"{name}{mark}", []).append(values)
    return {name: np.concatenate(values) for name, values in found.items()}
