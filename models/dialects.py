"""How others name the weights of a RepVGG, translated to our names and back.

Our names are the official repository's (``stage1.0.rbr_dense.conv.weight``, ``linear.weight``)
plus what it has no name for. Per dialect, as published:

* ``official``: DingXiaoH/RepVGG, ``repvgg.py``: ``rbr_dense``, ``rbr_1x1``, ``rbr_identity``,
  ``rbr_reparam``, ``se.down``, ``se.up``.
* ``timm``: ByobNet: ``stem``, ``stages.0.0`` (the paper's stage 1), ``conv_kxk``, ``conv_1x1``,
  ``identity``, ``reparam_conv``, ``attn.fc1``, ``attn.fc2``, ``head.fc``.
* ``plus``: the official ``repvggplus.py``: ``stage1.blocks.0``; stage 3 in two halves,
  ``stage3_first`` and ``stage3_second``; ``post_se``; auxiliary classifiers.
* ``qarepvgg``: YOLOv6: ``rbr_1x1`` is a convolution without BatchNorm, the identity has no
  parameters, ``bn`` comes after the sum. These are our names too.
* ``mobileone``: ``rbr_conv.K``, ``rbr_scale``, ``rbr_skip``, ``reparam_conv`` in RepVGG's stages.
* ``exporter``: our names where no other dialect has the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum


class Dialect(str, Enum):
    """Whose names a checkpoint has."""

    OFFICIAL = "official"
    TIMM = "timm"
    PLUS = "plus"
    QAREPVGG = "qarepvgg"
    MOBILEONE = "mobileone"
    EXPORTER = "exporter"
    UNKNOWN = "unknown"


BLOCK = re.compile(r"(stage0|stage[1-4]\.\d+)\.(.+)")
"""Our name of a block and, within it, of a tensor."""
AUXILIARY = re.compile(r"(stage1|stage2|stage3_first)_aux\.")
"""Heads of RepVGGplus that only training uses."""

_TIMM_BLOCK = re.compile(r"(?:stem|stages\.([0-3])\.(\d+))\.(.+)")
_PLUS_BLOCK = re.compile(r"(?:stage0|stage([124]|3_first|3_second)\.blocks\.(\d+))\.(.+)")
_ATTRIBUTES: Mapping[Dialect, tuple[tuple[str, str], ...]] = {
    Dialect.TIMM: (
        ("conv_kxk.", "rbr_dense."),
        ("conv_1x1.", "rbr_1x1."),
        ("identity.", "rbr_identity."),
        ("reparam_conv.", "rbr_reparam."),
        ("attn.fc1.", "se.down."),
        ("attn.fc2.", "se.up."),
    ),
    Dialect.PLUS: (("post_se.", "se."),),
    Dialect.MOBILEONE: (
        ("rbr_conv.", "rbr_dense."),
        ("rbr_scale.", "rbr_1x1."),
        ("rbr_skip.", "rbr_identity."),
        ("reparam_conv.", "rbr_reparam."),
    ),
}
_MOBILEONE = re.compile(r"stage[0-4].*\.(rbr_conv|rbr_scale|rbr_skip|reparam_conv)\.")


def dialect_of(names: Iterable[str]) -> Dialect:
    """Whose names these are; EXPORTER and QAREPVGG, whose names are ours, count as OFFICIAL."""
    names = tuple(names)
    if any(name.startswith("stage") and ".blocks." in name for name in names):
        return Dialect.PLUS if any(map(_PLUS_BLOCK.match, names)) else Dialect.UNKNOWN
    timm = [match[3] for match in map(_TIMM_BLOCK.fullmatch, names) if match]
    if any(rest.startswith(("conv_kxk.", "reparam_conv.")) for rest in timm):
        return Dialect.TIMM
    if any(map(_MOBILEONE.match, names)):
        return Dialect.MOBILEONE
    ours = [match[2] for match in map(BLOCK.fullmatch, names) if match]
    return Dialect.OFFICIAL if any(r.startswith("rbr_") for r in ours) else Dialect.UNKNOWN


def to_ours(dialect: Dialect, names: Iterable[str]) -> dict[str, str]:
    """Our name for each of ``names``; a name that the dialect does not have stays."""
    names = tuple(names)
    if dialect is Dialect.TIMM:
        return {name: _from_timm(name) for name in names}
    if dialect is Dialect.PLUS:
        half = len({m[2] for m in map(_PLUS_BLOCK.match, names) if m and m[1] == "3_first"})
        return {name: _from_plus(name, half) for name in names}
    if dialect is Dialect.MOBILEONE:
        single = not any(".rbr_conv.1." in name for name in names)
        return {name: _from_mobileone(name, single) for name in names}
    return {name: name for name in names}


def from_ours(dialect: Dialect, names: Iterable[str]) -> dict[str, str]:
    """The dialect's name for each of our ``names``, the reverse of :func:`to_ours`."""
    names = tuple(names)
    if dialect is Dialect.TIMM:
        return {name: _to_timm(name) for name in names}
    if dialect is Dialect.PLUS:
        blocks = {m[1] for m in map(BLOCK.fullmatch, names) if m and m[1].startswith("stage3.")}
        return {name: _to_plus(name, len(blocks) // 2) for name in names}
    if dialect is Dialect.MOBILEONE:
        single = any(".rbr_dense.conv." in name for name in names)
        return {name: _to_mobileone(name, single) for name in names}
    return {name: name for name in names}


def _from_timm(name: str) -> str:
    if name.startswith("head.fc."):
        return f"linear.{name.removeprefix('head.fc.')}"
    match = _TIMM_BLOCK.fullmatch(name)
    if match is None:
        return name
    # Stage numbers shift by one: timm's stem is the paper's stage 0.
    block = "stage0" if match[1] is None else f"stage{int(match[1]) + 1}.{match[2]}"
    return f"{block}.{_renamed(match[3], _ATTRIBUTES[Dialect.TIMM])}"


def _to_timm(name: str) -> str:
    if name.startswith("linear."):
        return f"head.fc.{name.removeprefix('linear.')}"

    def place(block: str) -> str:
        stage, _, index = block.removeprefix("stage").partition(".")
        return f"stages.{int(stage) - 1}.{index}" if index else "stem"

    return _with_block(name, place, _ATTRIBUTES[Dialect.TIMM])


def _from_plus(name: str, half: int) -> str:
    match = _PLUS_BLOCK.fullmatch(name)
    if match is None:
        return name
    stage, index, rest = match[1], match[2], _renamed(match[3], _ATTRIBUTES[Dialect.PLUS])
    if stage is None:
        return f"stage0.{rest}"
    place = int(index) + (half if stage == "3_second" else 0)
    return f"stage{stage[0]}.{place}.{rest}"


def _to_plus(name: str, half: int) -> str:
    def place(block: str) -> str:
        stage, _, number = block.partition(".")
        if not number:
            return stage
        if stage != "stage3":
            return f"{stage}.blocks.{number}"
        second = int(number) >= half
        part = "second" if second else "first"
        return f"stage3_{part}.blocks.{int(number) - (half if second else 0)}"

    return _with_block(name, place, _ATTRIBUTES[Dialect.PLUS])


def _from_mobileone(name: str, single: bool) -> str:
    match = BLOCK.fullmatch(name)
    if match is None:
        return name
    rest = _renamed(match[2], _ATTRIBUTES[Dialect.MOBILEONE])
    return f"{match[1]}.{rest.replace('rbr_dense.0.', 'rbr_dense.') if single else rest}"


def _to_mobileone(name: str, single: bool) -> str:
    if single:
        name = name.replace(".rbr_dense.", ".rbr_dense.0.")
    return _with_block(name, lambda block: block, _ATTRIBUTES[Dialect.MOBILEONE])


def _with_block(
    name: str, place: Callable[[str], str], attributes: tuple[tuple[str, str], ...]
) -> str:
    match = BLOCK.fullmatch(name)
    if match is None:
        return name
    back = tuple((ours, theirs) for theirs, ours in attributes)
    return f"{place(match[1])}.{_renamed(match[2], back)}"


def _renamed(name: str, attributes: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in attributes:
        if name.startswith(theirs):
            return f"{ours}{name.removeprefix(theirs)}"
    return name
