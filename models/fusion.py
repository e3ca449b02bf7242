"""Reparameterization: three branches with BatchNorm become one 3x3 convolution.

The algebra (paper, section 3.3 and figure 4). In eval mode BatchNorm is an affine map per channel::

    bn(y)_o = gamma_o (y_o - mu_o) / sigma_o + beta_o,      sigma_o = sqrt(var_o + eps)

so a bias-free convolution W followed by it is the convolution with

    W'_o = W_o gamma_o / sigma_o,        b'_o = beta_o - mu_o gamma_o / sigma_o          (1)

A 1x1 kernel is a 3x3 kernel with one non-zero tap, the centre (2). The identity is a 1x1 kernel
that is a unit matrix; within a group of g = in_channels / groups channels, output o reads input
o mod g of its own group (3). Convolution is linear in its kernel, so the branches add:

    W = W'_3x3 + pad(W'_1x1) + pad(W'_id),      b = b'_3x3 + b'_1x1 + b'_id              (4)

All of it is computed in float64 and rounded once, to the block's own data type.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.repvgg import PlainBlock, RepVGGBlock
from models.variants import ConvLayer


class TrainModeWarning(UserWarning):
    """A module in train() mode was given; a copy in eval() mode was used instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEquivalence:
    """How far one fused block is from the block it replaces, on the same input.

    ``max_abs`` is in units of the block's output; ``relative`` is ``max_abs`` over the largest
    magnitude of the original output (or ``max_abs`` itself where that is all zero).
    """

    name: str
    max_abs: float
    relative: float


