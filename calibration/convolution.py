"""Running a chain's convolutions, with numpy and BLAS unless a caller knows better.

Tensors are indexed channel-first, ``[C, N, H, W]``: a convolution is then one matrix product,

    y = W P,    P = unfold(x)  [I kh kw, N OH OW],
                P[(c, i, j), (n, u, v)] = x[c, n, u stride + i, v stride + j],

whose result is channel-first again, and a group is a slice of the leading axis. The columns of P
are what second-order rounding takes moments of. P is up to kh kw times as large as x, so images
are unfolded a few at a time; results do not depend on how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from calibration.chain import Array, Chain, ConvStage, Float64Array, Gate
from calibration.parallel import on_all_cores

FloatArray = npt.NDArray[np.float32]
Int8Array = npt.NDArray[np.int8]

# Floats in one unfolded piece: 32 MiB, small beside the tensors, large enough for BLAS.
_PIECE = 1 << 23
# Images that one core works on at a time: their tensors fit into its cache.
_IMAGES = 4
_CHANNELS = 32
# |q| <= 128: float32 sums of this many products are exact.
_EXACT = 1024


Convolution = Callable[[FloatArray], FloatArray]
Folding = Callable[[FloatArray, tuple[int, ...]], FloatArray]


class Kernels(Protocol):
    """What runs a convolution; the functions of this module do, and so may something faster.

    Results need not agree to the last bit with any other implementation, only with themselves.
    """

    def convolution(self, stage: ConvStage) -> Convolution:
        """:func:`convolve` for one stage; may be called from several threads."""
        ...

    def folding(self, stage: ConvStage) -> Folding:
        """:func:`fold` for one stage; may be called from several threads."""
        ...

    def products(self, left: Int8Array, right: Int8Array) -> Float64Array:
        """As :func:`products`; may be called from several threads."""
        ...


def channel_first(images: FloatArray) -> FloatArray:
    """``[N, C, H, W]`` to ``[C, N, H, W]``, float32, and back: a view, of any layout in memory."""
    return np.asarray(images, dtype=np.float32).swapaxes(0, 1)


def unfold(stage: ConvStage, x: Array) -> Array:
    """The patches of ``x`` ``[C, N, H, W]``: ``[g, (I / g) kh kw, N OH OW]``, of its type."""
    top, left, bottom, right = stage.padding
    if any(stage.padding):
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    rows, columns = stage.output_size(x.shape[2] - top - bottom, x.shape[3] - left - right)
    (step_y, step_x), (gap_y, gap_x) = stage.stride, stage.dilation
    kernel_height, kernel_width = stage.weight.shape[2:]
    patches = np.empty(
        (len(x), kernel_height, kernel_width, x.shape[1], rows, columns), dtype=x.dtype
    )
    for i in range(kernel_height):
        for j in range(kernel_width):
            down = slice(i * gap_y, i * gap_y + (rows - 1) * step_y + 1, step_y)
            across = slice(j * gap_x, j * gap_x + (columns - 1) * step_x + 1, step_x)
            patches[:, i, j] = x[:, :, down, across]
    return patches.reshape(stage.groups, -1, x.shape[1] * rows * columns)


def mean_patch(stage: ConvStage, x: FloatArray) -> npt.NDArray[np.float64]:
    """The patches' mean over images and positions, ``[g, (I / g) kh kw]``.

    A convolution is linear: ``E[W * x] = W mean_patch(x)``, without convolving. Only the mean image
    is unfolded.
    """
    cuts = range(0, len(x), _CHANNELS)
    means = on_all_cores(lambda c: x[c : c + _CHANNELS].mean(axis=1, dtype=np.float64), cuts)
    return np.asarray(unfold(stage, np.concatenate(means)[:, None]).mean(axis=2))


def pieces(stage: ConvStage, x: FloatArray) -> Iterator[slice]:
    """Slices of the image axis whose patches fit into the working memory, in order."""
    rows, columns = stage.output_size(x.shape[2], x.shape[3])
    patch = stage.in_channels * stage.weight.shape[2] * stage.weight.shape[3]
    size = max(1, _PIECE // (patch * rows * columns))
    for start in range(0, x.shape[1], size):
        yield slice(start, start + size)


def patches_at(stage: ConvStage, x: FloatArray, places: npt.NDArray[np.intp]) -> FloatArray:
    """The columns ``places`` of ``unfold(stage, x)``, without the others."""
    image, row, column = np.unravel_index(
        places, (x.shape[1], *stage.output_size(x.shape[2], x.shape[3]))
    )
    top, left, bottom, right = stage.padding
    if any(stage.padding):
        x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    kernel_height, kernel_width = stage.weight.shape[2:]
    patches = np.empty((len(x), kernel_height, kernel_width, len(places)), dtype=np.float32)
    for i in range(kernel_height):
        down = row * stage.stride[0] + i * stage.dilation[0]
        for j in range(kernel_width):
            across = column * stage.stride[1] + j * stage.dilation[1]
            patches[:, i, j] = x[:, image, down, across]
    return patches.reshape(stage.groups, -1, len(places))


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


def fold(stage: ConvStage, gradient: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The gradient at the stage's input, ``shape`` ``[I, N, H, W]``: ``convolve`` transposed."""
    weight = stage.weight.reshape(stage.groups, stage.out_channels // stage.groups, -1)
    grouped = gradient.reshape(stage.groups, stage.out_channels // stage.groups, -1)
    patches = np.matmul(weight.astype(np.float32).transpose(0, 2, 1), grouped)
    kernel_height, kernel_width = stage.weight.shape[2:]
    rows, columns = gradient.shape[2:]
    patches = patches.reshape(shape[0], kernel_height, kernel_width, shape[1], rows, columns)
    top, left, bottom, right = stage.padding
    (step_y, step_x), (gap_y, gap_x) = stage.stride, stage.dilation
    out = np.zeros(
        (shape[0], shape[1], shape[2] + top + bottom, shape[3] + left + right), dtype=np.float32
    )
    for i in range(kernel_height):
        for j in range(kernel_width):
            down = slice(i * gap_y, i * gap_y + (rows - 1) * step_y + 1, step_y)
            across = slice(j * gap_x, j * gap_x + (columns - 1) * step_x + 1, step_x)
            out[:, :, down, across] += patches[:, i, j]
    return out[:, :, top : top + shape[2], left : left + shape[3]]


def products(left: Int8Array, right: Int8Array) -> Float64Array:
    """``left @ right`` of integers ``[blocks, c, m]`` and ``[blocks, m, d]``, exactly."""
    found = np.zeros((left.shape[0], left.shape[1], right.shape[2]))
    for start in range(0, left.shape[2], _EXACT):
        part = slice(start, start + _EXACT)
        found += np.matmul(left[:, :, part].astype(np.float32), right[:, part].astype(np.float32))
    return found


class NumpyKernels:
    """The functions of this module."""

    def convolution(self, stage: ConvStage) -> Convolution:
        return partial(convolve, stage)

    def folding(self, stage: ConvStage) -> Folding:
        return partial(fold, stage)

    def products(self, left: Int8Array, right: Int8Array) -> Float64Array:
        return products(left, right)


NUMPY = NumpyKernels()


def opening(gate: Gate, y: FloatArray) -> FloatArray:
    """The gate's factor for each channel and image, ``[C, N, 1, 1]``."""
    mean = y.mean(axis=(2, 3), dtype=np.float64)
    hidden = np.maximum(gate.down @ mean + gate.down_bias[:, None], 0)
    # Written so that exp cannot overflow.
    raised = 0.5 + 0.5 * np.tanh(0.5 * (gate.up @ hidden + gate.up_bias[:, None]))
    return np.asarray(raised[:, :, None, None], dtype=np.float32)


def finish(stage: ConvStage, y: FloatArray) -> FloatArray:
    """What follows the convolution and its bias: ReLU and the gate. ``y`` is overwritten."""
    if stage.gate is not None and not stage.gate.after_relu:
        y *= opening(stage.gate, y)
    if stage.relu:
        np.maximum(y, 0, out=y)
    if stage.gate is not None and stage.gate.after_relu:
        y *= opening(stage.gate, y)
    return y


def run_stage(stage: ConvStage, x: FloatArray, kernels: Kernels = NUMPY) -> FloatArray:
    """One stage in float32: ``[I, N, H, W]`` to ``[O, N, OH, OW]``, on all cores."""
    convolution = kernels.convolution(stage)
    bias = stage.bias.astype(np.float32)[:, None, None, None]

    def work(images: slice) -> FloatArray:
        y = convolution(x[:, images])
        y += bias
        return finish(stage, y)

    size = stage.output_size(x.shape[2], x.shape[3])
    return _by_images(work, (stage.out_channels, x.shape[1], *size))


def fold_stage(
    stage: ConvStage, gradient: FloatArray, shape: tuple[int, ...], kernels: Kernels = NUMPY
) -> FloatArray:
    """:func:`fold`, on all cores."""
    folding = kernels.folding(stage)

    def work(images: slice) -> FloatArray:
        part = gradient[:, images]
        return folding(part, (shape[0], part.shape[1], *shape[2:]))

    return _by_images(work, shape)


def _by_images(work: Callable[[slice], FloatArray], shape: tuple[int, ...]) -> FloatArray:
    """The results of a few images at a time, whatever the number of cores, in one tensor.

    It lies image by image in memory.
    """
    out = np.empty((shape[1], shape[0], *shape[2:]), dtype=np.float32).swapaxes(0, 1)

    def place(images: slice) -> None:
        out[:, images] = work(images)

    on_all_cores(place, [slice(i, i + _IMAGES) for i in range(0, shape[1], _IMAGES)])
    return out


def classify(chain: Chain, x: FloatArray) -> npt.NDArray[Any]:
    """The logits ``[N, K]`` of the last stage's output."""
    pooled = x.mean(axis=(2, 3), dtype=np.float64)
    return np.asarray((chain.classifier.weight @ pooled + chain.classifier.bias[:, None]).T)


def run_chain(chain: Chain, images: FloatArray, kernels: Kernels = NUMPY) -> npt.NDArray[Any]:
    """Logits ``[N, K]`` of ``images`` ``[N, C, H, W]``, in float32."""
    x = channel_first(images)
    for stage in chain.stages:
        x = run_stage(stage, x, kernels)
    return classify(chain, x)
