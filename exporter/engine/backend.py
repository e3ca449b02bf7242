"""What the pipeline asks of whoever builds engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from exporter.build_options import DEFAULT_OPTIONS, BuildOptions
from exporter.engine.summary import EngineSummary
from exporter.profiles import BatchProfile, SizeProfile
from exporter.spec import Precision

ProgressCallback = Callable[[str, float], None]
"""Called with a phase in words and the fraction done, 0 to 1, which never goes back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One engine to build.

    ``onnx_path`` already holds the precision (half tensors, or Q/DQ nodes); ``precision`` says what
    the convolutions of the result are expected to run in. ``targets`` are compute capabilities such
    as ``sm86``, as `parse_targets` returns them. ``size`` bounds the open height and width of image
    inputs; without it only the batch may be open. ``workspace_mib`` limits the scratch memory of a
    layer on the device, None leaves the builder's own limit.

    ``float_path`` is the float graph of the same network: builders that choose data types by
    themselves read it in place of the half graph, and implicit INT8 needs it. ``options`` are for
    the backends that can obey them; none drops one in silence. ``cache_path`` is the calibration
    cache of the network, for implicit INT8 without another one in ``options``.
    """

    onnx_path: Path
    precision: Precision
    targets: tuple[str, ...]
    batch: BatchProfile
    size: SizeProfile | None = None
    workspace_mib: int | None = None
    float_path: Path | None = None
    cache_path: Path | None = None
    options: BuildOptions = DEFAULT_OPTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A serialized plan, what it contains, and everything the builder said on the way."""

    plan: bytes
    summary: EngineSummary
    build_log: str


class Backend(Protocol):
    """A library that turns ONNX into an engine."""

    @property
    def name(self) -> str:
        """The name that `get_backend` knows it by."""
        ...

    def version(self) -> str:
        """Version of the installed library."""
        ...

    def supported_targets(self, precision: Precision) -> tuple[str, ...]:
        """Compute capabilities that can do ``precision``, ascending."""
        ...

    def require_options(self, options: BuildOptions) -> None:
        """Return only if it can obey ``options``, as far as is known before building.

        Raises:
            InputError: naming those that it cannot.
        """
        ...

    def build(self, request: BuildRequest, progress: ProgressCallback) -> BuiltEngine:
        """Build one plan for all targets of the request.

        Raises:
            InputError: the request does not fit the model, such as a batch the model has not.
            GateFailedError: the builder refuses the network; its own words are in the message.
            EnvironmentLackError: the builder crashed, hung, or is not installed.
        """
        ...
