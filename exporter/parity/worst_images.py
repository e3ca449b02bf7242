"""The images on which a stage differs most from the original, as parity.json lists them.

Changed answers come first, then the largest difference of any output value::

    key(n) = ( argmax r_n != argmax y_n ,  max_k |r_nk - y_nk| )

Probabilities are softmax of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.parity.comparison import FloatArray, compare

MOST_IMAGES = 8
TOP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A class by name, and its probability."""

    name: str
    probability: float

    def to_json(self) -> dict[str, Any]:
        """As parity.json holds it."""
        return {"class": self.name, "probability": self.probability}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstImage:
    """One image: its place in the set, its file name, and both answers, best first.

    Networks that are no classifier give no answers.
    """

    index: int
    name: str
    label: str | None
    max_abs: float
    sqnr_db: float
    original: tuple[Answer, ...] = ()
    precision: tuple[Answer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As parity.json holds it."""
        answers = {
            "original": [answer.to_json() for answer in self.original],
            "precision": [answer.to_json() for answer in self.precision],
        }
        return {**asdict(self), **answers}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstImages:
    """Of one stage. ``changed`` counts the images whose first answer is another, None if none is
    given."""

    stage: str
    changed: int | None
    rows: tuple[WorstImage, ...]

    def to_json(self) -> dict[str, Any]:
        """As parity.json holds it, under ``worst_images``."""
        rows = [row.to_json() for row in self.rows]
        return {"stage": self.stage, "changed": self.changed, "rows": rows}


def worst_images(
    stage: str,
    reference: FloatArray,
    output: FloatArray,
    *,
    names: Sequence[str],
    labels: npt.NDArray[np.int64] | None,
    class_names: Sequence[str] | None,
    classifier: bool,
    count: int = MOST_IMAGES,
) -> WorstImages:
    """The ``count`` images of ``[N, ...]`` on which ``output`` is farthest from ``reference``.

    ``names`` has a name for each image; a class without a name is called by its number.
    """
    difference = np.abs(reference - output).reshape(len(reference), -1).max(axis=1)
    changed = np.zeros(len(reference), dtype=bool)
    if classifier:
        changed = reference.argmax(axis=1) != output.argmax(axis=1)
    order = np.lexsort((np.arange(len(reference)), -difference, ~changed))[:count]

    def class_name(index: int) -> str:
        return class_names[index] if class_names is not None else str(index)

    def answers(logits: FloatArray) -> tuple[Answer, ...]:
        if not classifier:
            return ()
        shares = _softmax(logits)
        best = np.argsort(-shares, kind="stable")[:TOP]
        return tuple(Answer(name=class_name(int(k)), probability=float(shares[k])) for k in best)

    rows = tuple(
        WorstImage(
            index=int(n),
            name=names[n],
            label=None if labels is None else class_name(int(labels[n])),
            max_abs=float(difference[n]),
            sqnr_db=compare(reference[n : n + 1], output[n : n + 1], classifier=False).sqnr_db,
            original=answers(reference[n]),
            precision=answers(output[n]),
        )
        for n in order
    )
    total = int(changed.sum()) if classifier else None
    return WorstImages(stage=stage, changed=total, rows=rows)


def _softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    total = float(shifted.sum())
    assert math.isfinite(total)
    return np.asarray(shifted / total)
