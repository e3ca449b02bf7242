"""The shapes that an engine accepts, from the model's open extents and what was asked for."""

from __future__ import annotations

from exporter.engine.backend import BuildRequest
from exporter.engine.refusal import BadInputError


def profile_shapes(name: str, shape: tuple[int, ...], request: BuildRequest) -> list[list[int]]:
    """The input's smallest, usual and largest shape: open extents come from the request.

    Raises:
        BadInputError: if a fixed batch is another one, or another extent is open.
    """
    batch, size = request.batch, request.size
    first, *rest = shape
    extents = [(extent,) * 3 for extent in shape]
    if first >= 0 and {batch.min, batch.opt, batch.max} != {first}:
        raise BadInputError(
            f"input {name!r} has a fixed batch of {first}, but batch {batch} was asked "
            "for: export the model with an open batch, or ask for this one"
        )
    extents[0] = (batch.min, batch.opt, batch.max)
    if size is not None and len(shape) == 4:
        # Pixels may come with their channels last: [N, H, W, 3].
        height = 1 if shape[1] < 0 and shape[3] == 3 else 2
        for axis, opened in ((height, size.height), (height + 1, size.width)):
            extents[axis] = opened if shape[axis] < 0 else extents[axis]
    if any(extent < 0 for low in extents for extent in low):
        allowed = "only the batch" if size is None else "only batch, height and width"
        raise BadInputError(
            f"input {name!r} has shape {[first, *rest]}: {allowed} may be open (-1)"
        )
    return [list(corner) for corner in zip(*extents, strict=True)]
