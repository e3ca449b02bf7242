"""Exact per-channel rescaling of a chain that makes its INT8 noise least.

*Canonical* scaling divides every channel by its largest magnitude, ``s_i = max(a_i, 1e-3 max a)``.
Float outputs stay, and so does everything that follows: the result no longer depends on how the
checkpoint happened to be scaled.

*Noise-model* scaling goes on from there, ``s_i = a_i exp(t_i)``. With the noise model of
:mod:`calibration.noise`, a positive input scaled to at most 1 and the constant 1 / (12 * 127^2)
left out, the noise of the stage that reads boundary l is

    J_l(t) = sum_o G_o [ sum_i |W_oi|^2 p_i s_i^2
                         + gamma (max_i |W_oi| s_i)^2 k sum_i e_i / s_i^2 ]

with e_i = var(x_i), and t_i >= 0, because s_i < a_i would clip. A channel that is scaled down
(t_i > 0) has smaller weights, which is fewer levels for its own activation and finer steps for the
weights of the others. J is a sum of products of powers and of maxima of powers of exp(t): a
geometric program, convex in t, so that Adam with a projection onto ``0 <= t <= log(bound)`` finds
the one minimum. The scale of a stage's *output* does not occur: weights are scaled per output
channel, and G_o takes up what W_o gives. Boundaries are therefore independent.

With one weight scale per *tensor* they are not. Let r_o be the scale of the output; then

    (max_i |W_oi| s_i)^2    becomes    (max_o',i |W_o'i| s_i / r_o')^2 r_o^2,

still convex in all t together. Depthwise kernels have one input per output, the second term does
not depend on s, and canonical scaling is the optimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from calibration.chain import Array, Chain, ChainError, ConvStage, Float64Array, rescale
from calibration.moments import ChannelStatistics
from calibration.noise import SECOND_ORDER, passing, require_effects, require_statistics

_FLOOR = 1e-3
_STEPS = 100
_RATE = 0.1


class Scaling(str, Enum):
    """How far equalization goes; the module docstring defines each."""

    NONE = "none"
    CANONICAL = "canonical"
    NOISE = "noise"


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualizeOptions:
    """``bound`` limits exp(t); ``power_of_two`` makes the float weights change exactly."""

    scaling: Scaling = Scaling.NOISE
    gamma: float = SECOND_ORDER
    bound: float = 1000.0
    power_of_two: bool = False
    per_tensor_weights: bool = False

    def __post_init__(self) -> None:
        if not self.bound >= 1 or not self.gamma >= 0:
            raise ValueError("bound must be at least 1 and gamma at least 0")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Equalization:
    """The rescaled chain, the statistics of its boundaries, and the divisor of each boundary.

    ``scales[l]`` belongs to the output of stage l; None where it stays as it was.
    """

    chain: Chain
    statistics: tuple[ChannelStatistics, ...]
    scales: tuple[Float64Array | None, ...]


def equalize(
    chain: Chain,
    statistics: Sequence[ChannelStatistics],
    effects: Sequence[Float64Array],
    options: EqualizeOptions | None = None,
) -> Equalization:
    """Rescale every scalable boundary of ``chain``.

    ``statistics`` are those of its boundaries, ``effects`` the G_o of its stages. The classifier's
    own input takes the canonical scale.

    Raises:
        ChainError: if statistics or effects do not fit the chain.
    """
    options = options or EqualizeOptions()
    require_statistics(chain, statistics)
    require_effects(chain, effects)
    scales: list[Float64Array | None] = [None] * len(chain.stages)
    if options.scaling is not Scaling.NONE:
        canonical = [
            _canonical(found) if stage.scalable else None
            for stage, found in zip(chain.stages, statistics[1:], strict=True)
        ]
        scales = [_finish(scale, options) for scale in canonical]
        if options.scaling is Scaling.NOISE:
            problem = _Problem(chain, statistics, effects, canonical, options)
            scales = [_finish(scale, options) for scale in problem.solve()]
    moved = tuple(
        found if scale is None else found.divided_by(scale)
        for found, scale in zip(statistics[1:], scales, strict=True)
    )
    return Equalization(
        chain=rescale(chain, scales), statistics=(statistics[0], *moved), scales=tuple(scales)
    )


def equalization_error(before: Array, after: Array) -> float:
    """The largest change of a logit as a share of the largest logit, of both chains' logits."""
    changed = np.abs(after - before).max()
    return float(changed / max(np.abs(before).max(), np.finfo(np.float32).tiny))


def require_equal(before: Array, after: Array, limit: float = 1e-5) -> None:
    """Raises ChainError if rescaling changed the float logits by more than ``limit``."""
    error = equalization_error(before, after)
    if not error <= limit:
        raise ChainError(
            f"equalization changed the float logits by {error:.1e} of their range, more than "
            f"{limit:.0e}; leave the chain unscaled, or mark the boundary that does not commute"
        )


def _canonical(statistics: ChannelStatistics) -> Float64Array:
    largest = statistics.abs_max
    top = float(largest.max())
    return np.maximum(largest, _FLOOR * top) if top > 0 else np.ones_like(largest)


def binary_scale(largest: Float64Array) -> Float64Array:
    """Canonical scaling to the nearest power of two, for channels of ``largest`` magnitude ``[C]``.

    Only exponents of the float weights change, so the float network stays the same bit for bit.
    """
    top = float(largest.max())
    bounded = np.maximum(largest, _FLOOR * top) if top > 0 else np.ones_like(largest)
    return np.asarray(np.exp2(np.rint(np.log2(bounded))), dtype=np.float64)


