"""Which targets get their engine on this machine, and which wait for the device.

A target that the backend at hand cannot build for, but that some TensorRT can, is *deferred*: the
bundle is published without an engine for it, with the graph to build from and the command to build
with. A target that nobody knows, or that cannot do the precision, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from exporter.build_options import DEFAULT_OPTIONS, BuildOptions
from exporter.devices import (
    ARCHITECTURES,
    FULL,
    NO_ENGINE_YET,
    OLDEST_WITH,
    RTX,
    Target,
    target_text,
)
from exporter.engine import (
    Backend,
    BuildRequest,
    BuiltEngine,
    ProgressCallback,
    emulated_targets,
    get_backend,
    parse_targets,
    precision_lack,
    require_one_form,
    tensorrt_rtx,
)
from exporter.errors import EnvironmentLackError, InputError
from exporter.plan.commands import EngineBuild, trtexec
from exporter.spec import Precision

DEFERRED = "deferred"
BUILD_COMMAND = "repvgg-export build"
OLDEST_TENSORRT = (8, 6)
"""The oldest full TensorRT that `BUILD_COMMAND` drives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDecision:
    """``build_here`` are compute capabilities as `Backend.build` takes them.

    ``reason`` is one clause that says why ``deferred`` is not empty, and empty if it is.
    ``emulated``: the precision is computed in half, from a graph that is half all through.
    """

    build_here: tuple[str, ...]
    deferred: tuple[Target, ...] = ()
    reason: str = ""
    emulated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DeferredEngine:
    """An engine that is to be built on the device, and how.

    ``commands`` maps a TensorRT version such as ``10.3`` to the `trtexec` line for it.
    """

    targets: tuple[Target, ...]
    reason: str
    commands: dict[str, str] = field(default_factory=dict)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Compute capabilities, each once."""
        return tuple(dict.fromkeys(target.capability for target in self.targets))

    @property
    def not_run_reason(self) -> str:
        """What the ledger says of the engine."""
        return f"the engine is deferred: {self.reason}"

    @property
    def build_with(self) -> str:
        """This project's own command where it runs on the device, else the first of the lines."""
        releases = [release for target in self.targets for release in target.software]
        if any(release.tensorrt >= OLDEST_TENSORRT for release in releases):
            return f"{BUILD_COMMAND} BUNDLE"
        return next(iter(self.commands.values()), "")

    def to_json(self) -> dict[str, Any]:
        """The content of ``engine.json``."""
        return {
            "status": DEFERRED,
            "backend": FULL,
            "targets": list(self.capabilities),
            "devices": [target.device.name for target in self.targets if target.device],
            "reason": self.reason,
            "build_with": self.build_with,
            "commands": self.commands,
            "warnings": [],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOutcome:
    """What became of the engine: built, deferred, or each for some of the targets.

    At least one of the two is there.
    """

    built: BuiltEngine | None = None
    deferred: DeferredEngine | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """Those of the engine that there is; without one, those that it is to be built for."""
        if self.built is not None:
            return self.built.summary.targets
        return self.deferred.capabilities if self.deferred else ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user is told about targets that wait."""
        if self.deferred is None:
            return ()
        waiting = ", ".join(dict.fromkeys(target.label for target in self.deferred.targets))
        return (f"{NO_ENGINE_YET}{waiting} yet; on the device: {self.deferred.build_with}",)

    def to_json(self) -> dict[str, Any]:
        """The content of ``engine.json``: the figures, and under ``deferred`` what is missing."""
        waiting = self.deferred.to_json() if self.deferred else {}
        if self.built is None:
            return waiting
        figures = self.built.summary.to_json()
        return {**figures, "deferred": waiting} if waiting else figures


class MissingBackend:
    """Stands for TensorRT-RTX where it is not installed: it knows what that could build."""

    name = RTX

    def version(self) -> str:
        """No version is installed."""
        return "not installed"

    def supported_targets(self, precision: Precision) -> tuple[str, ...]:
        """Turing (sm75) does fp16 only, others what their tensor cores know."""
        return tuple(
            item.capability
            for item in ARCHITECTURES.values()
            if item.builder == RTX
            and (item.number > 75 or precision is Precision.FP16)
            and item.number >= OLDEST_WITH.get(str(precision), 0)
        )

    def require_options(self, options: BuildOptions) -> None:
        """As TensorRT-RTX does it."""
        tensorrt_rtx.require_options(options)

    def build(self, request: BuildRequest, progress: ProgressCallback) -> BuiltEngine:
        """Raises EnvironmentLackError."""
        del request, progress
        raise EnvironmentLackError("TensorRT-RTX is not installed, so no engine can be built")


def choose_backend(
    name: str,
    targets: Sequence[Target],
    find: Callable[..., Backend] = get_backend,
    *,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> Backend | None:
    """The backend called ``name``; None if it is not on this machine and nothing needs it here.

    That is so if every target is named and its engine is built on the device anyway.

    Raises:
        InputError: no backend has this name.
        EnvironmentLackError: the library is missing and some target could be built here.
    """
    try:
        return find(name, target=target_text(targets), options=options)
    except EnvironmentLackError:
        elsewhere = name.strip().lower() == FULL
        known = [ARCHITECTURES.get(target.capability) for target in targets]
        if known and all(item and (elsewhere or item.builder != RTX) for item in known):
            return None
        raise


def decide_engine(
    targets: Sequence[Target],
    backend: Backend | None,
    precision: Precision,
    *,
    allow_emulated: bool = False,
) -> EngineDecision:
    """Divide ``targets``; none of them means all that ``backend`` can build.

    ``allow_emulated`` is passed on to `parse_targets`.

    Raises:
        InputError: for a target that nobody knows, or that cannot do ``precision``.
        ValueError: if there is neither a target nor a backend.
    """
    if backend is None:
        if not targets:
            raise ValueError("without a backend the targets must be named")
        _require_able(targets, precision)
        reason = f"{_need(targets)} full TensorRT, run on the device itself"
        return EngineDecision(build_here=(), deferred=tuple(targets), reason=reason)
    able = {name for any_ in Precision for name in backend.supported_targets(any_)}
    deferred = tuple(t for t in targets if t.capability in ARCHITECTURES.keys() - able)
    _require_able(deferred, precision)
    here = [target for target in targets if target not in deferred]
    build_here: tuple[str, ...] = ()
    if here or not targets:
        build_here = parse_targets(
            target_text(here), backend, precision, allow_emulated=allow_emulated
        )
    emulated = bool(emulated_targets(build_here, backend, precision))
    if emulated:
        waiting = (target.capability for target in deferred)
        require_one_form((*build_here, *waiting), backend, precision)
    reason = ""
    if deferred:
        reason = (
            f"{_need(deferred)} full TensorRT, run on the device itself; "
            f"{backend.name} builds for {', '.join(backend.supported_targets(precision))}"
        )
    return EngineDecision(
        build_here=build_here, deferred=deferred, reason=reason, emulated=emulated
    )


def _require_able(targets: Sequence[Target], precision: Precision) -> None:
    for target in targets:
        known = ARCHITECTURES.get(target.capability)
        lack = precision_lack(known.number, precision) if known else None
        if lack is not None:
            raise InputError(f"target {target.label} cannot do {precision}: {lack}")


def defer(decision: EngineDecision, build: EngineBuild) -> DeferredEngine | None:
    """What the bundle says about the engines that wait for their device; None if none does."""
    if not decision.deferred:
        return None
    return DeferredEngine(
        targets=decision.deferred,
        reason=decision.reason,
        commands=device_commands(decision.deferred, build),
    )


def device_commands(targets: Sequence[Target], build: EngineBuild) -> dict[str, str]:
    """The `trtexec` line for every TensorRT of the targets that can build it, newest first."""
    versions = {release.tensorrt for target in targets for release in target.software}
    lines = {version: trtexec(build, version) for version in sorted(versions, reverse=True)}
    return {".".join(map(str, version)): line for version, line in lines.items() if line}


def _need(targets: Sequence[Target]) -> str:
    names = list(dict.fromkeys(target.label for target in targets))
    return f"{', '.join(names)} need{'s' * (len(names) == 1)}"
