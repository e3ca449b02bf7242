"""Does each fused block compute what the block it replaces computed?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.repvgg import FusedConv2d, RepVGGBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEquivalence:
    """How far one fused block is from the block it replaces, on the same input.

    ``max_abs`` is in units of the block's output; ``relative`` is ``max_abs`` over the largest
    magnitude of the original output (or ``max_abs`` itself where that is all zero).
    """

    name: str
    max_abs: float
    relative: float


def block_equivalence(
    original: nn.Module, fused: nn.Module, *inputs: Tensor
) -> tuple[BlockEquivalence, ...]:
    """Compare every block of ``original`` with its counterpart in ``fused``, input by input.

    ``inputs`` are those of the whole module. Each fused block gets the input that the original
    block saw, so one bad block does not taint those behind it. ``original`` is left as it was,
    train mode too. Where several blocks are written in one module's forward, that module is
    compared.

    Raises:
        ValueError: if one of the two has no block of the other's name.
    """
    owners = list(dict.fromkeys(_owner(name) for name in _convolution_names(fused)))
    modules = dict(original.named_modules())
    for name, child in modules.items():
        if isinstance(child, RepVGGBlock) and name not in owners:
            raise ValueError(f"the fused module has no block {name}")
    replaced = dict(fused.named_modules())
    results: dict[str, BlockEquivalence] = {}

    def compare(name: str, given: tuple[Any, ...], expected: Any) -> None:
        pairs = zip(_tensors(replaced[name](*given)), _tensors(expected), strict=True)
        difference, largest = 0.0, 0.0
        for actual, wanted in pairs:
            largest = max(largest, float(wanted.abs().max()))
            error = float((actual - wanted).abs().max())
            difference = error if math.isnan(error) else max(difference, error)
        relative = difference / largest if largest > 0 else difference
        results[name] = BlockEquivalence(name=name, max_abs=difference, relative=relative)

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(eval_mode(original))
        for name in owners:
            if name not in modules:
                raise ValueError(f"the original module has no block {name}")
            if any(isinstance(child, FusedConv2d) for child in modules[name].children()):
                continue
            handle = modules[name].register_forward_hook(
                lambda _module, given, output, name=name: compare(name, given, output)
            )
            stack.callback(handle.remove)
        original(*inputs)
    return tuple(results[name] for name in owners if name in results)


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


def _convolution_names(module: nn.Module) -> list[str]:
    return [n for n, child in module.named_modules() if isinstance(child, FusedConv2d)]


def _owner(convolution: str) -> str:
    return convolution.rpartition(".")[0]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in _tensors(item)]
    return []
