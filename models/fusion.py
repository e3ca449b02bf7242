"""Reparameterization: every block of several branches becomes one convolution, in a copy.

``structure.py`` finds the blocks, ``branches.py`` has the algebra. Kernels and biases are computed
in float64 and rounded once, to the block's own data type.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, fx, nn

from models.branches import BranchError, Linear
from models.repvgg import FusedConv2d, PlainBlock, RepVGGBlock
from models.structure import Block, find_blocks
from models.tracing import UntraceableError, trace

__all__ = [
    "TrainModeWarning",
    "UntraceableWarning",
    "fuse_block",
    "fused_convolutions",
    "reparameterize",
]

_FUSED_NAME = "rbr_reparam"


class TrainModeWarning(UserWarning):
    """A module in train() mode was given; a copy in eval() mode was used instead."""


class UntraceableWarning(UserWarning):
    """A module could not be searched for blocks, because its forward cannot be traced."""


def fuse_block(block: nn.Module) -> tuple[Tensor, Tensor]:
    """The single kernel ``[O, I/g, 3, 3]`` and bias ``[O]`` of a module that is one block, float64.

    Raises:
        ValueError: if it is no block, or cannot be fused.
    """
    linear = _only_block(block).linear
    assert linear.kernel is not None
    return linear.kernel, linear.bias


def reparameterize(module: nn.Module) -> nn.Module:
    """Return a deep copy of ``module`` in eval mode whose RepVGG-style blocks are convolutions.

    Blocks are found by structure (``models.structure``), in any module: the official ones and
    their variants, timm's, YOLOv6's, MobileOne's, the user's own. Nothing else changes. The
    caller's module is not touched. A module in train() mode computes with batch statistics, which
    no fixed kernel can reproduce, so the result equals ``module.eval()``; a
    :class:`TrainModeWarning` says so. A part whose forward cannot be traced is left as it is, with
    an :class:`UntraceableWarning`.

    Raises:
        ValueError: naming the block, if one cannot be fused, or fusing would drop something.
    """
    if any(child.training for child in module.modules()):
        warnings.warn(
            "the module is in train() mode; a copy switched to eval() is reparameterized",
            TrainModeWarning,
            stacklevel=2,
        )
    fused = _copy(module)
    names: dict[nn.Module, list[str]] = {}
    for name, child in fused.named_modules(remove_duplicate=False):
        names.setdefault(child, []).append(name)
    made: set[nn.Module] = set()
    # Children before parents, so that a block is replaced where it is defined.
    for child in reversed(list(names)):
        if _may_hold_branches(child, made):
            name = names[child][0]
            replacement = _fuse_in(child, name, names, made)
            if replacement is not None and name:
                parent, _, attribute = name.rpartition(".")
                setattr(fused.get_submodule(parent), attribute, replacement)
            elif replacement is not None:
                fused = replacement
    return fused


def fused_convolutions(module: nn.Module) -> dict[str, FusedConv2d]:
    """The convolution that stands for each block of a reparameterized module, by block name."""
    found: dict[str, FusedConv2d] = {}
    for name, child in module.named_modules():
        if isinstance(child, FusedConv2d):
            block, _, attribute = name.rpartition(".")
            found[block if attribute == _FUSED_NAME and block else name] = child
    return found


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module).eval()
    except RuntimeError as error:
        # Old-style weight norm leaves a computed tensor in place of the parameter.
        hooked = [n for n, child in module.named_modules() if child._forward_pre_hooks]
        raise ValueError(
            f"the module cannot be copied; {', '.join(hooked) or 'a part of it'} has hooks or "
            f"computed weights, which fusing would drop ({str(error).splitlines()[0]})"
        ) from error


def _may_hold_branches(module: nn.Module, made: set[nn.Module]) -> bool:
    """Whether the module has a forward of its own above a convolution, be it just ``made``."""
    own_forward = not type(module).__module__.startswith("torch.nn.")
    return own_forward and any(
        isinstance(child, nn.Conv2d) and (child in made or not isinstance(child, FusedConv2d))
        for child in module.modules()
    )


def _fuse_in(
    module: nn.Module, name: str, names: dict[nn.Module, list[str]], made: set[nn.Module]
) -> nn.Module | None:
    """``module`` with its own blocks fused, or None where it has none."""
    where = f"block {name}" if name else "the module"
    try:
        graph = trace(module)
    except UntraceableError as error:
        warnings.warn(f"{where} was not searched ({error})", UntraceableWarning, stacklevel=3)
        return None
    try:
        _require_used_once(module, graph, made)
        blocks = _blocks(module, graph)
        for block in blocks:
            _require_unshared(module, block, names)
        if not blocks:
            return None
        convolutions = [_fused_conv(block.linear, module) for block in blocks]
    except BranchError as error:
        raise ValueError(f"{where}: {error}") from error
    made.update(convolutions)
    if _is_own_block(module):
        return _as_plain(module, convolutions[0])  # type: ignore[arg-type]
    return _as_graph(module, graph, blocks, convolutions)


def _only_block(module: nn.Module) -> Block:
    blocks = _blocks(module, trace(module))
    if len(blocks) != 1:
        raise ValueError(f"a {type(module).__name__} holds {len(blocks)} blocks, not one")
    return blocks[0]


def _blocks(module: nn.Module, graph: fx.Graph) -> list[Block]:
    """The blocks of one module; of our own class its branches, be it one, and not the gate."""
    if _is_own_block(module):
        return find_blocks(module, graph, least_branches=1)[:1]
    return find_blocks(module, graph)


def _is_own_block(module: nn.Module) -> bool:
    return isinstance(module, RepVGGBlock) and type(module).forward is RepVGGBlock.forward


def _fused_conv(linear: Linear, block: nn.Module) -> FusedConv2d:
    """``linear`` as a layer in the data type and on the device of the block's weights."""
    kernel = linear.kernel
    assert kernel is not None
    like = next(m.weight for m in block.modules() if isinstance(m, nn.Conv2d))
    with torch.device("meta"):  # nothing to initialize, so no random numbers are drawn
        conv = FusedConv2d(
            kernel.shape[1] * linear.groups,
            len(kernel),
            linear.kernel_size,
            stride=linear.stride,
            padding=linear.padding,
            dilation=linear.dilation,
            groups=linear.groups,
            padding_mode=linear.padding_mode,  # type: ignore[arg-type]
        ).to(like.dtype)
    conv = conv.to_empty(device=like.device)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight.copy_(kernel)
        conv.bias.copy_(linear.bias)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in conv.parameters()):
        raise BranchError(f"the fused kernel or bias is not finite in {like.dtype}")
    return conv.eval()


