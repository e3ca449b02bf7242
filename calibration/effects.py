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
back onto the positions the patches came from. A gate is taken as constant: on trained networks
its own derivative gives the same SQNR.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from calibration.chain import Chain, Float64Array
from calibration.clipping import input_scale, quantize_input
from calibration.convolution import (
    NUMPY,
    FloatArray,
    Kernels,
    channel_first,
    fold_stage,
    opening,
    run_stage,
)
from calibration.parallel import on_all_cores

# What a backward pass holds at once, activations at every stage: more images if they are small.
_IMAGES = 8
_PIXELS = 8 * 224 * 224
_SEED = 20260


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageGradient:
    """One stage's input ``x`` ``[I, N, H, W]`` and the gradients there and at its result.

    ``gradient`` ``[O, N, OH, OW]`` belongs to the result, ``at_input`` to ``x``.
    """

    index: int
    x: FloatArray
    gradient: FloatArray
    at_input: FloatArray

    def at_scaled_input(self, scale: Float64Array | None) -> StageGradient:
        """The same in a chain whose boundary in front of the stage is divided by ``scale`` ``[I]``.

        ``gradient`` stays that of the unscaled result.
        """
        if scale is None:
            return self
        factor = scale.astype(np.float32)[:, None, None, None]
        return replace(self, x=self.x / factor, at_input=self.at_input * factor)


def gradients(
    chain: Chain, images: FloatArray, kernels: Kernels = NUMPY
) -> Iterator[StageGradient]:
    """The stages from last to first, for a few images at a time; ``images`` is ``[N, C, H, W]``.

    Deterministic: the projection of an image depends on its place in ``images`` only.
    """
    generator = np.random.default_rng(_SEED)
    classes = len(chain.classifier.bias)
    signs = generator.choice(np.array([-1.0, 1.0]), size=(len(images), classes))
    size = max(_PIXELS // (images.shape[2] * images.shape[3]), _IMAGES)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        yield from _backward(chain, channel_first(images[part]), signs[part], kernels)


def _backward(
    chain: Chain, images: FloatArray, signs: Float64Array, kernels: Kernels
) -> Iterator[StageGradient]:
    inputs = [images]
    for stage in chain.stages:
        inputs.append(run_stage(stage, inputs[-1], kernels))
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
            y = kernels.convolution(stage)(x) + stage.bias.astype(np.float32)[:, None, None, None]
            if stage.relu and stage.gate.after_relu:
                np.maximum(y, 0, out=y)
            gradient = gradient * opening(stage.gate, y)
        at_input = fold_stage(stage, gradient, x.shape, kernels)
        yield StageGradient(index=index, x=x, gradient=gradient, at_input=at_input)
        gradient = at_input


def measured_effects(
    chain: Chain, images: FloatArray, kernels: Kernels = NUMPY
) -> list[Float64Array]:
    """G ``[O]`` of each stage, measured on ``images`` ``[N, C, H, W]``."""
    return effects_of(chain, gradients(chain, images, kernels), len(images))


def effects_of(chain: Chain, steps: Iterable[StageGradient], count: int) -> list[Float64Array]:
    """:func:`measured_effects` by the gradients of ``count`` images."""
    found = [np.zeros(stage.out_channels) for stage in chain.stages]
    for step in steps:
        found[step.index] += power(step.gradient)
    return [effect / count for effect in found]


def power(gradient: FloatArray) -> Float64Array:
    """The sum of squares of each channel ``[O]`` of ``[O, N, H, W]``."""
    channels = np.einsum("cnhw,cnhw->cn", gradient, gradient)
    return np.asarray(channels.sum(axis=1, dtype=np.float64))


def logit_power(gradient: FloatArray, error: FloatArray) -> float:
    """Sum over images of the squared first-order effect of ``error``, of the same shape."""
    moved = np.einsum("cnhw,cnhw->cn", gradient, error).sum(axis=0, dtype=np.float64)
    return float(moved @ moved)


def clip_effects(
    steps: Iterable[StageGradient],
    clips: Sequence[Mapping[str, float]],
    count: int,
    *,
    unsigned: Sequence[bool] | None = None,
) -> list[dict[str, float]]:
    """Error power in the logits of quantizing each stage's input at each named clip value.

    ``steps`` are the gradients of ``count`` images.

    ``clips[l]`` belongs to the input of stage l, ``unsigned[l]`` says that its integers are 0 to
    255. Weights stay exact, so the error that an input error makes in the result need not be
    computed: its effect is that of the input error itself, judged by the gradient at the input.
    """
    found = [dict.fromkeys(named, 0.0) for named in clips]
    for step in steps:
        named = clips[step.index]
        different = sorted(set(named.values()))
        without_sign = unsigned is not None and unsigned[step.index]
        power_at = partial(_rounding_power, step, unsigned=without_sign)
        powers = on_all_cores(power_at, different)
        for name, clip in named.items():
            found[step.index][name] += powers[different.index(clip)] / count
    return found


def _rounding_power(step: StageGradient, clip: float, *, unsigned: bool) -> float:
    """The effect on the logits of rounding the stage's input at ``clip``."""
    scale = input_scale(clip, unsigned=unsigned)
    error = quantize_input(step.x, scale, unsigned=unsigned)
    error *= np.float32(scale)
    error -= step.x
    return logit_power(step.at_input, error)
