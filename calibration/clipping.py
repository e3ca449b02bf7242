"""Where to clip a stage's input: by the measured effect on the logits, not by faith.

Candidates are the clip values of :mod:`calibration.threshold`: min-max, percentile, MSE, entropy.
Each is tried on real inputs with exact weights, and the error that it makes in the stage's result
is judged by what it does to the logits (:func:`calibration.effects.clip_effects`). By the power of
the error in the stage's result alone, MSE wins nearly everywhere and costs RepVGG-A0 1 dB: rounding
errors average out on their way to the logits, and clipping errors do not.

The least effect wins, but a candidate replaces min-max, which clips nothing that calibration saw,
only if its error power is clearly smaller, by ``MARGIN``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from calibration.convolution import FloatArray
from calibration.observer import TensorObserver
from calibration.threshold import LEVELS, MIN_SCALE, Method, threshold

MARGIN = 0.63
"""A clip value is worth its risk if it leaves at most this share of min-max's error (2 dB).

Measured on RepVGG-A0: smaller gains are noise of the images tried, and cost up to 0.6 dB."""


def input_scale(clip: float) -> float:
    """``clip / 127`` as a float32, never below the smallest normal number."""
    return max(float(np.float32(clip / LEVELS)), MIN_SCALE)


def quantize_input(x: FloatArray, scale: float) -> FloatArray:
    """``clip(rint(x / scale), -128, 127)`` as ONNX's QuantizeLinear computes it, in float32."""
    q = x / np.float32(scale)
    np.rint(q, out=q)
    np.maximum(q, -LEVELS - 1, out=q)
    np.minimum(q, LEVELS, out=q)
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
