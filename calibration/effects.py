"""What an error inside the chain does to the logits, to first order, measured on real images.

One backward pass per image with a random projection r of the logits, r_k = +-1, gives the gradient
h_l = d(r . logits) / d y_l of every stage. A small error e_l in the stage's result y_l, whatever
made it, moves the projection by

    r . dlogits = sum over channels and positions of h_l e_l,     E_r (r . d)^2 = |d|^2,

so the mean over images of its square is the error power in the logits. Errors that agree from
position to position, as those of clipping and of rounded weights do, count as such: this is what
tells a harmful clip from a harmless one. For independent errors of unit variance it is

    G_l,o = mean over images of sum over positions h_l^2      (``measured_effects``).

A backward pass is one transposed convolution per stage: the patches' gradient ``W^T h``, folded
back onto the positions the patches came from. A gate is taken as constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.chain import Chain, ConvStage, Float64Array
from calibration.clipping import input_scale, quantize_input
from calibration.convolution import FloatArray, channel_first, convolve, opening, run_stage

# Images a backward pass holds at once: their activations at every stage are in memory.
_IMAGES = 8
_SEED = 20260


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageGradient:
    """One stage's input ``[I, N, H, W]`` and the gradient ``[O, N, OH, OW]`` at its result."""

    index: int
    x: FloatArray
    gradient: FloatArray


def gradients(chain: Chain, images: FloatArray) -> Iterator[StageGradient]:
    """The stages from last to first, for a few images at a time; ``images`` is ``[N, C, H, W]``.

    Deterministic: the projection of an image depends on its place in ``images`` only.
    """
    generator = np.random.default_rng(_SEED)
    classes = len(chain.classifier.bias)
    signs = generator.choice(np.array([-1.0, 1.0]), size=(len(images), classes))
    for start in range(0, len(images), _IMAGES):
        part = slice(start, start + _IMAGES)
        yield from _backward(chain, channel_first(images[part]), signs[part])


def _backward(chain: Chain, images: FloatArray, signs: Float64Array) -> Iterator[StageGradient]:
    inputs = [images]
    for stage in chain.stages:
        inputs.append(run_stage(stage, inputs[-1]))
    last = inputs[-1]
    share = (signs @ chain.classifier.weight).T / (last.shape[2] * last.shape[3])
    gradient = np.broadcast_to(share.astype(np.float32)[:, :, None, None], last.shape)
    for index in reversed(range(len(chain.stages))):
        stage = chain.stages[index]
        result = inputs.pop()
        x = inputs[-1]
        if stage.relu:
            gradient = gradient * (result > 0)
        if stage.gate is not None:
            y = convolve(stage, x) + stage.bias.astype(np.float32)[:, None, None, None]
            gradient = gradient * opening(stage.gate, y)
        yield StageGradient(index=index, x=x, gradient=gradient)
        if index:
            gradient = fold(stage, gradient, x.shape)


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


def measured_effects(chain: Chain, images: FloatArray) -> list[Float64Array]:
    """G ``[O]`` of each stage, measured on ``images`` ``[N, C, H, W]``."""
    found = [np.zeros(stage.out_channels) for stage in chain.stages]
    for step in gradients(chain, images):
        found[step.index] += np.einsum(
            "cnhw,cnhw->c", step.gradient, step.gradient, dtype=np.float64
        )
    return [effect / len(images) for effect in found]


def logit_power(gradient: FloatArray, error: FloatArray) -> float:
    """Sum over images of the squared first-order effect of ``error`` ``[O, N, OH, OW]``."""
    moved = np.einsum("cnhw,cnhw->n", gradient, error, dtype=np.float64)
    return float(moved @ moved)


def clip_effects(
    chain: Chain, clips: Sequence[Mapping[str, float]], images: FloatArray
) -> list[dict[str, float]]:
    """Error power in the logits of quantizing each stage's input at each named clip value.

    ``clips[l]`` belongs to the input of stage l. Weights stay exact.
    """
    found = [dict.fromkeys(named, 0.0) for named in clips]
    for step in gradients(chain, images):
        stage = chain.stages[step.index]
        exact = convolve(stage, step.x)
        done: dict[float, float] = {}
        for name, clip in clips[step.index].items():
            if clip not in done:
                scale = input_scale(clip)
                rounded = quantize_input(step.x, scale) * np.float32(scale)
                done[clip] = logit_power(step.gradient, convolve(stage, rounded) - exact)
            found[step.index][name] += done[clip] / len(images)
    return found
