"""What an engine takes and returns, and how images are cut into batches that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.device.memory import Array
from exporter.errors import InputError
from exporter.profiles import BatchProfile

Shape = tuple[int, ...]

_DTYPES: dict[str, npt.DTypeLike] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
"""By the name of TensorRT's DataType. Its own ``nptype`` fails in 8.6 under current numpy."""


def cut(count: int, profile: BatchProfile) -> tuple[int, ...]:
    """``count`` images as the fewest batches within ``profile``, as even as possible.

    Raises:
        InputError: if there are too few for one batch, or no such cut exists.
    """
    if count < profile.min:
        raise InputError(f"batch {count} is below the engine's profile {profile}")
    pieces = -(-count // profile.max)
    if pieces * profile.min > count:
        raise InputError(
            f"{count} images cannot be cut into batches within the engine's profile {profile}"
        )
    small, larger = divmod(count, pieces)
    return (small + 1,) * larger + (small,) * (pieces - larger)


def smallest_cuttable(count: int, profile: BatchProfile) -> int:
    """The smallest number of images, at least ``count``, that :func:`cut` takes."""
    pieces = max(1, -(-count // profile.max))
    return max(count, pieces * profile.min)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePort:
    """An input or output of the engine.

    ``smallest`` and ``largest`` bound an input's shape. An output has none: its shape follows.
    """

    name: str
    dtype: np.dtype[Any]
    smallest: Shape = ()
    largest: Shape = ()
    usual: Shape = ()

    def complaint(self, array: Array) -> str | None:
        """What keeps one batch from being fed here, the number of images aside."""
        shape = array.shape
        if array.dtype != self.dtype:
            return f"input {self.name} is {array.dtype}, the engine takes {self.dtype}"
        if len(shape) != len(self.smallest):
            return (
                f"input {self.name} has {len(shape)} axes {list(shape)}, the engine takes "
                f"{len(self.smallest)}"
            )
        for axis in range(1, len(shape)):
            low, high = self.smallest[axis], self.largest[axis]
            if not low <= shape[axis] <= high:
                taken = f"{low}" if low == high else f"{low} to {high}"
                return (
                    f"input {self.name} is {list(shape)}: axis {axis} is {shape[axis]}, the engine "
                    f"takes {taken}"
                )
        return None


def read_port(trt: Any, engine: Any, index: int) -> EnginePort:
    """Input or output ``index`` of a deserialized engine, with its first profile.

    Raises:
        InputError: it is of a type that numpy has not.
    """
    name = engine.get_tensor_name(index)
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise InputError(f"the engine's {name} is of type {kind}, which numpy does not have")
    dtype = np.dtype(_DTYPES[kind])
    if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
        return EnginePort(name=name, dtype=dtype)
    corners = [tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0)]
    if len(corners) != 3:
        corners = [tuple(engine.get_tensor_shape(name))] * 3
    smallest, usual, largest = corners
    return EnginePort(name=name, dtype=dtype, smallest=smallest, usual=usual, largest=largest)


def ordered(ports: tuple[EnginePort, ...], names: Sequence[str]) -> tuple[EnginePort, ...]:
    """The ``ports`` in the order of ``names``; without names, as they are.

    Raises:
        InputError: the names are not theirs.
    """
    found = {port.name: port for port in ports}
    if names and found.keys() != set(names):
        raise InputError(f"the engine's inputs are {', '.join(found)}, not {', '.join(names)}")
    return tuple(found[name] for name in names or found)
