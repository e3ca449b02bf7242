"""Which variant do names and shapes fit, and by how much do they miss it?

Shapes decide: B1, B1g2 and B1g4 have the same names and differ in the width of every second kernel;
D2se and L2pse differ in the bottleneck of their squeeze-and-excitation.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.dialects import BLOCK, Dialect, from_ours
from models.repvgg import POST_NORM, QAREPVGG, REPVGG, BlockStyle, RepVGG, mobileone
from models.variants import VARIANTS, Squeeze, Variant

CLASSIFIER = ("linear.weight", "linear.bias")
TRAIN, DEPLOY = "train", "deploy"
Shape = tuple[int, ...]

_NEAR = 0.1
"""The share of a variant's tensors that may differ in what is still called a near miss."""
_COUNTER = "num_batches_tracked"
_SHOWN = 3
_FOREIGN_SQUEEZE = {Dialect.PLUS: Squeeze.BEFORE_RELU, Dialect.TIMM: Squeeze.AFTER_RELU}
"""Where a dialect never has its squeeze-and-excitation, whatever the shapes."""
_DENSE = re.compile(r"rbr_dense\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A tensor whose shape is not the one that was wanted; None where there is no tensor."""

    name: str
    found: Shape | None
    wanted: Shape | None

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.name} is missing"
        if self.wanted is None:
            return f"{self.name} is not expected"
        return f"{self.name} is {list(self.found)}, not {list(self.wanted)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How the tensors of a checkpoint compare with one variant, the classifier left out."""

    variant: Variant
    form: str
    differences: tuple[Difference, ...]
    expected: int

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def near(self) -> bool:
        """Whether so little differs that the rest cannot be chance."""
        return len(self.differences) <= _NEAR * self.expected

    def __str__(self) -> str:
        count = len(self.differences)
        if not self.near:
            return (
                f"fits no RepVGG variant; tensors that differ from {self.variant.name} in "
                f"{self.form} form: {count}, the first: {self.differences[0]}"
            )
        shown = "; ".join(map(str, self.differences[:_SHOWN]))
        more = f"; and {count - _SHOWN} more" if count > _SHOWN else ""
        keys = "key" if count == 1 else "keys"
        return f"fits {self.variant.name} but for {count} {keys}: {shown}{more}"


@functools.cache
def expected_shapes(
    variant: Variant, form: str, style: BlockStyle = REPVGG
) -> Mapping[str, tuple[int, ...]]:
    """Parameter and buffer shapes of a variant in our names, the classifier left out."""
    with torch.device("meta"):
        module = RepVGG(variant, num_classes=1, deploy=form == DEPLOY, style=style)
    return {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if not name.endswith(_COUNTER) and name not in CLASSIFIER
    }


def fit(
    state: Mapping[str, Tensor],
    variant: Variant,
    form: str,
    style: BlockStyle = REPVGG,
    dialect: Dialect = Dialect.OFFICIAL,
) -> Fit:
    """Compare ``state``, in our names, with ``variant``; differences have the dialect's names."""
    wanted = expected_shapes(variant, form, style)
    if _FOREIGN_SQUEEZE.get(dialect) is variant.squeeze:
        wanted = {name: shape for name, shape in wanted.items() if ".se." not in name}
    found = {n: tuple(tensor.shape) for n, tensor in state.items() if n not in CLASSIFIER}
    names = [name for name in wanted if name not in found]
    names += [name for name in found if name not in wanted]
    names += [name for name, shape in wanted.items() if found.get(name, shape) != shape]
    theirs = from_ours(dialect, {**wanted, **found}) if names else {}
    differences = tuple(
        Difference(name=theirs[name], found=found.get(name), wanted=wanted.get(name))
        for name in names
    )
    return Fit(variant=variant, form=form, differences=differences, expected=len(wanted))


def nearest_fit(
    state: Mapping[str, Tensor],
    form: str,
    style: BlockStyle = REPVGG,
    dialect: Dialect = Dialect.OFFICIAL,
) -> Fit:
    """The published variant from which the least differs."""
    fits = [fit(state, variant, form, style, dialect) for variant in VARIANTS.values()]
    return min(fits, key=lambda candidate: len(candidate.differences))


def form_of(state: Iterable[str]) -> str:
    """``deploy`` if fused kernels outnumber branches, by the names alone."""
    fused, branched = blocks_by_form(state)
    return DEPLOY if len(fused) > len(branched) else TRAIN


def blocks_by_form(state: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names of the blocks that hold a fused kernel, and of those that hold branches."""
    tensors = [match.groups() for match in map(BLOCK.fullmatch, state) if match]
    branches = ("rbr_dense.", "rbr_1x1.", "rbr_identity.")
    fused = dict.fromkeys(block for block, rest in tensors if rest.startswith("rbr_reparam."))
    branched = dict.fromkeys(block for block, rest in tensors if rest.startswith(branches))
    return list(fused), list(branched)


def style_of(state: Iterable[str], dialect: Dialect) -> BlockStyle:
    """The style of train-form blocks, as most of them have it.

    An identity without BatchNorm has no tensors; it is taken to be there where there is a BatchNorm
    after the sum (QARepVGG, the ablation of the paper), and not to be there in MobileOne blocks.
    """
    parts: dict[str, set[str]] = {}
    for match in map(BLOCK.fullmatch, state):
        if match:
            parts.setdefault(match[1], set()).add(match[2])

    def mostly(tensor: str) -> bool:
        return sum(tensor in names for names in parts.values()) * 2 > len(parts)

    if mostly("bn.weight"):
        return QAREPVGG if mostly("rbr_dense.bn.weight") else POST_NORM
    tensors = [name for names in parts.values() for name in names]
    dense = {int(match[1]) for match in map(_DENSE.match, tensors) if match}
    if dense or dialect is Dialect.MOBILEONE:
        skip = any(name.startswith("rbr_identity.") for name in tensors)
        return mobileone(max(dense, default=0) + 1, skip=skip)
    return REPVGG


def dialect_with(dialect: Dialect, style: BlockStyle, variant: Variant | None) -> Dialect:
    """``dialect``, or what OFFICIAL names really are, now that blocks and variant are known."""
    if dialect is not Dialect.OFFICIAL:
        return dialect
    if style == QAREPVGG:
        return Dialect.QAREPVGG
    after_relu = variant is not None and variant.squeeze is Squeeze.AFTER_RELU
    return Dialect.EXPORTER if style != REPVGG or after_relu else dialect
