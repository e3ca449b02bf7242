"""Find RepVGG-style blocks by what they compute, not by what they are called.

Each module's graph (``tracing.py``) is read as algebra (``branches.py``): convolutions, BatchNorms,
scalings and sums of one and the same tensor are one convolution. Where at least two branches meet,
that is a block, whatever class and attribute names it has.

What looks like a block and is none is refused by name: at least two convolutions of one tensor that
are summed with a nonlinearity, a BatchNorm without statistics or a misalignment in a branch. An
ordinary residual (one convolution, or several in a row, beside a shortcut) is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from models import branches
from models.branches import BranchError, Linear
from models.tracing import channel_constant, constant

_PASS = (nn.Identity, nn.Dropout, nn.Dropout2d)
_ADDS = (operator.add, operator.iadd, torch.add)
_MULS = (operator.mul, operator.imul, torch.mul)


@dataclass(slots=True, eq=False)
class Block:
    """One block in a traced module: ``output`` computes ``linear`` of ``source``."""

    source: fx.Node
    output: fx.Node
    linear: Linear
    leaves: list[str]
    """Qualified names, within the traced module, of the modules that the block replaces."""


@dataclass(slots=True, eq=False)
class _Value:
    """What a node computes: a linear map of ``source``, made by the modules ``leaves``."""

    source: fx.Node
    linear: Linear
    leaves: list[str] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


def find_blocks(module: nn.Module, graph: fx.Graph, *, least_branches: int = 2) -> list[Block]:
    """The blocks of one traced module in eval mode, in the order the data passes them.

    ``least_branches=1`` takes a convolution with its BatchNorm for a block too.

    Raises:
        BranchError: naming the reason and the branch, if something looks like a block and is none.
    """
    return _Reader(module, graph).blocks(least_branches)


class _Reader:
    """Reads one graph; ``values`` holds the nodes that are linear maps of another node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        # A module under two names is found under both.
        self.modules = dict(module.named_modules(remove_duplicate=False))
        self.module = module
        self.graph = graph
        self.values: dict[fx.Node, _Value] = {}
        self.flaws: dict[fx.Node, str] = {}

    def blocks(self, least_branches: int) -> list[Block]:
        for node in self.graph.nodes:
            value = self._value(node)
            if value is not None:
                self.values[node] = value
        found = []
        for node, value in self.values.items():
            extended = any(
                user in self.values and node in self.values[user].nodes for user in node.users
            )
            enough = value.linear.branches >= least_branches and value.linear.convolutions
            if enough and not extended:
                self._require_private(node, value)
                found.append(Block(value.source, node, value.linear, value.leaves))
        return found

    def _value(self, node: fx.Node) -> _Value | None:
        if node.op == "call_module":
            return self._module_value(node, self.modules[str(node.target)])
        target = node.target
        if node.op == "call_method" and target in ("add", "add_", "mul", "mul_"):
            target = operator.add if str(target).startswith("add") else operator.mul
        elif node.op != "call_function":
            return None
        if target in _ADDS and not node.kwargs:
            return self._sum(node)
        if target in _MULS:
            return self._product(node)
        if target is functional.batch_norm:
            return self._functional_norm(node)
        return None

    def _module_value(self, node: fx.Node, module: nn.Module) -> _Value | None:
        (source, *_), name = node.args or (None,), str(node.target)
        if not isinstance(source, fx.Node):
            return None
        if type(module) is nn.Conv2d or _is_parametrized_conv(module):
            return self._fresh(node, source, lambda: branches.convolution(module), name)  # type: ignore[arg-type]
        if type(module) is nn.BatchNorm2d:
            m = module
            return self._scaled(
                node,
                source,
                lambda: branches.batch_norm_factors(
                    m.running_mean, m.running_var, m.weight, m.bias, m.eps
                ),
                [name],
            )
        if isinstance(module, _PASS):
            value = self._of(source)
            return _Value(value.source, value.linear, [*value.leaves, name], [*value.nodes, source])
        return None

    def _of(self, node: fx.Node) -> _Value:
        """The node as a linear map: its own, or the identity of itself."""
        return self.values.get(node) or _Value(node, branches.identity())

    def _fresh(
        self, node: fx.Node, source: fx.Node, make: Callable[[], Linear], name: str
    ) -> _Value | None:
        try:
            return _Value(source, make(), [name])
        except BranchError as error:
            self.flaws[node] = str(error)
            return None

    def _scaled(
        self,
        node: fx.Node,
        source: fx.Node,
        factors: Callable[[], tuple[Tensor, Tensor]],
        leaves: list[str],
    ) -> _Value | None:
        value = self._of(source)
        try:
            linear = value.linear.scaled(*factors())
        except BranchError as error:
            self.flaws[node] = str(error)
            return None
        return _Value(value.source, linear, value.leaves + leaves, [*value.nodes, source])

    def _functional_norm(self, node: fx.Node) -> _Value | None:
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        source = given.get("input")
        if not isinstance(source, fx.Node):
            return None
        if given.get("training"):
            self.flaws[node] = "BatchNorm with batch statistics cannot be folded"
            return None
        tensors = {key: constant(self.module, given.get(key)) for key in names[1:5]}
        eps = float(given.get("eps", node.args[7] if len(node.args) > 7 else 1e-5))  # type: ignore[arg-type]
        return self._scaled(
            node,
            source,
            lambda: branches.batch_norm_factors(
                tensors["running_mean"], tensors["running_var"], tensors["weight"],
                tensors["bias"], eps,
            ),
            [],
        )  # fmt: skip

    def _sum(self, node: fx.Node) -> _Value | None:
        left, right = node.args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            number, operand = (left, right) if isinstance(right, fx.Node) else (right, left)
            # ``0 + branch``, as sums in a loop begin.
            return self._alias(operand) if number == 0 and isinstance(operand, fx.Node) else None
        for operand, other in ((left, right), (right, left)):
            shift = channel_constant(self.module, other)
            if shift is not None and operand in self.values:
                one = torch.ones_like(shift)
                return self._scaled(node, operand, lambda s=shift, o=one: (o, s), [])  # type: ignore[misc]
        values = self._common_source(left, right)
        if values is None:
            self._refuse_lookalike(node)
            return None
        first, second = values
        try:
            linear = branches.add(first.linear, second.linear)
        except BranchError as error:
            if first.linear.convolutions + second.linear.convolutions >= 2:
                raise BranchError(f"{error} ({', '.join(first.leaves + second.leaves)})") from error
            return None
        inner = [n for n in (left, right) if n in self.values and n is not first.source]
        leaves = first.leaves + second.leaves
        return _Value(first.source, linear, leaves, [*first.nodes, *second.nodes, *inner])

    def _alias(self, node: fx.Node) -> _Value | None:
        value = self.values.get(node)
        if value is None:
            return None
        return _Value(value.source, value.linear, value.leaves, [*value.nodes, node])

    def _common_source(self, left: fx.Node, right: fx.Node) -> tuple[_Value, _Value] | None:
        """The operands as maps of one tensor; a bare operand may be that tensor itself."""
        first, second = self._of(left), self._of(right)
        if first.source is second.source:
            return first, second
        if first.source is right:
            return first, _Value(right, branches.identity())
        if second.source is left:
            return _Value(left, branches.identity()), second
        return None

    def _product(self, node: fx.Node) -> _Value | None:
        left, right = node.args
        for operand, other in ((left, right), (right, left)):
            factor = channel_constant(self.module, other)
            if factor is not None and isinstance(operand, fx.Node):
                shift = torch.zeros_like(factor)
                return self._scaled(node, operand, lambda f=factor, s=shift: (f, s), [])  # type: ignore[misc]
        return None

    def _require_private(self, node: fx.Node, value: _Value) -> None:
        """What a block replaces must serve nothing else."""
        for inner in value.nodes:
            for user in inner.users:
                if user is not node and user not in value.nodes:
                    raise BranchError(f"the result of {inner.target} is also used by {user.target}")
        for name in value.leaves:
            calls = [n for n in self.graph.nodes if n.op == "call_module" and n.target == name]
            if len(calls) > 1:
                raise BranchError(f"the module {name} is used {len(calls)} times")
            reason = _dropped_by_fusing(self.modules[name])
            if reason:
                raise BranchError(f"{name} has {reason}, which fusing would drop")

    def _refuse_lookalike(self, node: fx.Node) -> None:
        terms = [_Term.read(operand, self) for operand in _summands(node)]
        sources = {term.source for term in terms}
        convolutions = [term for term in terms if term.convolutions == 1]
        flaws = [flaw for term in terms for flaw in term.flaws]
        simple = all(term.convolutions <= 1 for term in terms)
        if len(sources) == 1 and simple and len(convolutions) >= 2 and flaws:
            raise BranchError(flaws[0])


