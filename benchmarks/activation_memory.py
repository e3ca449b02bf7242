"""Peak activation memory of an ONNX graph, computed exactly for the order of its nodes.

Node i of n runs at step i. A tensor t of b(t) bytes is born at the step of the node that computes
it and dies after the step of its last reader; what nobody reads dies where it was born, and outputs
of the graph live to the end. At step i memory holds

    M(i) = sum of b(t) over all t with born(t) <= i <= dies(t),    peak = max over i of M(i).

Weights are not counted, and neither are the graph's inputs, which belong to the caller.

A ReLU or Flatten that is the last reader of its input works in place, as in ONNX Runtime, unless it
computes an output: both tensors share one buffer, which counts once, from the first one's birth to
the last one's death.

For a plain chain of convolutions and ReLUs the peak is the largest sum of one layer's input and
output. A train-form block whose tensors have S bytes each holds its input, the sum so far, the next
branch and their sum, 4 S, where the fused block holds 2 S: the argument of the paper's section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from graph_tensors import graph_tensors

IN_PLACE_OPS = frozenset({"Relu", "Flatten"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One node: the tensors that it reads and computes, weights left out."""

    name: str
    reads: tuple[str, ...]
    computes: tuple[str, ...]
    in_place: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Memory for one tensor, or for several that follow each other in place."""

    bytes: int
    born: int
    dies: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Bytes held at each step, in order, and the steps' names."""

    names: tuple[str, ...]
    held: tuple[int, ...]

    @property
    def peak(self) -> int:
        """Bytes."""
        return max(self.held)

    @property
    def where(self) -> str:
        """The first step that holds the peak."""
        return self.names[self.held.index(self.peak)]


def steps_of(model: onnx.ModelProto) -> tuple[Step, ...]:
    """The nodes of ``model`` in their order."""
    given = {tensor.name for tensor in model.graph.initializer}
    given |= {value.name for value in model.graph.input}
    return tuple(
        Step(
            name=node.name,
            reads=tuple(name for name in node.input if name and name not in given),
            computes=tuple(name for name in node.output if name),
            in_place=node.op_type in IN_PLACE_OPS,
        )
        for node in model.graph.node
    )


def buffers(
    steps: Sequence[Step], sizes: Mapping[str, int], outputs: frozenset[str]
) -> tuple[Buffer, ...]:
    """What is allocated, in order of birth; ``outputs`` are the graph's."""
    last = {name: index for index, step in enumerate(steps) for name in step.computes}
    last |= {name: index for index, step in enumerate(steps) for name in step.reads}
    last |= dict.fromkeys(outputs, len(steps) - 1)
    owner: dict[str, int] = {}
    found: list[Buffer] = []
    for index, step in enumerate(steps):
        for name in step.computes:
            over = step.reads[0] if step.in_place and step.reads else None
            if over and last[over] == index and not outputs.intersection((over, name)):
                owner[name] = owner[over]
                found[owner[name]] = replace(found[owner[name]], dies=last[name])
            else:
                owner[name] = len(found)
                found.append(Buffer(bytes=sizes[name], born=index, dies=last[name]))
    return tuple(found)


def profile(steps: Sequence[Step], sizes: Mapping[str, int], outputs: frozenset[str]) -> Profile:
    """M(i) for every step."""
    change = np.zeros(len(steps) + 1, np.int64)
    for buffer in buffers(steps, sizes, outputs):
        change[buffer.born] += buffer.bytes
        change[buffer.dies + 1] -= buffer.bytes
    return Profile(
        names=tuple(step.name for step in steps),
        held=tuple(int(value) for value in np.cumsum(change[:-1])),
    )


def activation_memory(
    model: onnx.ModelProto, batch: int, order: Sequence[str] | None = None
) -> Profile:
    """The profile of a graph whose first axis is the batch everywhere.

    ``order`` names all nodes as they run; left out, they run as they stand in the graph.

    Raises:
        ValueError: if ``order`` has other nodes, or one before what it reads; if ONNX does not
            infer the shape of a tensor.
    """
    steps = steps_of(model)
    if order is not None:
        steps = _in_order(steps, order)
    outputs = frozenset(value.name for value in model.graph.output)
    sizes = {name: found.bytes for name, found in graph_tensors(model, batch).items()}
    return profile(steps, sizes, outputs)


def _in_order(steps: Sequence[Step], order: Sequence[str]) -> tuple[Step, ...]:
    by_name = {step.name: step for step in steps}
    if sorted(order) != sorted(step.name for step in steps) or len(by_name) != len(steps):
        raise ValueError("the order does not name every node of the graph once")
    known: set[str] = set()
    for name in order:
        if missing := set(by_name[name].reads) - known:
            raise ValueError(f"{name} would run before {', '.join(sorted(missing))} is computed")
        known |= set(by_name[name].computes)
    return tuple(by_name[name] for name in order)
