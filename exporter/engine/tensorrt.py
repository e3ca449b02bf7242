"""Full TensorRT, 8.6 to 11: builds for the GPU of the machine it runs on, Jetson included.

This module does not import the library; only the worker does, and only after the driver was asked.
Never run so far: no machine with full TensorRT and a GPU was at hand. What holds it is that
it shares its code with `tensorrt_rtx`, and a test of every call against the published bindings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType

from exporter.build_options import BuildOptions
from exporter.engine import build_log, inspector, inventory
from exporter.engine.backend import BuildRequest, BuiltEngine, ProgressCallback
from exporter.engine.dla import dla_complaints, dla_lack
from exporter.engine.driver import device_target, driver_lack
from exporter.engine.installation import installed_version, is_installed, require_buildable
from exporter.engine.summary import EngineSummary
from exporter.engine.worker_process import DEFAULT_TIMEOUT_S, WORKER, WorkerOutput, run_worker
from exporter.errors import EnvironmentLackError, InputError
from exporter.spec import Precision

MODULE = "tensorrt"
_OLDEST = (8, 6)
_INSTALL = "on Jetson it comes with JetPack, elsewhere pip install 'repvgg-exporter[tensorrt]'"
_UNSEEN_DLA = (
    "{count} part(s) of the network run on the DLA, where the engine does not tell which data type "
    "they compute in"
)


class TensorRt:
    """The backend ``tensorrt``.

    ``worker_command`` and ``timeout_s`` say how the building process is started and how long it may
    take; searching kernels on a small device takes its time.

    Raises:
        EnvironmentLackError: the library is not installed, or older than 8.6, or no GPU is here.
    """

    name = "tensorrt"

    def __init__(
        self,
        *,
        worker_command: Sequence[str] = (*WORKER, MODULE),
        timeout_s: float = 2 * DEFAULT_TIMEOUT_S,
    ) -> None:
        self._worker_command = tuple(worker_command)
        self._timeout_s = timeout_s
        if not is_installed(MODULE):
            raise EnvironmentLackError(f"TensorRT is not installed here: {_INSTALL}")
        numbers = re.findall(r"\d+", self.version())[:2]
        if numbers and tuple(int(number) for number in numbers) < _OLDEST:
            raise EnvironmentLackError(
                f"TensorRT {self.version()} is too old, 8.6 or later is needed: {_INSTALL}"
            )
        lack = driver_lack()
        if lack is not None:
            raise EnvironmentLackError(f"TensorRT builds on the device itself, and here is {lack}")

    def version(self) -> str:
        """Version of the installed distribution, ``unknown`` if it was not installed as one."""
        return installed_version(MODULE)

    def supported_targets(self, precision: Precision) -> tuple[str, ...]:  # noqa: ARG002
        """The GPU of this machine, whatever the precision: the builder knows what it can do."""
        target = device_target()
        if target is None:
            raise EnvironmentLackError("the NVIDIA driver does not tell which GPU is in here")
        return (target,)

    def require_options(self, options: BuildOptions) -> None:
        """Raises InputError for a DLA that this release does not drive."""
        for complaint in self._complaints(options):
            raise InputError(complaint)

    def _complaints(self, options: BuildOptions) -> tuple[str, ...]:
        lack = dla_lack(self.version()) if options.dla is not None else None
        return (lack,) if lack else ()

    def build(self, request: BuildRequest, progress: ProgressCallback) -> BuiltEngine:
        """Build for this machine's GPU.

        Raises:
            InputError: no ONNX file, a batch that the model does not have, or something that this
                release or a DLA cannot do.
            GateFailedError: the builder refuses the network; its own words are in the message.
            EnvironmentLackError: the builder crashed, ran out of time, or does not load.
        """
        require_buildable(request)
        complaints = dla_complaints(request.options, request.precision, request.batch, request.size)
        complaints += self._complaints(request.options)
        if complaints:
            raise InputError("; ".join(complaints))
        output = run_worker(
            request, progress, command=self._worker_command, timeout_s=self._timeout_s
        )
        return BuiltEngine(
            plan=output.plan,
            summary=summarize(request, output, self.version()),
            build_log=output.log,
        )


def summarize(request: BuildRequest, output: WorkerOutput, version: str) -> EngineSummary:
    """The verdict from the engine inspector's layer information and the ONNX parser's log."""
    records = build_log.read_records(output.log)
    nodes = build_log.read_nodes(records)
    layers = inspector.with_network_origins(inspector.read_inspection(output.layers or ""), nodes)
    dla_layers = sum(layer.type == inspector.DLA_LAYER for layer in layers)
    unseen = (_UNSEEN_DLA.format(count=dla_layers),) if dla_layers else ()
    found = inventory.findings(layers, nodes)
    return EngineSummary(
        backend=TensorRt.name,
        version=output.version or version,
        per_target=MappingProxyType(
            dict.fromkeys(request.targets, inventory.figures(layers, nodes))
        ),
        plan_bytes=len(output.plan),
        dla_layers=dla_layers,
        typing=output.typing,
        warnings=unseen + found + output.notes + build_log.messages(records, "WARNING"),
    )
