"""Second moments of 3x3 patches from the input's autocorrelation, without unfolding it.

A patch at position p holds x_c(p + t) for the nine taps t, and x is zero outside the image. Summed
over *all* positions p of the plane, the product of two entries depends on the taps' difference d
alone,

    sum_p x_c(p + t) x_c'(p + t') = R_d[c, c'],   R_d = sum_q x(q) x(q + d)^T,   d = t' - t,

and R_-d = R_d^T. So 13 matrices C x C make up all 81 blocks, at a third of the cost of the
symmetric product of the unfolded patches. With two zeros behind every row and two rows of zeros
behind every image, x(q + d) is a constant offset in memory: the factors of R_d are two views.

The plane has positions that the output has not. Those with a patch that is not zero form the ring
around the image; on its top side, u = -1, only the taps of the kernel's last row see anything,

    sum_v x(0, v + j) x(0, v + j')^T = T_{j' - j}   if i = i' = 2,

the autocorrelation of the image's first row; likewise the other three sides. All four are taken
off, and the corners, which lie on two sides, are added again.

Every sum is one of products of integers: the result is exact, and equal to that of unfolding.
"""

from __future__ import annotations

import numpy as np

from calibration.chain import ConvStage, Float64Array
from calibration.convolution import NUMPY, FloatArray, Int8Array, Kernels
from calibration.parallel import on_all_cores

_PAD = 2
_FIRST, _LAST = 2, 0
"""The tap that sees the image's first (last) row from outside."""


def correlates(stage: ConvStage) -> bool:
    """Whether ``stage`` is a 3x3 convolution of stride 1 and padding 1."""
    return (
        stage.weight.shape[2:] == (3, 3)
        and stage.stride == stage.dilation == (1, 1)
        and stage.padding == (1, 1, 1, 1)
    )


def patch_products(q: FloatArray, blocks: int, kernels: Kernels = NUMPY) -> Float64Array:
    """Sums over images and positions of patch products: ``[blocks, n, n]``, ``n = 9 C / blocks``.

    ``q`` ``[C, N, H, W]`` holds integers of at most 128. Columns are ordered (channel, tap).
    """
    channels = len(q) // blocks
    plane, rows, columns = _plane(q), _sides(q, axis=2), _sides(q, axis=3)
    corners = {
        (i, j): _corner(q[:, :, _edge(i), _edge(j)], blocks, kernels)
        for i in (_FIRST, _LAST)
        for j in (_FIRST, _LAST)
    }
    pitch = q.shape[3] + _PAD
    whole = _correlations(
        plane,
        blocks,
        {(y, x): y * pitch + x for y in range(3) for x in range(-2, 3) if (y, x) >= (0, 0)},
        kernels,
    )
    along = {
        (axis, tap): _correlations(side, blocks, {(0, d): d for d in range(3)}, kernels)
        for axis, sides in ((2, rows), (3, columns))
        for tap, side in sides.items()
    }
    found = np.empty((blocks, channels, 9, channels, 9))
    for left in range(9):
        for right in range(left, 9):
            (i, j), (k, m) = divmod(left, 3), divmod(right, 3)
            block = whole[k - i, m - j].copy()
            if i == k and i != 1:
                block -= _signed(along[2, i], m - j)
            if j == m and j != 1:
                block -= _signed(along[3, j], k - i)
            if i == k and j == m and (i, j) in corners:
                block += corners[i, j]
            found[:, :, left, :, right] = block
            if left != right:
                found[:, :, right, :, left] = block.swapaxes(1, 2)
    return found.reshape(blocks, 9 * channels, 9 * channels)


def _corner(x: FloatArray, blocks: int, kernels: Kernels) -> Float64Array:
    shifts = {(0, 0): 0}
    return _correlations(x.astype(np.int8), blocks, shifts, kernels)[0, 0]


def _edge(tap: int) -> int:
    return 0 if tap == _FIRST else -1


def _plane(q: FloatArray) -> Int8Array:
    """The images one behind the other with zeros between: ``[C, N (H + 2) (W + 2)]``."""
    channels, images, height, width = q.shape
    padded = np.zeros((channels, images, height + _PAD, width + _PAD), dtype=np.int8)
    padded[:, :, :height, :width] = q
    return padded.reshape(channels, -1)


def _sides(q: FloatArray, axis: int) -> dict[int, Int8Array]:
    """First and last row (or column) of every image with zeros between, by the tap they belong to.

    ``axis`` is the one that is taken at its ends.
    """
    found = {}
    for tap in (_FIRST, _LAST):
        line = np.moveaxis(q, axis, 0)[_edge(tap)]
        padded = np.pad(line.astype(np.int8), ((0, 0), (0, 0), (0, _PAD)))
        found[tap] = padded.reshape(len(q), -1)
    return found


def _correlations(
    x: Int8Array, blocks: int, shifts: dict[tuple[int, int], int], kernels: Kernels
) -> dict[tuple[int, int], Float64Array]:
    """``sum_q x(q) x(q + shift)^T``, ``[blocks, c, c]``, for each shift of ``x`` ``[C, m]``."""
    left = x.reshape(blocks, len(x) // blocks, -1)
    length = left.shape[2]
    # What follows the last position is zero too.
    right = np.zeros((blocks, length + max(shifts.values()), left.shape[1]), dtype=np.int8)
    right[:, :length] = left.swapaxes(1, 2)

    def work(shift: int) -> Float64Array:
        return kernels.products(left, right[:, shift : shift + length])

    return dict(zip(shifts, on_all_cores(work, shifts.values()), strict=True))


def _signed(lines: dict[tuple[int, int], Float64Array], shift: int) -> Float64Array:
    """The autocorrelation at ``shift`` of either sign: that at -d is the transpose."""
    block = lines[0, abs(shift)]
    return block if shift >= 0 else block.swapaxes(1, 2)
