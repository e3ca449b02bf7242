"""How close two outputs of one network are.

With reference r and output y over all images and all values of one output::

    max_abs   = max |r - y|                      in the output's units
    relative  = max_abs / (max r - min r)        infinite if all r are equal and y is not r
    SQNR      = 10 log10( sum r^2 / sum (r - y)^2 )   in dB, at most 200 (bit-identical)
    cosine    = r.y / (|r| |y|)

and for a classifier, whose outputs are logits [N, K], with p = softmax(r), q = softmax(y)::

    KL        = mean over images of sum_k p_k log(p_k / q_k)   in nats
    top-1 agreement = fraction of images with the same arg max
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
MAX_SQNR_DB = 200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One output against its reference; definitions in the module's docstring."""

    max_abs: float
    relative: float
    sqnr_db: float
    cosine: float
    top1_agreement: float | None
    kl_nats: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """The figures; JSON has no infinity, as ``relative`` is where the reference is constant."""
        figures = asdict(self)
        return {k: v if v is not None and math.isfinite(v) else None for k, v in figures.items()}


def compare(reference: FloatArray, output: FloatArray, *, classifier: bool = True) -> Comparison:
    """Compare two outputs ``[N, ...]``, both finite, of one shape; a classifier's are logits."""
    r, y = reference.astype(np.float64), output.astype(np.float64)
    difference = r - y
    max_abs = float(np.max(np.abs(difference)))
    noise, signal = float(np.sum(difference**2)), float(np.sum(r**2))
    span = float(np.ptp(r))
    norms = math.sqrt(signal) * float(np.linalg.norm(y))
    cosine = float(np.sum(r * y)) / norms if norms > 0 else float(max_abs == 0)
    return Comparison(
        max_abs=max_abs,
        relative=max_abs / span if span > 0 else (0.0 if max_abs == 0 else math.inf),
        sqnr_db=_decibel(signal, noise),
        cosine=min(1.0, max(-1.0, cosine)),
        top1_agreement=(
            float(np.mean(r.argmax(axis=1) == y.argmax(axis=1))) if classifier else None
        ),
        kl_nats=_divergence(r, y) if classifier else None,
    )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return MAX_SQNR_DB
    if signal == 0:
        return -MAX_SQNR_DB
    return min(MAX_SQNR_DB, max(-MAX_SQNR_DB, 10 * math.log10(signal / noise)))


def _divergence(reference: npt.NDArray[Any], output: npt.NDArray[Any]) -> float:
    p, q = _log_softmax(reference), _log_softmax(output)
    return max(0.0, float(np.mean(np.sum(np.exp(p) * (p - q), axis=1))))


def _log_softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def accuracy(logits: FloatArray, labels: npt.NDArray[np.int64] | None) -> float | None:
    """Top-1 as a fraction, or None without labels."""
    if labels is None:
        return None
    return float(np.mean(logits.argmax(axis=1) == labels))
