"""The images that every stage is run on: how many there is room for, and in which sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import islice
from typing import TypeVar

from exporter.graph.prologue import Prologue
from exporter.network import Interface, resized
from exporter.profiles import SizeProfile
from exporter.running.image_set import Advance, ImageSet, Sizes, outputs_of, sizes_of
from exporter.running.onnx_runner import BATCH_SIZE, Batch, Outputs, Runner, joined

MAX_OUTPUT_BYTES = 256 << 20
"""Of the original's outputs that are kept to compare with; large feature maps need fewer images."""

PIXELS_ON_THE_WAY = 64 * 224 * 224
"""Of the images on which graphs are compared that lead to the one that is built: float32 leaves no
image to chance, and on 512 images of 224 x 224 these stages were two thirds of an export."""

Result = TypeVar("Result")


class JudgedImages:
    """The first ``count`` of ``images``; ``limit`` batches of them, None for all.

    With a dynamic ``size`` the first batch is there at the profile's smallest and largest size too,
    rounded to whole pixels where a ``prologue`` will ask for such.
    """

    def __init__(
        self,
        images: ImageSet,
        interface: Interface,
        size: SizeProfile | None,
        prologue: Prologue | None,
    ) -> None:
        self.images = images
        self.count = images.count
        self.limit: int | None = None
        self._interface = interface
        self._size = size
        self._prologue = prologue

    def make_room(self, image_bytes: int) -> None:
        """Fewer images, if outputs of so many bytes each are too many to keep."""
        if self.count * image_bytes > MAX_OUTPUT_BYTES:
            self.limit = max(1, MAX_OUTPUT_BYTES // (image_bytes * BATCH_SIZE))
            self.count = sum(len(batch[0]) for batch in self._own_batches())

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the comparison."""
        if self.count == self.images.count:
            return ()
        return (
            f"parity is measured on the first {self.count} of {self.images.count} images, "
            f"because the network's outputs are large",
        )

    def outputs(self, run: Runner) -> Outputs:
        """What a network makes of :meth:`batches`."""
        return joined(self.in_parts(partial(outputs_of, run, own=self._own_sizes)))

    def few_outputs(self, run: Runner, batches: int) -> Outputs:
        """What it makes of the first ``batches``, which :meth:`few_batches` allows."""
        return outputs_of(run, islice(self.images.batches(), batches))

    @cached_property
    def _own_sizes(self) -> Sizes:
        return sizes_of(self.first_batch())

    def few_batches(self) -> int | None:
        """How many, full ones, are enough where rounding alone may differ; None: all."""
        # With a free size neighbours may differ in size, and every size has outputs of its own.
        if self._size is not None:
            return None
        shapes = [shape for shape in self._interface.example if len(shape) == 4]
        pixels = sum(height * width for _, _, height, width in shapes)
        few = max(1, PIXELS_ON_THE_WAY // (max(1, pixels) * BATCH_SIZE))
        return few if shapes and few * BATCH_SIZE < self.count else None

    def first_batch(self) -> Batch:
        """A few of the images."""
        return next(self.images.batches())

    def batches(self) -> Iterator[Batch]:
        """Everything that each stage is run on."""
        yield from self._own_batches()
        yield from self._further_batches()

    def in_parts(self, work: Callable[[Iterator[Batch]], Result]) -> list[Result]:
        """``work`` on :meth:`batches`, or on parts of them that follow one another.

        ``work`` has to travel as :mod:`exporter.running.spread` says. Where not all images are
        compared, outputs are so large that they had better stay in one process.
        """
        if self.limit is not None:
            return [work(self.batches())]
        found = self.images.in_parts(partial(_on_batches, work))
        if self._further_sizes():
            found.append(work(self._further_batches()))
        return found

    def samples(self, count: int) -> list[Batch]:
        """The first ``count`` images, in each size."""
        batch = tuple(array[:count] for array in self.first_batch())
        return [batch, *(self._resized(batch, sides) for sides in self._further_sizes())]

    def _own_batches(self) -> Iterator[Batch]:
        return islice(self.images.batches(), self.limit)

    def _further_batches(self) -> Iterator[Batch]:
        for sides in self._further_sizes():
            yield self._resized(self.first_batch(), sides)

    def _resized(self, batch: Batch, sides: tuple[int, int]) -> Batch:
        found = resized(batch, sides, self._interface)
        return found if self._prologue is None else self._prologue.whole(found)

    def _further_sizes(self) -> list[tuple[int, int]]:
        size = self._size
        if size is None:
            return []
        own = next(shape[2:] for shape in self._interface.example if len(shape) == 4)
        ends = [(size.height[end], size.width[end]) for end in (0, 2)]
        return [end for end in dict.fromkeys(ends) if end != own]


def _on_batches(
    work: Callable[[Iterator[Batch]], Result], images: ImageSet, _advance: Advance
) -> Result:
    return work(images.batches())
