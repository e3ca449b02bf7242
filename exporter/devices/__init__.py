"""From what people write as a target to devices and compute capabilities. Standard library only.

``orin``, ``Jetson AGX Orin``, ``rtx3060`` and ``sm86`` may be mixed in one comma-separated list.
What the compute capability then can, and who builds for it, is the backend's knowledge.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.devices.precisions import Advice, precision_advice
from exporter.devices.table import (
    ALIASES,
    ARCHITECTURES,
    DEVICES,
    FULL,
    OLDEST_WITH,
    RTX,
    UNSUPPORTED,
    Architecture,
    Device,
    Software,
    Version,
)
from exporter.errors import InputError

__all__ = [
    "ARCHITECTURES",
    "DEVICES",
    "FULL",
    "NO_ENGINE_YET",
    "OLDEST_WITH",
    "RTX",
    "UNSUPPORTED",
    "Advice",
    "Architecture",
    "Device",
    "Software",
    "Target",
    "Version",
    "check_dla",
    "find_device",
    "precision_advice",
    "read_capability",
    "resolve_targets",
    "target_text",
]

_CAPABILITY = re.compile(r"(?:(?:sm|compute)[_-]?)?(\d{2,3}|\d{1,2}\.\d)", re.IGNORECASE)
_CURRENT: tuple[Version, ...] = ((11, 4), (10, 13), (8, 6))
"""One TensorRT of each generation, for devices whose TensorRT the user installs freely."""

_BRANDS = re.compile(r"\b(nvidia|geforce|jetson|tesla|quadro)\b")


NO_ENGINE_YET = "no engine for "
"""How a manifest's note begins that tells of a deferred engine; building it removes the note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One entry of what was asked for. ``device`` is None if it was a compute capability."""

    asked: str
    capability: str
    device: Device | None = None

    @property
    def label(self) -> str:
        """``sm86``, or ``orin-nx (sm87)``."""
        return f"{self.device.name} ({self.capability})" if self.device else self.capability

    @property
    def software(self) -> tuple[Software, ...]:
        """Generations of software, newest first: the device's own, else what knows the capability.

        A compute capability that only Jetsons have stands for the first of them in the table.
        """
        device = self.device or next(iter(_devices_of(self.capability)), None)
        if device and device.software:
            return device.software
        known = ARCHITECTURES.get(self.capability)
        if known is None:
            return ()
        versions = [v for v in _CURRENT if known.newest is None or v < known.newest]
        if known.newest is not None:
            versions.insert(0, known.newest)
        return tuple(
            Software(name="as installed", tensorrt=version)
            for version in versions
            if version >= known.oldest
        )


def read_capability(text: str) -> str | None:
    """``sm86`` for ``sm86``, ``86``, ``8.6`` or ``compute_86``; None for anything else."""
    match = _CAPABILITY.fullmatch(text)
    return f"sm{int(match[1].replace('.', ''))}" if match else None


def find_device(name: str) -> Device:
    """The device called ``name``, ignoring case, brand names, spaces, dashes and underscores.

    Raises:
        InputError: no device has this name, with the nearest; or it is not supported, and why.
    """
    key = _key(name)
    by_key = {_key(known): known for known in DEVICES}
    by_key |= {_key(alias): known for alias, known in ALIASES.items()}
    if key in by_key:
        return DEVICES[by_key[key]]
    if key in UNSUPPORTED:
        raise InputError(f"target {name} is not supported: {UNSUPPORTED[key]}")
    near = difflib.get_close_matches(key, by_key, n=3, cutoff=0.6)
    names = list(dict.fromkeys(by_key[match] for match in near))
    hint = f"nearest: {', '.join(names)}; " if names else ""
    raise InputError(
        f"unknown target {name!r} ({hint}known: compute capabilities such as sm86, and "
        f"{len(DEVICES)} devices such as orin, orin-nano, t4, l4, rtx3060, rtx5090, thor)"
    )


def resolve_targets(text: str | None) -> tuple[Target, ...]:
    """The entries of a comma-separated list in their order; none for None.

    Compute capabilities (``sm86``, ``86``, ``8.6``) are not checked here: `parse_targets` does it.

    Raises:
        InputError: for an empty list, or an entry that is no device.
    """
    if text is None:
        return ()
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise InputError(f"no target in {text!r}; name a device such as orin, or sm86")
    return tuple(dict.fromkeys(_target(entry) for entry in entries))


def target_text(targets: Sequence[Target]) -> str | None:
    """The capabilities as `parse_targets` reads them; None if there are none."""
    return ",".join(dict.fromkeys(target.capability for target in targets)) or None


def check_dla(targets: Sequence[Target], core: int, precision: str) -> None:
    """Return only if DLA core number ``core`` can exist on every target, at this precision.

    Raises:
        InputError: saying what stands against it.
    """
    having = ", ".join(name for name, device in DEVICES.items() if max(device.dla_cores))
    if not targets:
        raise InputError(f"DLA needs a target that has one: {having}")
    if precision not in ("fp16", "int8"):
        raise InputError(f"DLA computes in fp16 and int8 only, not in {precision}")
    for target in targets:
        cores = max(_dla_cores(target))
        if cores == 0:
            raise InputError(f"target {target.label} has no DLA (with DLA: {having})")
        if not 0 <= core < cores:
            raise InputError(
                f"target {target.label} has DLA cores 0 to {cores - 1}, no core {core}"
            )


def _dla_cores(target: Target) -> tuple[int, ...]:
    devices = (target.device,) if target.device else _devices_of(target.capability)
    return tuple(count for device in devices for count in device.dla_cores) or (0,)


def _devices_of(capability: str) -> tuple[Device, ...]:
    return tuple(device for device in DEVICES.values() if device.capability == capability)


def _target(entry: str) -> Target:
    capability = read_capability(entry)
    if capability is not None:
        if capability in UNSUPPORTED:
            raise InputError(f"target {entry} is not supported: {UNSUPPORTED[capability]}")
        return Target(asked=entry, capability=capability)
    device = find_device(entry)
    return Target(asked=entry, capability=device.capability, device=device)


def _key(name: str) -> str:
    """``Jetson AGX Orin`` -> ``agxorin``."""
    return re.sub(r"[\s_-]+", "", _BRANDS.sub("", name.lower().replace("_", " ")))
