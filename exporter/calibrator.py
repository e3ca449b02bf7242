"""Runs the float graph over calibration images and hands every boundary tensor to calibration/.

A boundary tensor is one that an INT8 kernel reads: the input of a convolution, of the classifier or
of another product with constant weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from typing import Any

import onnx

from calibration.images import Preprocess
from calibration.observer import ObservationError, TensorObserver, merge_observations, observe
from calibration.table import CalibrationTable, TensorRange
from calibration.threshold import Method, activation_scale, threshold
from exporter.errors import InputError
from exporter.graph import boundary_tensors, graph_sha256, with_outputs
from exporter.running.image_set import Advance, ImageSet, unheard
from exporter.running.onnx_runner import Batch, FloatArray, OnnxRunner

PERCENTILE = 99.99


def observe_boundaries(
    model: onnx.ModelProto,
    batches: Iterable[Batch],
    progress: Callable[[int], None] | None = None,
    *,
    first: int = 0,
) -> Mapping[str, TensorObserver]:
    """Statistics of every boundary tensor of the float graph over ``batches``.

    One pass; memory depends on the batch size, not on the number of images. ``progress`` gets the
    number of images done; ``first`` is the number of the first one, for errors.
    """
    boundaries = boundary_tensors(model)
    inputs = [value.name for value in model.graph.input]
    computed = [name for name in boundaries if name not in inputs]
    runner = OnnxRunner(with_outputs(model, computed)) if computed else None
    current: list[Batch] = []

    def first_inputs() -> Iterator[FloatArray]:
        """The observers count images by one array; the others of its batch wait in ``current``."""
        for batch in batches:
            current[:] = [batch]
            yield batch[0]

    def run(_images: FloatArray) -> Mapping[str, FloatArray]:
        (batch,) = current
        found = dict(zip(inputs, batch, strict=True))
        if runner is not None:
            found |= runner.run(batch)
        return {name: found[name] for name in boundaries}

    return observe(run, first_inputs(), progress, first=first)


def observe_images(
    model: onnx.ModelProto, images: ImageSet, progress: Advance = unheard
) -> Mapping[str, TensorObserver]:
    """:func:`observe_boundaries` over calibration images, in parts; ``progress`` gets 0 to 1.

    Raises:
        InputError: if an image cannot be read or the network's tensors are not finite.
    """
    try:
        return reduce(merge_observations, images.in_parts(partial(_observe, model), progress))
    except ObservationError as error:
        raise InputError(f"calibration failed: {error}") from error


def _observe(
    model: onnx.ModelProto, images: ImageSet, progress: Advance
) -> Mapping[str, TensorObserver]:
    def report(done: int) -> None:
        progress(done / images.count)

    return observe_boundaries(model, images.batches(), report, first=images.first)


def table_by(
    method: str,
    observers: Mapping[str, TensorObserver],
    model: onnx.ModelProto,
    data: Mapping[str, Any],
    preprocess: Preprocess | None,
) -> CalibrationTable:
    """A scale for each observed boundary of ``model``, by a calibration.threshold method.

    ``data`` is what :meth:`ImageSet.to_json` says of the images that were observed.
    """
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
        onnx_sha256=graph_sha256(model),
        data_sha256=data["sha256"],
        image_count=data["images"],
        preprocess=preprocess.to_json() if preprocess else {},
    )
