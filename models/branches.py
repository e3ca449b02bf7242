"""The algebra of branches: sums of convolutions of one tensor are one convolution.

In eval mode BatchNorm is an affine map per channel::

    bn(y)_o = gamma_o (y_o - mu_o) / sigma_o + beta_o,      sigma_o = sqrt(var_o + eps)

so a convolution with kernel W and bias b followed by it is the convolution with

    W'_o = W_o gamma_o / sigma_o,      b'_o = beta_o + (b_o - mu_o) gamma_o / sigma_o        (1)

The tap t of a convolution with padding p and dilation d reads at the offset d t - p from its
output (times the stride). A kernel fits into a larger one if all its offsets are among the larger
one's; it is then the larger kernel with the other taps zero (2). The 1x1 kernel of a RepVGG block
is the centre tap of its 3x3 kernel.

The identity is a 1x1 kernel that is a unit matrix (3). A grouped kernel is one with fewer groups
whose blocks off the diagonal are zero (4). Convolution is linear in its kernel, so branches that
read the same tensor at the same stride add:

    W = sum of W' brought to one size by (2) and one grouping by (4),      b = sum of b'      (5)

Source: Ding et al., CVPR 2021, section 3.3 and figure 4. All of it is computed in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Pair = tuple[int, int]


class BranchError(ValueError):
    """Branches that are no single convolution; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """A convolution of some tensor, as float64 numbers; the identity until its width is known.

    ``kernel`` is ``[O, I / groups, kh, kw]``, or None for the identity; ``scale`` and ``bias`` are
    ``[O]`` or scalars. ``branches`` counts the summands, ``convolutions`` those with a kernel.
    """

    kernel: Tensor | None
    scale: Tensor
    bias: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    branches: int = 1
    convolutions: int = 0

    @property
    def kernel_size(self) -> Pair:
        """``(1, 1)`` for the identity."""
        if self.kernel is None:
            return (1, 1)
        return (self.kernel.shape[2], self.kernel.shape[3])

    def scaled(self, factor: Tensor, shift: Tensor) -> Linear:
        """``factor * y + shift`` per channel: equation (1) for any affine map."""
        bias = self.bias * factor + shift
        if self.kernel is None:
            return replace(self, scale=self.scale * factor, bias=bias)
        kernel = self.kernel * _per_channel(factor, len(self.kernel)).view(-1, 1, 1, 1)
        return replace(self, kernel=kernel, bias=_per_channel(bias, len(kernel)))


def identity() -> Linear:
    """The map ``x -> x``, of any width."""
    one = torch.ones((), dtype=torch.float64)
    return Linear(kernel=None, scale=one, bias=torch.zeros_like(one))


def convolution(conv: nn.Conv2d) -> Linear:
    """The map of a Conv2d.

    Raises:
        BranchError: for string paddings that are not symmetric.
    """
    kernel = conv.weight.detach().double()
    zeros = torch.zeros(len(kernel), dtype=torch.float64, device=kernel.device)
    bias = zeros if conv.bias is None else conv.bias.detach().double()
    return Linear(
        kernel=kernel,
        scale=torch.ones((), dtype=torch.float64),
        bias=bias,
        stride=_pair(conv.stride),
        padding=_padding(conv),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        convolutions=1,
    )


