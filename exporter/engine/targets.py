"""Compute capabilities: what the user may write, and why a target is refused.

Only facts about devices are kept here. Which targets a library can build for is asked of the
backend, so a new backend brings its own list.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

from exporter.devices import ARCHITECTURES, DEVICES, OLDEST_WITH, UNSUPPORTED, read_capability
from exporter.engine.backend import Backend
from exporter.errors import InputError
from exporter.spec import Precision

_DEVICE_BACKEND = "tensorrt"
"""Builds for the GPU it runs on only."""

_REASONS = {
    ("sm75", Precision.FP32): "FP32 matrix products do not compile for Turing (sm75); use fp16",
    (
        "sm75",
        Precision.INT8,
    ): "on Turing (sm75) the builder runs quantized convolutions in half and "
    "dequantizes the weights at run time, so INT8 brings nothing there; use fp16, --backend "
    "tensorrt for INT8 built on the device, or --allow-emulated to build it here all the same",
}
_TENSOR_CORES = {
    Precision.BF16: "bfloat16 came with Ampere (sm80); use fp16",
    Precision.FP8: "FP8 came with Ada Lovelace (sm89); use int8, or fp16 before Ampere",
}
"""Why a target before `OLDEST_WITH` cannot do it."""

_EMULATED = frozenset({("sm75", Precision.INT8)})
"""What a backend leaves out although it can be built."""


def parse_targets(
    text: str | None, backend: Backend, precision: Precision, *, allow_emulated: bool = False
) -> tuple[str, ...]:
    """Read ``sm86``, ``86``, ``8.6`` or a comma-separated list of them, spaces allowed.

    Returns canonical names (``sm86``), ascending, each once; for None all that ``backend`` supports
    at ``precision``. The result depends on neither order nor repetition: a plan does not either.
    With ``allow_emulated`` a target that was named may compute quantized convolutions in half.

    Raises:
        InputError: naming the bad entry, the nearest target and the known ones, or the reason why
            the target cannot be built for at this precision.
    """
    supported = backend.supported_targets(precision)
    if text is None:
        return supported
    entries = [entry.strip() for entry in text.split(",")]
    if not any(entries):
        raise InputError(f"no target in {text!r}; choose from: {', '.join(supported)}")
    names = {_canonical(entry, supported) for entry in entries if entry}
    for name in sorted(names, key=_number):
        if name in supported or (allow_emulated and _is_emulated(name, backend, precision)):
            continue
        raise InputError(_refusal(name, backend, precision))
    require_one_form(names, backend, precision)
    return tuple(sorted(names, key=_number))


def emulated_targets(
    names: Collection[str], backend: Backend, precision: Precision
) -> tuple[str, ...]:
    """Those of ``names`` where ``backend`` computes ``precision`` in half, ascending."""
    supported = backend.supported_targets(precision)
    emulated = {n for n in names if n not in supported and _is_emulated(n, backend, precision)}
    return tuple(sorted(emulated, key=_number))


def require_one_form(names: Collection[str], backend: Backend, precision: Precision) -> None:
    """Return only if all or none of ``names`` emulate ``precision``.

    One plan has one layer table, so an emulating target would take INT8 from the others; and it is
    built from another graph.

    Raises:
        InputError: otherwise.
    """
    emulated = ", ".join(emulated_targets(names, backend, precision))
    others = ", ".join(sorted({*names} - {*emulated.split(", ")}, key=_number))
    if emulated and others:
        raise InputError(
            f"{emulated} computes {precision} in half and needs a graph and a plan of its own, "
            f"without {others}: export {emulated} to another bundle (--out)"
        )


def require_half_scales(
    names: Collection[str], backend: Backend, precision: Precision, *, bundle: str
) -> None:
    """Return only if no target of ``names`` needs half scales, which ``bundle`` does not have.

    Raises:
        InputError: otherwise.
    """
    emulated = ",".join(emulated_targets(names, backend, precision))
    if emulated:
        raise InputError(
            f"{emulated} computes {precision} in half, which needs a graph with half scales, and "
            f"bundle {bundle} has float ones: export again with --target {emulated} "
            "--allow-emulated"
        )


def target_names(text: str | None) -> tuple[str, ...]:
    """Canonical names of the entries of a target list that are in a known form; others dropped."""
    names = (read_capability(entry.strip()) for entry in (text or "").split(","))
    return tuple(name for name in names if name)


def precision_lack(capability: int, precision: Precision) -> str | None:
    """Why tensor cores of this capability, 75 for sm75, cannot do it; None if they can."""
    can = capability >= OLDEST_WITH.get(str(precision), 0)
    return None if can else _TENSOR_CORES[precision]


def _is_emulated(name: str, backend: Backend, precision: Precision) -> bool:
    builds = any(name in backend.supported_targets(other) for other in Precision)
    return builds and (name, precision) in _EMULATED


def _number(name: str) -> int:
    return int(name.removeprefix("sm"))


def _canonical(entry: str, supported: tuple[str, ...]) -> str:
    name = read_capability(entry)
    if name is None:
        raise InputError(_unknown(entry, entry.lower(), supported))
    return name


def _unknown(entry: str, name: str, supported: tuple[str, ...]) -> str:
    digits = name.removeprefix("sm")
    if digits.isdecimal() and len(digits) < 5:
        wanted = int(digits)
        nearest = [min(supported, key=lambda target: abs(_number(target) - wanted))]
    else:
        nearest = difflib.get_close_matches(name, supported, n=1, cutoff=0.3)
    hint = f"nearest: {nearest[0]}; " if nearest else ""
    return f"unknown target {entry!r} ({hint}known: {', '.join(supported)})"


def _refusal(name: str, backend: Backend, precision: Precision) -> str:
    known = backend.supported_targets(precision)
    if backend.name == _DEVICE_BACKEND:
        return (
            f"target {name} is not the GPU of this machine ({', '.join(known)}): full TensorRT "
            "builds only for the GPU it runs on; build there"
        )
    if any(name in backend.supported_targets(other) for other in Precision):
        reason = precision_lack(_number(name), precision) or _REASONS.get((name, precision))
        reason = reason or f"{backend.name} does not build it"
        return f"target {name} cannot do {precision}: {reason} (known: {', '.join(known)})"
    if name in UNSUPPORTED:
        return f"target {name} is not supported: {UNSUPPORTED[name]}"
    if name in ARCHITECTURES:
        devices = [device.name for device in DEVICES.values() if device.capability == name]
        who = f"{ARCHITECTURES[name].name}: {', '.join(devices[:4])}"
        return (
            f"target {name} ({who}) needs full TensorRT, run on the device itself; "
            f"{backend.name} builds for {', '.join(known)}"
        )
    return _unknown(name, name, known)
