"""Graphs that take pixels: uint8 RGB images, resized and cropped, in one of two layouts.

Standard library only; the device half reads from the manifest which graphs these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    PixelArray: TypeAlias = npt.NDArray[np.uint8]

DTYPE = "uint8"
FLOAT = "float32"
"""The data type of inputs whose port names none."""

Extent = TypeVar("Extent")


class Layout(str, Enum):
    """The order of a batch's axes: ``[N, H, W, 3]`` as image files hold it, or ``[N, 3, H, W]``."""

    NHWC = "nhwc"
    NCHW = "nchw"

    def __str__(self) -> str:
        return self.value

    @property
    def from_nchw(self) -> tuple[int, int, int, int]:
        """For each axis of this layout, which axis of ``[N, 3, H, W]`` it is."""
        return (0, 2, 3, 1) if self is Layout.NHWC else (0, 1, 2, 3)

    @property
    def to_nchw(self) -> tuple[int, int, int, int]:
        """For each axis of ``[N, 3, H, W]``, which axis of this layout it is."""
        return (0, 3, 1, 2) if self is Layout.NHWC else (0, 1, 2, 3)

    def shape(self, nchw: Sequence[Extent]) -> tuple[Extent, ...]:
        """A shape ``[N, 3, H, W]`` in this layout."""
        return tuple(nchw[axis] for axis in self.from_nchw)

    def arranged(self, pixels: PixelArray) -> PixelArray:
        """A view of pixels ``[N, H, W, 3]`` in this layout."""
        return pixels if self is Layout.NHWC else pixels.transpose(0, 3, 1, 2)


def recorded_layout(manifest: Mapping[str, Any]) -> Layout | None:
    """The layout of the pixels that a bundle's graphs take; None if they take float arrays."""
    ports = manifest.get("inputs", [{}])
    layout = ports[0].get("layout")
    return None if layout is None else Layout(layout)