def batch_norm_factors(
    mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Factor and shift ``[O]`` of a BatchNorm in eval mode, float64.

    Raises:
        BranchError: if it has no running statistics.
    """
    if mean is None or var is None:
        raise BranchError(
            "BatchNorm without running statistics cannot be folded into a convolution"
        )
    sigma = torch.sqrt(var.detach().double() + eps)
    factor = (torch.ones_like(sigma) if weight is None else weight.detach().double()) / sigma
    shift = torch.zeros_like(sigma) if bias is None else bias.detach().double()
    return factor, shift - mean.detach().double() * factor


def identity_kernel(channels: int, groups: int) -> Tensor:
    """Equation (3): ``x -> x`` as a float64 kernel ``[channels, channels / groups, 1, 1]``."""
    per_group = channels // groups
    kernel = torch.zeros(channels, per_group, 1, 1, dtype=torch.float64)
    outputs = torch.arange(channels)
    kernel[outputs, outputs % per_group, 0, 0] = 1.0
    return kernel


def add(left: Linear, right: Linear) -> Linear:
    """Equation (5).

    Raises:
        BranchError: if the branches do not read the tensor at the same places.
    """
    branches = left.branches + right.branches
    if left.kernel is None and right.kernel is None:
        return replace(
            left,
            scale=left.scale + right.scale,
            bias=left.bias + right.bias,
            branches=branches,
        )
    if left.kernel is None or math.prod(left.kernel_size) < math.prod(right.kernel_size):
        left, right = right, left
    assert left.kernel is not None
    right = _materialized(right, like=left)
    _require_alignment(left, right)
    groups = math.gcd(left.groups, right.groups)
    kernel = _regrouped(left, groups)
    kernel = kernel + _embedded(right, _regrouped(right, groups), left)
    return replace(
        left,
        kernel=kernel,
        groups=groups,
        bias=left.bias + right.bias,
        branches=branches,
        convolutions=left.convolutions + right.convolutions,
    )


def _materialized(branch: Linear, *, like: Linear) -> Linear:
    """The identity as a kernel of the width of ``like``; others as they are."""
    if branch.kernel is not None:
        return branch
    assert like.kernel is not None
    outputs, inputs = len(like.kernel), like.kernel.shape[1] * like.groups
    if outputs != inputs or like.stride != (1, 1):
        raise BranchError(
            f"an identity branch beside a convolution of {inputs} to {outputs} channels at stride "
            f"{like.stride[0]}"
        )
    unit = identity_kernel(inputs, like.groups).to(like.kernel.device)
    factor = _per_channel(branch.scale, inputs).view(-1, 1, 1, 1)
    return replace(
        branch,
        kernel=unit * factor,
        bias=_per_channel(branch.bias, inputs),
        groups=like.groups,
    )


def _require_alignment(large: Linear, small: Linear) -> None:
    shapes = [_channels(branch) for branch in (large, small)]
    if shapes[0] != shapes[1]:
        raise BranchError(f"branches of {shapes[0]} and {shapes[1]} (out, in) channels are added")
    if large.stride != small.stride:
        raise BranchError(f"branches of stride {large.stride} and {small.stride} are added")
    inside = all(set(_offsets(small, axis)) <= set(_offsets(large, axis)) for axis in (0, 1))
    if not inside or _growth(small) != _growth(large):
        raise BranchError(
            "branches do not line up: "
            + " and ".join(
                f"kernel {b.kernel_size} with padding {b.padding}, dilation {b.dilation}"
                for b in (large, small)
            )
        )
    pads = small.padding != (0, 0)
    if pads and small.padding_mode != large.padding_mode:
        raise BranchError(
            f"branches pad with {large.padding_mode} and {small.padding_mode} are added"
        )


def _channels(branch: Linear) -> Pair:
    assert branch.kernel is not None
    return len(branch.kernel), branch.kernel.shape[1] * branch.groups


def _offsets(branch: Linear, axis: int) -> list[int]:
    size, dilation, padding = branch.kernel_size, branch.dilation, branch.padding
    return [dilation[axis] * tap - padding[axis] for tap in range(size[axis])]


def _growth(branch: Linear) -> Pair:
    """By how much the output is higher and wider than the input, at stride 1."""
    first, last = ([_offsets(branch, axis)[end] for axis in (0, 1)] for end in (0, -1))
    return (-first[0] - last[0], -first[1] - last[1])


def _embedded(branch: Linear, kernel: Tensor, large: Linear) -> Tensor:
    """Equation (2): ``kernel`` with zero taps where only ``large`` reads."""
    height, width = large.kernel_size
    out = torch.zeros(*kernel.shape[:2], height, width, dtype=kernel.dtype, device=kernel.device)
    rows = [_offsets(large, 0).index(offset) for offset in _offsets(branch, 0)]
    columns = [_offsets(large, 1).index(offset) for offset in _offsets(branch, 1)]
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            out[:, :, row, column] = kernel[:, :, i, j]
    return out


def _regrouped(branch: Linear, groups: int) -> Tensor:
    """Equation (4): the kernel with ``groups`` groups, a divisor of its own number."""
    kernel = branch.kernel
    assert kernel is not None
    if branch.groups == groups:
        return kernel
    ratio = branch.groups // groups
    outputs, per_group = kernel.shape[:2]
    wide = torch.zeros(
        outputs, per_group * ratio, *kernel.shape[2:], dtype=kernel.dtype, device=kernel.device
    )
    per_output_group = outputs // branch.groups
    for group in range(branch.groups):
        rows = slice(group * per_output_group, (group + 1) * per_output_group)
        start = (group % ratio) * per_group
        wide[rows, start : start + per_group] = kernel[rows]
    return wide


def _per_channel(values: Tensor, channels: int) -> Tensor:
    return values.reshape(-1).expand(channels) if values.numel() == 1 else values.reshape(-1)


def _pair(value: int | tuple[int, ...]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding(conv: nn.Conv2d) -> Pair:
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    spans = [d * (k - 1) for d, k in zip(_pair(conv.dilation), conv.kernel_size, strict=True)]
    if any(span % 2 for span in spans):
        raise BranchError(f"padding 'same' of kernel {tuple(conv.kernel_size)} is not symmetric")
    return (spans[0] // 2, spans[1] // 2)
