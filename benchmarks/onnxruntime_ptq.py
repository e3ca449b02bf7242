"""ONNX Runtime's own post-training quantizer, as a TensorRT user has to call it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

Images = npt.NDArray[np.float32]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches of images for the input ``images``."""

    def __init__(self, batches: Iterator[Images]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, Images] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def quantize(source: Path, target: Path, batches: Iterator[Images], method: str) -> None:
    """Write the Q/DQ graph of ``source``; ``method`` is ``MinMax``, ``Entropy`` or ``Percentile``.

    Per-channel weights and symmetric ranges, which is what TensorRT accepts.
    """
    quantize_static(
        source,
        target,
        Reader(batches),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )
