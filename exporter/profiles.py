"""What an engine accepts: batch sizes, heights and widths, as text and as values.

Standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from models.variants import TOTAL_STRIDE


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """The batch sizes an engine accepts; the builder tunes for ``opt``."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"batch {self} must be min:opt:max with 1 <= min <= opt <= max")

    @classmethod
    def parse(cls, text: str) -> BatchProfile:
        """Read ``8`` (fixed) or ``1:8:32`` (min:opt:max).

        Raises:
            ValueError: for anything else.
        """
        if not re.fullmatch(r"\d+(:\d+:\d+)?", text.strip()):
            raise ValueError(f"batch {text!r} must be one number or min:opt:max, such as 1:8:32")
        numbers = [int(part) for part in text.split(":")]
        return cls(*(numbers * 3 if len(numbers) == 1 else numbers))

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


@dataclass(frozen=True, slots=True)
class SizeProfile:
    """The heights and widths an engine accepts, each min:opt:max in pixels."""

    height: tuple[int, int, int]
    width: tuple[int, int, int]

    def __post_init__(self) -> None:
        for low, opt, high in (self.height, self.width):
            if not 1 <= low <= opt <= high:
                raise ValueError(f"dynamic size {self} must be min <= opt <= max, min at least 1")

    @classmethod
    def parse(cls, text: str) -> SizeProfile:
        """Read ``64:96:128`` (both) or ``64:96:128x96:160:320`` (height x width).

        Raises:
            ValueError: for anything else.
        """
        one = r"(\d{1,5}):(\d{1,5}):(\d{1,5})"
        match = re.fullmatch(rf"{one}(?:x{one})?", text.strip().lower())
        if not match:
            raise ValueError(
                f"dynamic size {text!r} must be min:opt:max pixels such as 64:96:128, or "
                "64:96:128x96:160:320 (HxW)"
            )
        low, opt, high, *width = (int(part) for part in match.groups() if part is not None)
        height = (low, opt, high)
        return cls(height, (width[0], width[1], width[2]) if width else height)

    def holds(self, height: int, width: int) -> bool:
        """Whether an engine of this profile accepts this size."""
        return (
            self.height[0] <= height <= self.height[2] and self.width[0] <= width <= self.width[2]
        )

    def __str__(self) -> str:
        height, width = (":".join(map(str, extents)) for extents in (self.height, self.width))
        return height if height == width else f"{height}x{width}"


def parse_image_size(text: str) -> tuple[int, int]:
    """Read ``224`` or ``192x320`` (height x width, pixels).

    Raises:
        ValueError: for anything else, or less than the network's total stride.
    """
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip().lower())
    if not match:
        raise ValueError(f"image size {text!r} must be pixels such as 224, or 192x320 (HxW)")
    height, width = int(match[1]), int(match[2] or match[1])
    if min(height, width) < TOTAL_STRIDE:
        raise ValueError(f"image size {text} is below {TOTAL_STRIDE}, the network's total stride")
    return height, width
