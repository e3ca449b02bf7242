"""Preprocessed arrays back to small pictures inside the page (PNG as data URI)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image

from calibration.images import Preprocess

THUMBNAIL = 96
"""Pixels of the longer edge."""


def is_picture(array: npt.NDArray[np.float32]) -> bool:
    """Whether ``array`` is ``[C, H, W]`` with one or three channels."""
    return array.ndim == 3 and array.shape[0] in (1, 3) and min(array.shape[1:]) > 1


def thumbnails(
    images: Mapping[int, npt.NDArray[np.float32]], preprocess: Preprocess | None
) -> dict[int, str]:
    """A data URI for each image ``[C, H, W]``, as the network saw it.

    ``preprocess`` tells how to undo the normalization; without it the values are stretched from
    their smallest to their largest.
    """
    return {
        index: _data_uri(_pixels(image, preprocess))
        for index, image in images.items()
        if is_picture(image)
    }


def _pixels(image: npt.NDArray[np.float32], preprocess: Preprocess | None) -> npt.NDArray[np.uint8]:
    values = image.astype(np.float64)
    if preprocess is not None and len(values) == len(preprocess.mean):
        mean, std = (
            np.array(part, dtype=np.float64)[:, None, None]
            for part in (preprocess.mean, preprocess.std)
        )
        values = values * std + mean
    else:
        low, high = float(values.min()), float(values.max())
        values = (values - low) / ((high - low) or 1.0)
    pixels = np.nan_to_num(255 * np.clip(values, 0, 1)).round().astype(np.uint8)
    return np.moveaxis(pixels, 0, -1)


def _data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