def _as_plain(block: RepVGGBlock, conv: FusedConv2d) -> PlainBlock:
    plain = PlainBlock.__new__(PlainBlock)
    nn.Module.__init__(plain)
    plain.rbr_reparam = conv
    plain.se = copy.deepcopy(block.se)
    plain.se_after_relu = block.se_after_relu
    plain.nonlinearity = copy.deepcopy(block.nonlinearity)
    return plain.eval()


def _as_graph(
    module: nn.Module, graph: fx.Graph, blocks: list[Block], convolutions: list[FusedConv2d]
) -> fx.GraphModule:
    """The traced module with each block's nodes replaced by one call of its convolution."""
    fused = fx.GraphModule(module, graph, class_name=type(module).__name__)
    for index, (block, conv) in enumerate(zip(blocks, convolutions, strict=True)):
        target = _FUSED_NAME if len(blocks) == 1 else f"{_FUSED_NAME}_{index}"
        fused.add_submodule(target, conv)
        with graph.inserting_before(block.output):
            call = graph.call_module(target, (block.source,))
        block.output.replace_all_uses_with(call)
    graph.eliminate_dead_code()
    fused.graph = graph
    fused.delete_all_unused_submodules()
    fused.recompile()
    return fused.eval()


def _require_used_once(module: nn.Module, graph: fx.Graph, made: set[nn.Module]) -> None:
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module" and module.get_submodule(str(node.target)) in made:
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for target, count in calls.items():
        if count > 1:
            raise BranchError(f"the block {target.rpartition('.')[0]} is used {count} times")


def _require_unshared(module: nn.Module, block: Block, names: dict[nn.Module, list[str]]) -> None:
    if len(names.get(module, [])) > 1:
        raise BranchError(f"the block is used in several places: {', '.join(names[module])}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise BranchError("the block has hooks, which fusing would drop")
    for leaf in block.leaves:
        places = names.get(module.get_submodule(leaf), [])
        if len(places) > 1:
            raise BranchError(f"the module {leaf} is used in several places: {', '.join(places)}")
