"""A module's forward as a torch.fx graph of torch's own layers, and the constants in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from models.repvgg import FusedConv2d


class UntraceableError(ValueError):
    """A module whose forward cannot be read symbolically; the message says why."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FusedConv2d) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.Graph:
    """The module's graph with torch's own layers as leaves.

    Raises:
        UntraceableError: if its forward depends on values, or otherwise cannot be traced.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        # Tracing runs the user's forward with proxies: anything may be raised there.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UntraceableError(first_line) from error
    for node in list(graph.nodes):
        if node.target is torch._assert:
            graph.erase_node(node)
        elif node.op == "call_method" and str(node.target).endswith("_") and not node.users:
            # ``out.add_(branch)`` as a statement: later readers of ``out`` see what it wrote, which
            # the graph does not tell.
            raise UntraceableError(f"{node.target} changes a tensor in place as a statement")
    graph.owning_module = module  # type: ignore[assignment]  # asked which calls have effects
    graph.eliminate_dead_code()
    return graph


def constant(module: nn.Module, argument: Any) -> Tensor | None:
    """The tensor that an attribute of the traced ``module``, possibly viewed or reshaped, holds."""
    if not isinstance(argument, fx.Node):
        return None
    if argument.op == "get_attr":
        value: Any = module
        for part in str(argument.target).split("."):
            value = getattr(value, part)
        tensor: Tensor | None = value if isinstance(value, Tensor) else None
        return tensor
    if argument.op == "call_method" and argument.target in ("view", "reshape"):
        inner, *shape = argument.args
        value = constant(module, inner)
        sizes = [size for size in shape if isinstance(size, int)]
        if value is not None and len(sizes) == len(shape):
            viewed: Tensor = value.reshape(sizes)
            return viewed
    return None


def channel_constant(module: nn.Module, argument: Any) -> Tensor | None:
    """A number, or a constant ``[1, C, 1, 1]`` or scalar tensor, as float64 ``[C]``."""
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return torch.tensor(float(argument), dtype=torch.float64)
    value = constant(module, argument)
    if value is None or not value.is_floating_point():
        return None
    if value.numel() > 1 and not (value.ndim == 4 and value.numel() == value.shape[1]):
        return None
    value = value.detach().double()
    return value.reshape(-1) if value.numel() > 1 else value.reshape(())
