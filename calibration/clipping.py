"""Where to clip a stage's input: by the measured effect on the logits, not by faith.

Candidates are the clip values of :mod:`calibration.threshold`: min-max, percentile, MSE, entropy.
Each is tried on real inputs with exact weights, and the error that it makes in the stage's result
is judged by what it does to the logits (:func:`calibration.effects.clip_effects`). By the power of
the error in the stage's result alone, MSE wins nearly everywhere and costs RepVGG-A0 1 dB: rounding
errors average out on their way to the logits, and clipping errors do not.

The least effect wins, but a candidate replaces min-max, which clips nothing that calibration saw,
only if its error power is clearly smaller, by ``MARGIN``. Min-max itself then leaves room for
images that calibration did not see (:mod:`calibration.extremes`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibration.convolution import FloatArray
from calibration.observer import TensorObserver
from calibration.threshold import LEVELS, MIN_SCALE, Method, threshold

MARGIN = 0.4
"""A clip value is worth its risk if it leaves at most this share of min-max's error (4 dB).

Measured on RepVGG-A0: smaller gains are noise of the images tried, and cost up to 0.8 dB."""


UNSIGNED_LEVELS = 255
"""The largest integer where no value is negative: eight bits without a sign."""


def input_scale(clip: float, *, unsigned: bool = False) -> float:
    """``clip`` over the largest integer as a float32, never below the smallest normal number."""
    return max(float(np.float32(clip / (UNSIGNED_LEVELS if unsigned else LEVELS))), MIN_SCALE)


def quantize_input(x: FloatArray, scale: float, *, unsigned: bool = False) -> FloatArray:
    """``clip(rint(x / scale), -128, 127)`` as ONNX's QuantizeLinear computes it, in float32.

    ``unsigned`` is the same 128 integers higher: 0 to 255.
    """
    q = x / np.float32(scale)
    np.rint(q, out=q)
    np.maximum(q, 0 if unsigned else -LEVELS - 1, out=q)
    np.minimum(q, UNSIGNED_LEVELS if unsigned else LEVELS, out=q)
    return q


def candidate_clips(observer: TensorObserver, abs_max: float) -> dict[str, float]:
    """Clip values by the name of their method; ``abs_max`` is min-max's, 1 for an all-zero tensor.

    ``observer`` may have seen fewer images than those that ``abs_max`` comes from.
    """
    clips = {method.value: threshold(observer, method) for method in Method}
    return {**clips, Method.MINMAX.value: abs_max or 1.0}


def best_clip(effects: Mapping[str, float]) -> str:
    """The name of the clip value to use, given the error power of each; min-max must be there."""
    name = min(effects, key=lambda candidate: effects[candidate])
    minmax = Method.MINMAX.value
    return name if effects[name] <= MARGIN * effects[minmax] else minmax
