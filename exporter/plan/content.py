"""The values that a plan consists of, and their JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from exporter.bundle import ENGINE
from exporter.devices import ARCHITECTURES, Target, precision_advice
from exporter.plan.commands import EngineBuild
from exporter.plan.engine import DeferredEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage by the name that the progress shows, and what it does in one line."""

    name: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A file of the bundle. ``bytes`` is an estimate unless it ``exists``; None: some kilobytes."""

    name: str
    bytes: int | None = None
    exists: bool = False

    def to_json(self) -> dict[str, Any]:
        """The fields by name, and whether the size is an estimate."""
        estimate = self.bytes is not None and not self.exists
        return {"name": self.name, "bytes": self.bytes, "estimate": estimate}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCommand:
    """A command line, and the library that its tool comes with."""

    library: str
    line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTarget:
    """A target, the backend that builds its engine, and whether it does so on this machine."""

    target: Target
    backend: str
    here: bool

    def to_json(self) -> dict[str, Any]:
        """With the facts of the device, where one was named."""
        target, device = self.target, self.target.device
        known = target.capability in ARCHITECTURES
        advice = precision_advice(target.capability, self.backend) if known else ()
        return {
            "asked": target.asked,
            "capability": target.capability,
            "device": device.name if device else None,
            "products": device.products if device else None,
            "memory": device.memory if device else None,
            "dla": device.dla if device else None,
            "software": [str(release) for release in target.software],
            "backend": self.backend,
            "built": "here" if self.here else "on the device",
            "precisions": {a.precision: {"worth": a.worth, "reason": a.reason} for a in advice},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``build`` is what the engine is built from, ``deferred`` what waits for its device.

    ``engine_bytes`` is the engine's size where there is one, else an estimate. ``warnings`` say
    what fails or disappoints, ``notes`` what was assumed.
    """

    title: str
    out: str
    build: EngineBuild
    stages: tuple[PlannedStage, ...]
    files: tuple[PlannedFile, ...]
    targets: tuple[PlannedTarget, ...]
    engine_bytes: int
    commands: tuple[PlannedCommand, ...]
    deferred: DeferredEngine | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def built_here(self) -> tuple[str, ...]:
        """Compute capabilities whose engine is built on this machine, each once."""
        return tuple(dict.fromkeys(row.target.capability for row in self.targets if row.here))

    @property
    def is_engine_estimated(self) -> bool:
        """Whether there is no engine yet."""
        return not any(file.name == ENGINE and file.exists for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """The object that ``plan --json`` prints."""
        build = self.build
        return {
            "model": self.title,
            "precision": build.precision,
            "out": self.out,
            "batch": str(build.batch),
            "dynamic_size": None if build.size is None else str(build.size),
            "inputs": [entry.to_json() for entry in build.inputs],
            "dla_core": build.dla_core,
            "stages": [{"stage": stage.name, "what": stage.what} for stage in self.stages],
            "files": [file.to_json() for file in self.files],
            "targets": [row.to_json() for row in self.targets],
            "engine": {
                "build_here": list(self.built_here),
                "bytes": self.engine_bytes,
                "estimate": self.is_engine_estimated,
                "deferred": self.deferred.to_json() if self.deferred else None,
            },
            "commands": [{"library": c.library, "line": c.line} for c in self.commands],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }
