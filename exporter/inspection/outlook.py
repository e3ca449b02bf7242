"""Which fused kernels will lose accuracy as INT8 weights, told from the numbers alone.

A weight scale is ``s = max|W_o| / 127`` for each output channel o, and rounding adds noise of
variance ``s^2 / 12``. Let sigma be the standard deviation of the row W_o without its largest tap,
and ``peak = max|W_o| / sigma``. The ordinary taps then have ``127 / peak`` levels a sigma, and

    signal / noise of the ordinary taps = 12 (127 / peak)^2                                   (1)

The identity branch of RepVGG adds 1 to the centre tap of the diagonal, so rows have one tap that
stands out by tens of sigmas; no scale per channel can take that away.

Activations have one scale a tensor. If the largest output channel is ``spread`` times the median
one, ordinary channels use ``127 / spread`` of its levels.

============  ==============================================  ======================================
outlook       peak (median over channels)                     spread
============  ==============================================  ======================================
``ok``        up to 16: 8 levels a sigma, 28.8 dB by (1)      up to 8: 16 levels a channel
``watch``     up to 32: 4 levels a sigma, 22.8 dB             up to 32: 4 levels a channel
``trouble``   above                                           above
============  ==============================================  ======================================

The worse of the two counts. Kurtosis (3 for a normal distribution) and the sigmas of the centre
diagonal say where it comes from and decide nothing. Dead channels are harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

WATCH_PEAK, TROUBLE_PEAK = 16.0, 32.0
WATCH_SPREAD, TROUBLE_SPREAD = 8.0, 32.0
_DEAD = 1e-6
"""A channel is dead if its largest weight is below this share of the layer's largest."""


class Outlook(str, Enum):
    """What to expect of a layer in INT8."""

    OK = "ok"
    WATCH = "watch"
    TROUBLE = "trouble"
    UNKNOWN = "not finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOutlook:
    """The figures of one fused kernel; None where there is nothing to measure."""

    name: str
    spread: float | None
    kurtosis: float | None
    peak_sigmas: float | None
    centre_sigmas: float | None
    dead_channels: int
    outlook: Outlook

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "name": self.name,
            "spread": self.spread,
            "kurtosis": self.kurtosis,
            "peak_sigmas": self.peak_sigmas,
            "centre_sigmas": self.centre_sigmas,
            "dead_channels": self.dead_channels,
            "outlook": self.outlook.value,
        }


def kernel_outlook(name: str, kernel: npt.NDArray[np.float64], *, square: bool) -> KernelOutlook:
    """Measure ``[O, I / groups, kh, kw]``; ``square`` says whether I = O, so that a diagonal is."""
    rows = kernel.reshape(len(kernel), -1)
    if not np.isfinite(rows).all():
        return _without_figures(name, 0, Outlook.UNKNOWN)
    largest = np.abs(rows).max(axis=1)
    live = largest > _DEAD * largest.max()
    dead = int((~live).sum())
    if not live.any():
        return _without_figures(name, dead, Outlook.OK)
    rows = rows / largest.max()  # whose fourth powers are in range
    spread = float(largest[live].max() / np.median(largest[live]))
    peak = float(np.median(_sigmas(rows[live], np.abs(rows[live]).argmax(axis=1))))
    centre = _centre_sigmas(kernel, live) if square else None
    return KernelOutlook(
        name=name,
        spread=spread,
        kurtosis=_kurtosis(rows[live]),
        peak_sigmas=peak,
        centre_sigmas=centre,
        dead_channels=dead,
        outlook=_judge(peak, spread),
    )


def _without_figures(name: str, dead: int, outlook: Outlook) -> KernelOutlook:
    return KernelOutlook(
        name=name,
        spread=None,
        kurtosis=None,
        peak_sigmas=None,
        centre_sigmas=None,
        dead_channels=dead,
        outlook=outlook,
    )


def _judge(peak: float, spread: float) -> Outlook:
    if peak > TROUBLE_PEAK or spread > TROUBLE_SPREAD:
        return Outlook.TROUBLE
    if peak > WATCH_PEAK or spread > WATCH_SPREAD:
        return Outlook.WATCH
    return Outlook.OK


def _centre_sigmas(kernel: npt.NDArray[np.float64], live: npt.NDArray[np.bool_]) -> float:
    """How far the diagonal's centre tap is from the row's other taps, median over channels."""
    outputs, inputs, height, width = kernel.shape
    columns = (np.arange(outputs) % inputs) * height * width + (height // 2) * width + width // 2
    return float(np.median(_sigmas(kernel.reshape(outputs, -1)[live], columns[live])))


def _sigmas(rows: npt.NDArray[np.float64], columns: npt.NDArray[np.intp]) -> Any:
    """``|tap|`` in standard deviations of the rest of its row; 0 where the rest is constant."""
    taps = rows[np.arange(len(rows)), columns]
    count = rows.shape[1] - 1
    if count < 1:
        return np.zeros(len(rows))
    mean = (rows.sum(axis=1) - taps) / count
    deviations = rows - mean[:, None]
    squares = (deviations**2).sum(axis=1) - (taps - mean) ** 2
    sigma = np.sqrt(np.maximum(squares, 0.0) / count)
    constant = sigma <= 1e-12 * np.abs(rows).max(axis=1)
    return np.where(constant, 0.0, np.abs(taps) / np.where(constant, 1.0, sigma))


def _kurtosis(rows: npt.NDArray[np.float64]) -> float | None:
    deviations = rows - rows.mean()
    variance = float((deviations**2).mean())
    if variance == 0.0:
        return None
    return float((deviations**4).mean()) / variance**2