@dataclass(slots=True, eq=False)
class _Term:
    """One summand followed back through unary layers to the tensor it reads."""

    source: fx.Node
    convolutions: int
    flaws: list[str]

    @staticmethod
    def read(node: fx.Node, reader: _Reader) -> _Term:
        convolutions, flaws = 0, []
        while len(node.all_input_nodes) == 1 and node.op in ("call_module", "call_function"):
            module = reader.modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d):
                convolutions += 1
            elif node in reader.flaws:
                flaws.append(f"{reader.flaws[node]} ({node.target})")
            elif node not in reader.values:
                kind = type(module).__name__ if module else getattr(node.target, "__name__", "?")
                flaws.append(f"a nonlinearity ({kind}, {node.name}) stands inside a branch")
            if convolutions > 1:
                break
            node = node.all_input_nodes[0]
            if isinstance(module, nn.Conv2d) and node not in reader.values:
                break
        return _Term(node, convolutions, flaws)


def _summands(node: fx.Node) -> Iterator[fx.Node]:
    for operand in node.all_input_nodes:
        if operand.op == "call_function" and operand.target in _ADDS:
            yield from _summands(operand)
        else:
            yield operand


def _is_parametrized_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and parametrize.is_parametrized(module)


def _dropped_by_fusing(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "a parametrization (such as weight norm)"
    if module._forward_hooks or module._forward_pre_hooks:
        return "hooks"
    return None
