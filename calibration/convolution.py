"""Running a chain's convolutions with numpy and BLAS, on a few images.

Tensors are channel-first, ``[C, N, H, W]``: a convolution is then one matrix product,

    y = W P,    P = unfold(x)  [I kh kw, N OH OW],
                P[(c, i, j), (n, u, v)] = x[c, n, u stride + i, v stride + j],

whose result is channel-first again, and a group is a slice of the leading axis. The columns of P
are what second-order rounding takes moments of. P is up to kh kw times as large as x, so images
are unfolded a few at a time; results do not depend on how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.chain import Chain, ConvStage, Gate

FloatArray = npt.NDArray[np.float32]

# Floats in one unfolded piece: 32 MiB, small beside the tensors, large enough for BLAS.
_PIECE = 1 << 23


def channel_first(images: FloatArray) -> FloatArray:
    """``[N, C, H, W]`` to ``[C, N, H, W]``, float32 and contiguous; the same call goes back."""
    return np.ascontiguousarray(images.swapaxes(0, 1), dtype=np.float32)


def unfold(stage: ConvStage, x: FloatArray) -> FloatArray:
    """The patches of ``x`` ``[C, N, H, W]``: ``[g, (I / g) kh kw, N OH OW]`` float32."""
    top, left, bottom, right = stage.padding
    if any(stage.padding):
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    rows, columns = stage.output_size(x.shape[2] - top - bottom, x.shape[3] - left - right)
    (step_y, step_x), (gap_y, gap_x) = stage.stride, stage.dilation
    kernel_height, kernel_width = stage.weight.shape[2:]
    patches = np.empty(
        (len(x), kernel_height, kernel_width, x.shape[1], rows, columns), dtype=np.float32
    )
    for i in range(kernel_height):
        for j in range(kernel_width):
            down = slice(i * gap_y, i * gap_y + (rows - 1) * step_y + 1, step_y)
            across = slice(j * gap_x, j * gap_x + (columns - 1) * step_x + 1, step_x)
            patches[:, i, j] = x[:, :, down, across]
    return patches.reshape(stage.groups, -1, x.shape[1] * rows * columns)


def pieces(stage: ConvStage, x: FloatArray) -> Iterator[slice]:
    """Slices of the image axis whose patches fit into the working memory, in order."""
    rows, columns = stage.output_size(x.shape[2], x.shape[3])
    patch = stage.in_channels * stage.weight.shape[2] * stage.weight.shape[3]
    size = max(1, _PIECE // (patch * rows * columns))
    for start in range(0, x.shape[1], size):
        yield slice(start, start + size)


def visit_patches(stage: ConvStage, x: FloatArray, visit: Callable[[FloatArray], None]) -> None:
    """Call ``visit`` with the patches of a few images at a time, in order."""
    for images in pieces(stage, x):
        visit(unfold(stage, x[:, images]))


def convolve(stage: ConvStage, x: FloatArray) -> FloatArray:
    """``W * x`` without the bias: ``[O, N, OH, OW]`` float32."""
    rows, columns = stage.output_size(x.shape[2], x.shape[3])
    out = np.empty((stage.out_channels, x.shape[1], rows, columns), dtype=np.float32)
    weight = stage.weight.reshape(stage.groups, stage.out_channels // stage.groups, -1)
    weight = weight.astype(np.float32)
    for images in pieces(stage, x):
        patches = unfold(stage, x[:, images])
        out[:, images] = np.matmul(weight, patches).reshape(stage.out_channels, -1, rows, columns)
    return out


def opening(gate: Gate, y: FloatArray) -> FloatArray:
    """The gate's factor for each channel and image, ``[C, N, 1, 1]``."""
    mean = y.mean(axis=(2, 3), dtype=np.float64)
    hidden = np.maximum(gate.down @ mean + gate.down_bias[:, None], 0)
    # Written so that exp cannot overflow.
    raised = 0.5 + 0.5 * np.tanh(0.5 * (gate.up @ hidden + gate.up_bias[:, None]))
    return np.asarray(raised[:, :, None, None], dtype=np.float32)


def finish(stage: ConvStage, y: FloatArray) -> FloatArray:
    """What follows the convolution and its bias: the gate, then ReLU. ``y`` is overwritten."""
    if stage.gate is not None:
        y *= opening(stage.gate, y)
    if stage.relu:
        np.maximum(y, 0, out=y)
    return y


def run_stage(stage: ConvStage, x: FloatArray) -> FloatArray:
    """One stage in float32: ``[I, N, H, W]`` to ``[O, N, OH, OW]``."""
    y = convolve(stage, x)
    y += stage.bias.astype(np.float32)[:, None, None, None]
    return finish(stage, y)


def classify(chain: Chain, x: FloatArray) -> npt.NDArray[Any]:
    """The logits ``[N, K]`` of the last stage's output."""
    pooled = x.mean(axis=(2, 3), dtype=np.float64)
    return np.asarray((chain.classifier.weight @ pooled + chain.classifier.bias[:, None]).T)


def run_chain(chain: Chain, images: FloatArray) -> npt.NDArray[Any]:
    """Logits ``[N, K]`` of ``images`` ``[N, C, H, W]``, in float32 with numpy alone."""
    x = channel_first(images)
    for stage in chain.stages:
        x = run_stage(stage, x)
    return classify(chain, x)
