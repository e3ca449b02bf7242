"""Images for calibration and for parity: from a folder, or arrays that the caller preprocessed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

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
from exporter.running.onnx_runner import (
    BATCH_SIZE,
    Batch,
    FloatArray,
    Outputs,
    Runner,
    in_steps,
    joined,
)
from exporter.running.spread import Spread, cut

LabelArray = npt.NDArray[np.int64]
Sizes = list[tuple[int, ...]]
Result = TypeVar("Result")
Advance = Callable[[float], None]
"""Gets the fraction of the images that is done, 0 to 1."""
Pass: TypeAlias = "Callable[[ImageSet, Advance], Result]"
"""One look at all images of a set. Where these may be spread it has to travel, as
:mod:`exporter.running.spread` says, and what it returns must merge exactly."""


def unheard(_fraction: float) -> None:
    """Report nothing."""


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

    @property
    def first(self) -> int:
        """How many images of the whole come before these: 0 but in a part of a set."""
        ...

    def in_parts(self, work: Pass[Result], advance: Advance = unheard) -> list[Result]:
        """Do ``work`` on all images: on the set as it is, or on parts of it at the same time.

        Parts follow one another, and their batches are those of the whole. Raises what ``work``
        does on the first part where it fails.
        """
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
    """Image files, decoded once. ``skipped`` were unreadable and left out on request.

    With a ``spread`` others help to look at them, who read the files at the same paths. Unless
    ``labelled``, their folders are not the network's classes.
    """

    folder: ImageFolder
    memory: PixelMemory
    description: str
    skipped: int = 0
    spread: Spread | None = None
    first: int = 0
    labelled: bool = True

    @property
    def preprocess(self) -> Preprocess:
        """What makes arrays of the files."""
        return self.memory.preprocess

    @classmethod
    def open(
        cls,
        root: Path,
        preprocess: Preprocess,
        description: str,
        *,
        count: int,
        skip_bad: bool,
        spread: Spread | None = None,
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
        return cls(
            folder=folder,
            memory=PixelMemory(preprocess),
            description=description,
            skipped=len(bad),
            spread=spread,
        )

    @property
    def count(self) -> int:
        return len(self.folder.files)

    def in_parts(self, work: Pass[Result], advance: Advance = unheard) -> list[Result]:
        ranges = cut(self.count, self.spread.width, BATCH_SIZE) if self.spread else []
        if self.spread is None or len(ranges) < 2:
            return [work(self, advance)]
        own, *others = (_Part.of(self, indices) for indices in ranges)
        waiting = self.spread.start(partial(_work_on, work), others)
        share = own.count / self.count
        found = [work(own.images(self.memory), lambda done: advance(done * share))]
        for part, wait in zip(others, waiting, strict=True):
            found.append(wait())
            advance((part.first + part.count) / self.count)
        return found

    def batches(self) -> Iterator[Batch]:
        try:
            for images in batches(self.folder, self.memory, BATCH_SIZE):
                yield (images,)
        except ImageDataError as error:
            raise InputError(f"{error}; --skip-bad-images leaves such files out") from error

    def labels(self, class_names: Sequence[str] | None, num_classes: int) -> LabelArray | None:
        names = self.folder.label_names() if self.labelled else None
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
class _Part:
    """Neighbours in a :class:`FolderImages`, as they travel; ``memory`` is the name of its one."""

    folder: ImageFolder
    description: str
    preprocess: Preprocess
    memory: str
    first: int

    @classmethod
    def of(cls, images: FolderImages, indices: range) -> _Part:
        """The images of these places."""
        files = images.folder.files[indices.start : indices.stop]
        return cls(
            folder=ImageFolder(images.folder.root, files),
            description=images.description,
            preprocess=images.preprocess,
            memory=images.memory.name,
            first=images.first + indices.start,
        )

    @property
    def count(self) -> int:
        return len(self.folder.files)

    def images(self, memory: PixelMemory) -> FolderImages:
        """The set, by pixels that ``memory`` has or will have."""
        return FolderImages(
            folder=self.folder, memory=memory, description=self.description, first=self.first
        )


def _work_on(work: Pass[Result], part: _Part) -> Result:
    """What a helper does with a part; it keeps the pixels for the next pass over the same set."""
    return work(part.images(_memory(part.memory, part.preprocess)), unheard)


@lru_cache(maxsize=2)
def _memory(_name: str, preprocess: Preprocess) -> PixelMemory:
    """Of the set of this name; an export has two, and a file may be another one in the next."""
    return PixelMemory(preprocess)


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

    @property
    def first(self) -> int:
        return 0

    def in_parts(self, work: Pass[Result], advance: Advance = unheard) -> list[Result]:
        """Never in more than one: arrays are in this process, and what takes them is the caller's
        own network, which may not travel."""
        return [work(self, advance)]

    def batches(self) -> Iterator[Batch]:
        for chunk in self._merged():
            yield from in_steps(chunk, BATCH_SIZE)

    def _merged(self) -> Iterator[Batch]:
        """Neighbours of one size as one, so that batches do not depend on how they were passed."""
        for _, group in itertools.groupby(self.chunks, key=sizes_of):
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


def sizes_of(batch: Batch) -> Sizes:
    """The shape of one image, for each input."""
    return [array.shape[1:] for array in batch]


def outputs_of(run: Runner, batches: Iterable[Batch], own: Sizes | None = None) -> Outputs:
    """Run a network over all batches and join what it returns: each output ``[count, ...]``.

    Batches of another size than ``own``, the first one's if None, have outputs of their own,
    ``NAME@HxW``.
    """
    found: list[Outputs] = []
    for batch in batches:
        own = own or sizes_of(batch)
        mark = "" if own == sizes_of(batch) else f"@{'x'.join(map(str, batch[0].shape[2:]))}"
        found.append({f"{name}{mark}": values for name, values in run(batch).items()})
    return joined(found)