def _finish(scale: Float64Array | None, options: EqualizeOptions) -> Float64Array | None:
    if scale is None or not options.power_of_two:
        return scale
    return np.asarray(np.exp2(np.rint(np.log2(scale))), dtype=np.float64)


class _Problem:
    """J of all boundaries as a function of all t, in canonical units."""

    def __init__(
        self,
        chain: Chain,
        statistics: Sequence[ChannelStatistics],
        effects: Sequence[Float64Array],
        canonical: list[Float64Array | None],
        options: EqualizeOptions,
    ) -> None:
        self._canonical = canonical
        self._options = options
        scaled = rescale(chain, canonical)
        moved = [
            found if scale is None else found.divided_by(scale)
            for found, scale in zip(statistics, [None, *canonical], strict=True)
        ]
        befores = (None, *scaled.stages[:-1])
        self._terms = [
            _StageTerm(
                stage,
                passing(before, found),
                found,
                # A unit error behind a division by s is s times as large in front of it.
                effect if scale is None else effect * scale**2,
                options,
            )
            for stage, before, found, effect, scale in zip(
                scaled.stages, befores, moved[:-1], effects, canonical, strict=True
            )
        ]

    def solve(self) -> list[Float64Array | None]:
        """The scales of least noise; boundaries that nothing depends on stay canonical."""
        sizes = [0 if scale is None else len(scale) for scale in self._canonical]
        cuts = np.cumsum(sizes)[:-1]
        limit = np.log(self._options.bound)
        t = np.zeros(sum(sizes))
        first, second = np.zeros_like(t), np.zeros_like(t)
        for step in range(1, _STEPS + 1):
            gradient = np.concatenate(self._gradient(np.split(t, cuts)))
            first = 0.9 * first + 0.1 * gradient
            second = 0.99 * second + 0.01 * gradient**2
            mean = first / (1 - 0.9**step)
            spread = np.sqrt(second / (1 - 0.99**step))
            rate = _RATE * 0.5 * (1 + np.cos(np.pi * step / _STEPS))
            t = np.clip(t - rate * mean / np.maximum(spread, 1e-300), 0, limit)
        parts = np.split(t, cuts)
        return [
            None if scale is None else scale * np.exp(part)
            for scale, part in zip(self._canonical, parts, strict=True)
        ]

    def _gradient(self, parts: list[Float64Array]) -> list[Float64Array]:
        gradients = [np.zeros_like(part) for part in parts]
        for index, term in enumerate(self._terms):
            incoming = parts[index - 1] if index and len(parts[index - 1]) else None
            outgoing = parts[index] if len(parts[index]) else None
            by_input, by_output = term.gradient(incoming, outgoing)
            if incoming is not None:
                gradients[index - 1] += by_input
            if outgoing is not None and self._options.per_tensor_weights:
                gradients[index] += by_output
        return gradients


class _StageTerm:
    """J of one stage and its gradient."""

    def __init__(
        self,
        stage: ConvStage,
        passing_share: Float64Array,
        statistics: ChannelStatistics,
        effect: Float64Array,
        options: EqualizeOptions,
    ) -> None:
        kernel = np.abs(stage.by_group())
        self._groups = stage.groups
        self._effect = effect.reshape(stage.groups, -1)
        self._largest = kernel.max(axis=3)
        energy = (kernel**2).sum(axis=3)
        # An input that is not scaled (the image) reaches A != 1, a constant factor here.
        peak = float(statistics.abs_max.max()) ** 2
        linear = np.einsum("go,goi->gi", self._effect, energy)
        self._activation = peak * linear * passing_share.reshape(stage.groups, -1)
        taps = kernel.shape[3]
        self._power = options.gamma * taps * statistics.variance.reshape(stage.groups, -1)
        self._per_tensor = options.per_tensor_weights

    def gradient(
        self, incoming: Float64Array | None, outgoing: Float64Array | None
    ) -> tuple[Float64Array, Float64Array]:
        """dJ/dt of the input's and of the output's channels."""
        s = np.ones_like(self._power)
        if incoming is not None:
            s = np.exp(incoming).reshape(s.shape)
        r = np.ones_like(self._effect)
        if outgoing is not None and self._per_tensor:
            r = np.exp(outgoing).reshape(r.shape)
        scaled = self._largest * s[:, None, :]
        power = self._power / s**2
        effect = self._effect * r**2
        by_input = 2 * self._activation * s**2
        by_output = np.zeros_like(r)
        if self._per_tensor:
            scaled /= r[:, :, None]
            top = np.unravel_index(int(scaled.argmax()), scaled.shape)
            noise = 2 * scaled[top] ** 2 * effect.sum(axis=1) * power.sum(axis=1)
            by_input[top[0], top[2]] += noise.sum()
            by_output[top[0], top[1]] -= noise.sum()
            by_input -= 2 * scaled[top] ** 2 * effect.sum(axis=1)[:, None] * power
            by_output += 2 * scaled[top] ** 2 * effect * power.sum(axis=1)[:, None]
            return by_input.ravel(), by_output.ravel()
        where = scaled.argmax(axis=2)
        weight = effect * np.take_along_axis(scaled, where[:, :, None], axis=2)[:, :, 0] ** 2
        at = where + np.arange(self._groups)[:, None] * power.shape[1]
        noise = 2 * weight * power.sum(axis=1)[:, None]
        summed = np.bincount(at.ravel(), noise.ravel(), by_input.size)
        by_input += summed.reshape(by_input.shape)
        by_input -= 2 * weight.sum(axis=1)[:, None] * power
        return by_input.ravel(), by_output.ravel()