def fold_batch_norm(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Equation (1): kernel ``[O, I/g, k, k]`` and ``bn`` -> float64 kernel and bias ``[O]``."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("BatchNorm without running statistics cannot be folded into a convolution")
    sigma = torch.sqrt(bn.running_var.detach().double() + bn.eps)
    # Without affine=True both are None; newer releases of torch can leave out the bias alone.
    gamma = torch.ones_like(sigma) if bn.weight is None else bn.weight.detach().double()
    beta = torch.zeros_like(sigma) if bn.bias is None else bn.bias.detach().double()
    factor = gamma / sigma
    kernel = weight.detach().double() * factor.view(-1, 1, 1, 1)
    return kernel, beta - bn.running_mean.detach().double() * factor


def identity_kernel(channels: int, groups: int) -> Tensor:
    """Equation (3): ``x -> x`` as a float64 kernel ``[channels, channels / groups, 1, 1]``."""
    per_group = channels // groups
    kernel = torch.zeros(channels, per_group, 1, 1, dtype=torch.float64)
    outputs = torch.arange(channels)
    kernel[outputs, outputs % per_group, 0, 0] = 1.0
    return kernel


def fuse_block(block: RepVGGBlock) -> tuple[Tensor, Tensor]:
    """Equations (1)-(4): the single kernel ``[O, I/g, 3, 3]`` and bias ``[O]``, float64.

    Raises:
        ValueError: if a BatchNorm has no running statistics, or the block is of a subclass that
            computes something else.
    """
    if type(block).forward is not RepVGGBlock.forward:
        raise ValueError(f"{type(block).__name__} has a forward() of its own, not RepVGGBlock's")
    dense_conv, dense_bn = _conv_and_bn(block.rbr_dense)
    point_conv, point_bn = _conv_and_bn(block.rbr_1x1)
    kernel, bias = fold_batch_norm(dense_conv.weight, dense_bn)
    point_kernel, point_bias = fold_batch_norm(point_conv.weight, point_bn)
    if block.rbr_identity is not None:
        unit = identity_kernel(dense_conv.in_channels, dense_conv.groups).to(kernel.device)
        identity, identity_bias = fold_batch_norm(unit, block.rbr_identity)
        point_kernel, point_bias = point_kernel + identity, point_bias + identity_bias
    return kernel + functional.pad(point_kernel, (1, 1, 1, 1)), bias + point_bias


def plain_block(block: RepVGGBlock, name: str = "") -> PlainBlock:
    """The deploy form of ``block``, in its data type, on its device, with its activation.

    Raises:
        ValueError: if the block cannot be fused, or the result leaves its data type's range.
    """
    conv, _ = _conv_and_bn(block.rbr_dense)
    layer = ConvLayer(
        name=name,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        stride=conv.stride[0],
        groups=conv.groups,
    )
    kernel, bias = fuse_block(block)
    with torch.device("meta"):  # nothing to initialize, so no random numbers are drawn
        plain = PlainBlock(layer).to(conv.weight.dtype)
    plain = plain.to_empty(device=conv.weight.device)
    with torch.no_grad():
        plain.rbr_reparam.weight.copy_(kernel)
        plain.rbr_reparam.bias.copy_(bias)  # type: ignore[union-attr]
    if not all(bool(torch.isfinite(parameter).all()) for parameter in plain.parameters()):
        raise ValueError(f"the fused kernel or bias is not finite in {conv.weight.dtype}")
    plain.nonlinearity = copy.deepcopy(block.nonlinearity)
    return plain.eval()


def reparameterize(module: nn.Module) -> nn.Module:
    """Return a deep copy of ``module`` in eval mode whose RepVGG blocks are single convolutions.

    The caller's module is not touched. A module in train() mode computes with batch statistics,
    which no fixed kernel can reproduce, so the result equals ``module.eval()``; a
    :class:`TrainModeWarning` says so. A block used in several places stays one block. Hooks on
    a block go with the block that is replaced.

    Raises:
        ValueError: naming the block, if one cannot be fused.
    """
    if any(child.training for child in module.modules()):
        warnings.warn(
            "the module is in train() mode; a copy switched to eval() is reparameterized",
            TrainModeWarning,
            stacklevel=2,
        )
    fused = copy.deepcopy(module).eval()
    if isinstance(fused, RepVGGBlock):
        return plain_block(fused)
    replacements: dict[RepVGGBlock, PlainBlock] = {}
    for name, block in list(fused.named_modules(remove_duplicate=False)):
        if isinstance(block, RepVGGBlock):
            if block not in replacements:
                try:
                    replacements[block] = plain_block(block, name)
                except ValueError as error:
                    raise ValueError(f"block {name}: {error}") from error
            parent_name, _, child_name = name.rpartition(".")
            setattr(fused.get_submodule(parent_name), child_name, replacements[block])
    return fused


def block_equivalence(
    original: nn.Module, fused: nn.Module, images: Tensor
) -> tuple[BlockEquivalence, ...]:
    """Compare every block of ``original`` with its counterpart in ``fused``, input by input.

    ``images`` is ``[N, 3, H, W]``. Each fused block gets the input that the original block saw, so
    one bad block does not taint those behind it. ``original`` is left as it was, train mode too.

    Raises:
        ValueError: if ``fused`` has no block of the same name.
    """
    blocks = {name: b for name, b in original.named_modules() if isinstance(b, RepVGGBlock)}
    fused_blocks = dict(fused.named_modules())
    for name in blocks.keys() - fused_blocks.keys():
        raise ValueError(f"the fused module has no block {name}")
    results: list[BlockEquivalence] = []

    def compare(name: str, inputs: tuple[Tensor, ...], expected: Tensor) -> None:
        difference = float((fused_blocks[name](*inputs) - expected).abs().max())
        largest = float(expected.abs().max())
        relative = difference / largest if largest > 0 else difference
        results.append(BlockEquivalence(name=name, max_abs=difference, relative=relative))

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(eval_mode(original))
        for name, block in blocks.items():
            handle = block.register_forward_hook(
                lambda _module, inputs, output, name=name: compare(name, inputs, output)
            )
            stack.callback(handle.remove)
        original(images)
    return tuple(results)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Run the body with ``module`` in eval mode, then give every submodule its own mode back."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def _conv_and_bn(branch: nn.Sequential) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return cast(nn.Conv2d, branch.conv), cast(nn.BatchNorm2d, branch.bn)
