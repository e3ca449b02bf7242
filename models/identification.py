"""Names and shapes of a file of weights -> what it is. Nothing is refused here.

The order: whose names (``dialects``), which form, which block style, which variant (``fitting``),
how many classes. What is no RepVGG gets the dialect UNKNOWN and the variant it comes closest to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from models.checkpoint_file import CheckpointError, CheckpointFile
from models.checkpoint_scales import split_quantizers
from models.dialects import AUXILIARY, Dialect, dialect_of, to_ours
from models.fitting import (
    CLASSIFIER,
    DEPLOY,
    Fit,
    blocks_by_form,
    dialect_with,
    fit,
    form_of,
    nearest_fit,
    style_of,
)
from models.repvgg import POST_NORM, QAREPVGG, REPVGG, BlockStyle
from models.variants import Variant

_SHOWN_BLOCKS = 3
_FIRST_BLOCK = re.compile(
    r"(.+\.)(?:stage0\.(?:rbr_|reparam_conv)|stem\.(?:conv_kxk|reparam_conv)\.)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What stood around or beside the network and was taken off.

    ``heads`` are names of auxiliary classifiers, which inference does not run; ``others`` are
    wrappers that hold tensors too and were not read. ``within`` is the place of the RepVGG in a
    larger network, whose other parts are ``beside``; such a file is described but not loaded.
    """

    wrappers: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    within: str | None = None
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """What a file of weights turned out to be.

    ``tensors`` are the network's, in our names, as they were stored; ``names`` has the file's own
    names for them. ``nearest`` compares them with ``variant``, or, where that is None because
    nothing fits, with the variant that they come closest to. ``num_classes`` is None without a
    classifier. ``mixed`` says in words how train and deploy form are mixed, if they are.
    ``quantizers`` are the tensors that quantization-aware training added, in our names too.
    """

    path: Path
    dialect: Dialect
    form: str
    style: BlockStyle
    variant: Variant | None
    nearest: Fit
    num_classes: int | None
    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    heads: Mapping[str, Tensor]
    removed: Removed
    mixed: str | None = None
    quantizers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def dtypes(self) -> Mapping[str, int]:
        """The number of tensors by data type, the most frequent first."""
        kinds = (str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values())
        return dict(Counter(kinds).most_common())

    @property
    def parameters(self) -> int:
        """Trainable numbers: kernels, biases, BatchNorm's factors; no running statistics."""
        statistics = ("running_mean", "running_var")
        return sum(t.numel() for n, t in self.tensors.items() if not n.endswith(statistics))


def identify(file: CheckpointFile, expected: Variant | None = None) -> Checkpoint:
    """Say what ``file`` is. ``expected`` need not be published and is preferred if it fits.

    Raises:
        CheckpointError: if two tensors have names that mean the same.
    """
    state, quantizers = split_quantizers(file.weights)
    weights, within, beside = _repvgg_in(state)
    dialect = dialect_of(weights)
    heads = {n: t for n, t in weights.items() if _is_head(n, dialect)}
    theirs = [name for name in weights if name not in heads]
    translated = to_ours(dialect, [*theirs, *quantizers])
    quantizers = {translated.pop(name): tensor for name, tensor in quantizers.items()}
    names = {ours: name for name, ours in translated.items()}
    for name, ours in translated.items():
        if names[ours] != name:
            raise CheckpointError(
                f"checkpoint {file.path} has two names for one tensor: {name} and {names[ours]}"
            )
    tensors = {ours: weights[name] for ours, name in names.items()}
    form = form_of(tensors)
    style = REPVGG if form == DEPLOY else style_of(tensors, dialect)
    nearest = None if expected is None else fit(tensors, expected, form, style, dialect)
    if nearest is None or not nearest.exact:
        nearest = nearest_fit(tensors, form, style, dialect)
    variant = nearest.variant if nearest.exact else None
    return Checkpoint(
        path=file.path,
        dialect=dialect_with(dialect, style, variant),
        form=form,
        style=style,
        variant=variant,
        nearest=nearest,
        num_classes=_num_classes(tensors, nearest.variant),
        tensors=tensors,
        names=names,
        heads=heads,
        removed=Removed(
            wrappers=file.wrappers,
            prefixes=file.prefixes,
            heads=tuple(sorted({name.partition(".")[0] for name in heads})),
            others=file.others,
            within=within,
            beside=beside,
        ),
        mixed=_mixture(tensors),
        quantizers=quantizers,
    )


def style_name(style: BlockStyle) -> str:
    """A word for a train-form block style."""
    known = {REPVGG: "repvgg", QAREPVGG: "qarepvgg", POST_NORM: "post-addition BN"}
    return known.get(style, f"mobileone, {style.dense_branches} 3x3 branches")


def _repvgg_in(
    weights: dict[str, Tensor],
) -> tuple[dict[str, Tensor], str | None, tuple[str, ...]]:
    """The tensors of a RepVGG within a larger network, its place, and what else is there."""
    places = {match[1] for match in map(_FIRST_BLOCK.match, weights) if match}
    if dialect_of(weights) is not Dialect.UNKNOWN or len(places) != 1:
        return weights, None, ()
    place = places.pop()
    inner = {n.removeprefix(place): t for n, t in weights.items() if n.startswith(place)}
    beside = (name.partition(".")[0] for name in weights if not name.startswith(place))
    return inner, place, tuple(dict.fromkeys(beside))


def _is_head(name: str, dialect: Dialect) -> bool:
    return dialect is Dialect.PLUS and AUXILIARY.match(name) is not None


def _mixture(state: Mapping[str, Tensor]) -> str | None:
    """How train and deploy form are mixed, in words; None where they are not."""
    fused, branched = blocks_by_form(state)
    if not fused or not branched:
        return None

    def some(blocks: list[str]) -> str:
        more = f" and {len(blocks) - _SHOWN_BLOCKS} more" if len(blocks) > _SHOWN_BLOCKS else ""
        return f"{', '.join(blocks[:_SHOWN_BLOCKS])}{more}"

    return (
        f"mixes deploy form (a fused kernel in {some(fused)}) and train form "
        f"(branches in {some(branched)}); save the network in one form"
    )


def _num_classes(state: Mapping[str, Tensor], variant: Variant) -> int | None:
    """The number of classes, if there is a classifier and it fits."""
    if not all(name in state for name in CLASSIFIER):
        return None
    weight, bias = (list(state[name].shape) for name in CLASSIFIER)
    fits = bool(bias) and bias[0] >= 1 and weight == [bias[0], variant.feature_channels]
    return bias[0] if fits else None
