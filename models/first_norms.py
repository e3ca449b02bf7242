"""The BatchNorms nearest to the image: which they are, what they receive, how far from training.

A BatchNorm that sees an affine function ``F`` of the image, such as a convolution of it, tells best
how images were prepared, for nothing before it has been saturated or normalized. For RepVGG those
are the ones of the first block's branches.

Being affine, ``F`` need not be run again for each way of preparing an image ``x``: if that makes
``x'_d = a_d x_p(d) + b_d`` of channel ``d``, where ``p`` is the identity or swaps red and blue, and
``L_d(z) = F(z in channel d, zero elsewhere) - F(0)``, then

    F(x') = F(0) + sum over d of (b_d L_d(1) + a_d L_d(x_p(d))),                     (1)

whose mean and variance follow from those, and the covariances, of its nine terms.

What a channel of a BatchNorm receives is described by mean ``m`` and variance ``v``, and what it
received in training by the running ``r`` and ``s``. Their distance is that of normal distributions,

    KL(N(m, v) || N(r, s)) = (log(s / v) + (v + (m - r)^2) / s - 1) / 2.             (2)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Triple = tuple[float, float, float]

_AFFINE_TOLERANCE = 1e-3
_LOUD = 1e4
_SEED = 0
_ENOUGH_PLACES = 56
# Which channel of the image stands where in the terms of equation (1) that hold the image.
_PLANES = ((0, 0), (1, 1), (2, 2), (2, 0), (0, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelMap:
    """``x'_d = scale_d x_p(d) + offset_d``; ``swapped`` tells which ``p``."""

    scale: Triple
    offset: Triple
    swapped: bool

    def weights(self) -> Tensor:
        """Of the nine terms of equation (1), as :class:`FirstNorms` orders them, float64."""
        red, green, blue = self.scale
        planes = (0.0, green, 0.0, red, blue) if self.swapped else (red, green, blue, 0.0, 0.0)
        return torch.tensor((1.0, *self.offset, *planes), dtype=torch.float64)


IDENTITY = ChannelMap(scale=(1.0, 1.0, 1.0), offset=(0.0, 0.0, 0.0), swapped=False)


class FirstNorms:
    """Equation (1) for the first BatchNorms of ``module`` and the images shown to it.

    Each image weighs the same, whatever its size. The module (eval mode) is run only as far as its
    first BatchNorms and is left as it was.
    """

    def __init__(self, module: nn.Module, norms: Sequence[nn.BatchNorm2d]) -> None:
        self._module = module
        self._norms = norms
        self._constants: dict[torch.Size, list[Tensor]] = {}
        self._means: list[Tensor] = []
        self._covariances: list[Tensor] = []

    @classmethod
    def find(cls, module: nn.Module, image: Tensor) -> FirstNorms | None:
        """The trained BatchNorms that see an affine function of images like ``image``, if any.

        ``image`` is ``[3, H, W]``. Being affine is tried: the input for the mean of two images must
        be the mean of the inputs. They are noise, and so loud that both signs occur behind any
        offset: faint images would pass a ReLU as if it were not there.
        """
        generator = torch.Generator().manual_seed(_SEED)
        noise = torch.randn((2, *image.shape), generator=generator)
        noise *= _LOUD * image.abs().max().clamp_min(1).cpu()
        probe = torch.cat([noise, noise.mean(0, keepdim=True)]).to(image)
        norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
        seen = _inputs(norms, module, probe)
        good = [norm for norm, values in seen.items() if _is_trained(norm) and _is_affine(values)]
        return cls(module, good) if good else None

    @property
    def images(self) -> int:
        """How many were shown."""
        return len(self._means)

    def show(self, image: Tensor) -> None:
        """Take in one image ``[3, H, W]``."""
        planes = image.new_zeros((len(_PLANES), *image.shape))
        for plane, (source, target) in zip(planes, _PLANES, strict=True):
            plane[target] = image[source]
        means, covariances = [], []
        for constants, values in zip(self._constant_terms(image), self._run(planes), strict=True):
            terms = torch.cat([constants, values - constants[:1]]).flatten(2).transpose(0, 1)
            mean = terms.mean(2, keepdim=True)
            terms = terms - mean
            means.append(mean.squeeze(2).double())
            covariances.append((terms @ terms.transpose(1, 2) / terms.shape[2]).double())
        self._means.append(torch.cat(means).cpu())
        self._covariances.append(torch.cat(covariances).cpu())

    def distance(self, channel_map: ChannelMap) -> float:
        """Formula (2) for the images under ``channel_map``, the mean over all channels, in nats."""
        weights = channel_map.weights()
        within = torch.stack(self._covariances).mean(0) @ weights @ weights
        between, mean = torch.var_mean(torch.stack(self._means) @ weights, 0, correction=0)
        # The BatchNorm's own epsilon keeps dead channels, of variance zero, out of the way.
        epsilon = torch.cat([torch.full_like(_running(n.running_var), n.eps) for n in self._norms])
        variance = (within + between).clamp_min(0) + epsilon
        expected = torch.cat([_running(norm.running_var) for norm in self._norms]) + epsilon
        shift = mean - torch.cat([_running(norm.running_mean) for norm in self._norms])
        distances = torch.log(expected / variance) + (variance + shift.square()) / expected - 1
        return float(distances.mean() / 2)

    def _constant_terms(self, image: Tensor) -> list[Tensor]:
        """``F(0)`` and ``L_d(1)`` of each BatchNorm, which depend on the size alone."""
        if image.shape not in self._constants:
            constants = image.new_zeros((4, *image.shape))
            for channel in range(3):
                constants[channel + 1, channel] = 1
            self._constants[image.shape] = [
                torch.cat([terms[:1], terms[1:] - terms[:1]]) for terms in self._run(constants)
            ]
        return self._constants[image.shape]

    def _run(self, images: Tensor) -> list[Tensor]:
        seen = _inputs(self._norms, self._module, images)
        return [_thinned(seen[norm]) for norm in self._norms]


def _thinned(values: Tensor) -> Tensor:
    """Every n-th place of large maps: neighbours say the same, and statistics cost time."""
    rows, columns = (max(side // _ENOUGH_PLACES, 1) for side in values.shape[2:])
    return values[:, :, ::rows, ::columns]


def _running(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.detach().cpu().double()


def _is_trained(norm: nn.BatchNorm2d) -> bool:
    """Whether the running statistics exist and are not those of a new layer."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())


def _is_affine(values: Tensor) -> bool:
    """``values`` are of two images and their mean; False too where the images do not matter."""
    if len(values) != 3:
        return False
    first, second, middle = values.double()
    size = float((first - second).abs().amax())
    error = float((middle - (first + second) / 2).abs().amax())
    return size > 0 and error <= _AFFINE_TOLERANCE * size


class _AllSeenError(Exception):
    """Ends a forward pass of which nothing more is wanted."""


def _inputs(
    norms: Sequence[nn.BatchNorm2d], module: nn.Module, images: Tensor
) -> dict[nn.BatchNorm2d, Tensor]:
    """What each BatchNorm receives when first called, in order; the run ends with the last one."""
    seen: dict[nn.BatchNorm2d, Tensor] = {}

    def hook(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        if norm not in seen and arguments:
            seen[norm] = arguments[0]
        if len(seen) == len(norms):
            raise _AllSeenError

    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        with torch.no_grad():
            module(images)
    except _AllSeenError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
