"""Runs the float graph over calibration images and hands every boundary tensor to calibration/.

A boundary tensor is one that an INT8 kernel reads: the input of a convolution or of the classifier.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import onnx

from calibration.images import Preprocess
from calibration.observer import ObservationError, TensorObserver, observe
from calibration.table import CalibrationTable, TensorRange
from calibration.threshold import Method, activation_scale, threshold
from exporter.errors import InputError
from exporter.graph import boundary_tensors, with_outputs
from exporter.image_set import ImageSet
from exporter.onnx_runner import FloatArray, OnnxRunner

PERCENTILE = 99.99


def observe_boundaries(
    model: onnx.ModelProto,
    batches: Iterable[FloatArray],
    progress: Callable[[int], None] | None = None,
) -> Mapping[str, TensorObserver]:
    """Statistics of every boundary tensor of the float graph over ``[n, C, H, W]`` batches.

    One pass; memory depends on the batch size, not on the number of images. ``progress`` gets the
    number of images done.
    """
    image_name = model.graph.input[0].name
    computed = [name for name in boundary_tensors(model) if name != image_name]
    runner = OnnxRunner(with_outputs(model, computed))

    def run(images: FloatArray) -> Mapping[str, FloatArray]:
        return {image_name: images, **runner.run_all(images)}

    return observe(run, batches, progress)


def calibrate(
    model: onnx.ModelProto,
    images: ImageSet,
    method: str,
    preprocess: Preprocess,
    progress: Callable[[int], None] | None = None,
) -> CalibrationTable:
    """Observe the boundaries of the float graph and choose a scale for each.

    Raises:
        InputError: if an image cannot be read or the network's tensors are not finite.
    """
    try:
        observers = observe_boundaries(model, images.batches(), progress)
    except ObservationError as error:
        raise InputError(f"calibration failed: {error}") from error
    chosen = Method(method)
    return CalibrationTable(
        method=method,
        percentile=PERCENTILE if chosen is Method.PERCENTILE else None,
        activation_scales={
            name: activation_scale(observer, chosen, percentile=PERCENTILE)
            for name, observer in observers.items()
        },
        ranges={
            name: TensorRange(
                minimum=observer.minimum,
                maximum=observer.maximum,
                threshold=threshold(observer, chosen, percentile=PERCENTILE),
            )
            for name, observer in observers.items()
        },
        onnx_sha256=hashlib.sha256(model.SerializeToString()).hexdigest(),
        data_sha256=images.to_json()["sha256"],
        image_count=images.count,
        preprocess=preprocess.to_json(),
    )
