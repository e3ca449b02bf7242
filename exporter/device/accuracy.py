"""What an evaluation counted, as whole numbers.

Only whole numbers are kept, so that shards of one folder, evaluated on as many machines, merge to
exactly what one run over the folder counts. Image ``i`` of the folder's order belongs to shard
``i mod count + 1``.

The rank of the true class is the number of classes with a larger logit, or an equal one and a lower
index; top-k holds the images with a rank below k. Fewer than six classes make top-5 trivial.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.errors import InputError
from exporter.running.onnx_runner import FloatArray

Labels = npt.NDArray[np.int64]
TOP = 5
WORST_CLASSES = 10


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``count``, counted from 1."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(f"shard {self} must be part/parts with 1 <= part <= parts")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``2/4``.

        Raises:
            ValueError: for anything else.
        """
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if not match:
            raise ValueError(f"shard {text!r} must be part/parts, such as 2/4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassResult:
    """One class: how often it was right, and what else it was taken for, most often first."""

    name: str
    images: int
    correct: int
    taken_for: tuple[tuple[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "class": self.name,
            "images": self.images,
            "correct": self.correct,
            "taken_for": dict(self.taken_for),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What was counted. ``confusion`` maps (true class, predicted class) to a number of images.

    ``bundle_sha256`` is that of its manifest, which fixes everything in it. ``shards`` are the
    parts counted here of a folder that holds ``folder_images``, whose relative names have the hash
    ``folder_names_sha256``; both are None in results of older versions. ``seconds`` is the time
    from the first file to the last answer, None after a merge: parts ran beside each other, or not.
    """

    bundle: str
    bundle_sha256: str
    precision: str
    backend: str
    library: str
    data: str
    class_names: tuple[str, ...]
    confusion: Mapping[tuple[int, int], int]
    top5_correct: int
    skipped: int = 0
    folder_images: int | None = None
    folder_names_sha256: str | None = None
    shards: tuple[Shard, ...] = (Shard(),)
    seconds: float | None = None
    note: str | None = None

    @property
    def images(self) -> int:
        """How many images were counted; skipped ones were not."""
        return sum(self.confusion.values())

    @property
    def top1_correct(self) -> int:
        """Images whose largest logit was the true class's."""
        return sum(n for (true, predicted), n in self.confusion.items() if true == predicted)

    @property
    def images_per_second(self) -> float | None:
        """Reading and decoding the files included."""
        return self.images / self.seconds if self.seconds else None

    def worst_classes(self, count: int = WORST_CLASSES) -> tuple[ClassResult, ...]:
        """The classes with errors, the lowest share of correct images first."""
        results = []
        for true in sorted({true for true, _ in self.confusion}):
            row = {predicted: n for (t, predicted), n in self.confusion.items() if t == true}
            correct = row.pop(true, 0)
            others = sorted(row.items(), key=lambda item: (-item[1], item[0]))
            if others:
                results.append(
                    ClassResult(
                        name=self.class_names[true],
                        images=correct + sum(row.values()),
                        correct=correct,
                        taken_for=tuple((self.class_names[p], n) for p, n in others),
                    )
                )
        results.sort(key=lambda result: (result.correct / result.images, -result.images))
        return tuple(results[:count])

    def to_json(self) -> dict[str, Any]:
        """Figures for people, and the counts that :func:`merge` needs."""
        rate = self.images_per_second
        return {
            "bundle": self.bundle,
            "bundle_sha256": self.bundle_sha256,
            "precision": self.precision,
            "backend": self.backend,
            "library": self.library,
            "data": self.data,
            "folder_images": self.folder_images,
            "folder_names_sha256": self.folder_names_sha256,
            "shards": [str(shard) for shard in self.shards],
            "images": self.images,
            "skipped": self.skipped,
            "top1": self.top1_correct / self.images,
            "top5": self.top5_correct / self.images,
            "top1_correct": self.top1_correct,
            "top5_correct": self.top5_correct,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "images_per_second": None if rate is None else round(rate, 2),
            "worst_classes": [result.to_json() for result in self.worst_classes()],
            "note": self.note,
            "class_names": list(self.class_names),
            "confusion": [[*key, count] for key, count in sorted(self.confusion.items())],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError, KeyError, TypeError: if it is no evaluation.
        """
        names = tuple(str(name) for name in content["class_names"])
        confusion = {(int(t), int(p)): int(n) for t, p, n in content["confusion"]}
        if any(not 0 <= index < len(names) for key in confusion for index in key):
            raise ValueError("a counted class has no name")
        if not confusion or min(confusion.values()) < 1:
            raise ValueError("it counts no images")
        names_sha256 = content.get("folder_names_sha256")
        images = content.get("folder_images")
        words = ("bundle", "bundle_sha256", "precision", "backend", "library", "data")
        return cls(
            **{word: str(content[word]) for word in words},
            class_names=names,
            confusion=confusion,
            top5_correct=int(content["top5_correct"]),
            skipped=int(content["skipped"]),
            folder_images=None if images is None else int(images),
            folder_names_sha256=None if names_sha256 is None else str(names_sha256),
            shards=tuple(Shard.parse(text) for text in content["shards"]),
            seconds=content["seconds"],
            note=content["note"],
        )


_SAME = {
    "bundle_sha256": "bundle_sha256",
    "precision": "precision",
    "backend": "backend",
    "library": "library",
    "class_names": "class_names",
    "folder_images": "numbers of images in the folder",
    "folder_names_sha256": "names of images in the folder",
}
"""What parts of one evaluation have in common, and what a person calls it."""


def _require_same(first: Evaluation, other: Evaluation) -> None:
    recorded = {part.folder_images is None: part for part in (first, other)}
    if len(recorded) == 2:
        old = recorded[True]
        raise InputError(
            f"evaluation {old.data} {old.shards[0]} is of an older version, which did not record "
            "what images the folder held; evaluate it again"
        )
    for name, words in _SAME.items():
        if getattr(other, name) != getattr(first, name):
            raise InputError(
                f"these evaluations do not belong together: their {words} differ "
                f"({first.data} {first.shards[0]}, {other.data} {other.shards[0]})"
            )


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of all ``parts``, which are shards of one folder.

    Raises:
        InputError: if they are of different bundles, backends, classes or images, or a shard is
            there twice or missing.
    """
    if not parts:
        raise InputError("there is no evaluation to merge")
    first, *others = parts
    for other in others:
        _require_same(first, other)
    shards = tuple(sorted((s for part in parts for s in part.shards), key=lambda s: s.index))
    counts = {shard.count for shard in shards}
    wanted = [Shard(index, max(counts)) for index in range(1, max(counts) + 1)]
    if list(shards) != wanted:
        found = ", ".join(map(str, shards))
        raise InputError(f"the shards {found} are not each of {max(counts)} parts exactly once")
    confusion: Counter[tuple[int, int]] = Counter()
    for part in parts:
        confusion.update(part.confusion)
    return replace(
        first,
        confusion=dict(confusion),
        top5_correct=sum(part.top5_correct for part in parts),
        skipped=sum(part.skipped for part in parts),
        shards=shards,
        seconds=None,
    )


def ranks(logits: FloatArray, labels: Labels) -> Labels:
    """The rank of each image's true class, 0 for the best; as the module's docstring defines it."""
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    return np.asarray(np.sum((logits > own) | ((logits == own) & earlier), axis=1), dtype=np.int64)
