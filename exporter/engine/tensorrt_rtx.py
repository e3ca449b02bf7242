"""TensorRT for RTX: builds plans ahead of time, on machines without a GPU or driver.

This module does not import the library; only the worker does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType

from exporter.build_options import BuildOptions
from exporter.devices import ARCHITECTURES, OLDEST_WITH
from exporter.engine import build_log, inventory
from exporter.engine.backend import BuildRequest, BuiltEngine, ProgressCallback
from exporter.engine.installation import installed_version, is_installed, require_buildable
from exporter.engine.summary import EngineSummary
from exporter.engine.worker_process import DEFAULT_TIMEOUT_S, WORKER, WorkerOutput, run_worker
from exporter.errors import EnvironmentLackError, InputError
from exporter.spec import Precision

MODULE = "tensorrt_rtx"
_OLDEST = (1, 5)
"""Older releases have the API and the builder of TensorRT 10."""

_INSTALL = "pip install 'repvgg-exporter[rtx]'"
_TURING = "sm75"
TARGETS = (_TURING, "sm80", "sm86", "sm89", "sm120", "sm121")

_REFUSED = MappingProxyType(
    {
        "typing weak": "it builds strongly typed networks only",
        "quantization implicit": "it takes INT8 from Q/DQ nodes only",
        "calibration cache": "it takes INT8 from Q/DQ nodes only",
        "dla": "it builds for no DLA",
        "timing cache": "it ignores one",
        "optimization level": "its plans are the same at every level",
        "hardware compatibility": "it ignores one; name several targets instead",
        "version compatible": "it fails to build such plans",
    }
)
"""Options that the library ignores or fails on, measured with 1.7.1."""


class TensorRtRtx:
    """The backend ``tensorrt-rtx``.

    ``worker_command`` and ``timeout_s`` say how the building process is started and how long it may
    take.

    Raises:
        EnvironmentLackError: the library is not installed, or older than 1.5.
    """

    name = "tensorrt-rtx"

    def __init__(
        self,
        *,
        worker_command: Sequence[str] = (*WORKER, MODULE),
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._worker_command = tuple(worker_command)
        self._timeout_s = timeout_s
        if not is_installed(MODULE):
            raise EnvironmentLackError(
                f"TensorRT-RTX is not installed, so no engine can be built: {_INSTALL}"
            )
        numbers = re.findall(r"\d+", self.version())[:2]
        if numbers and tuple(int(number) for number in numbers) < _OLDEST:
            raise EnvironmentLackError(
                f"TensorRT-RTX {self.version()} is too old, 1.5 or later is needed: {_INSTALL}"
            )

    def version(self) -> str:
        """Version of the installed distribution, ``unknown`` if it was not installed as one."""
        return installed_version(MODULE)

    def supported_targets(self, precision: Precision) -> tuple[str, ...]:
        """Turing (sm75) for fp16 only, and no others that lack it: `parse_targets` tells why."""
        if precision is Precision.FP16:
            return TARGETS
        oldest = OLDEST_WITH.get(str(precision), 0)
        able = (name for name in TARGETS if ARCHITECTURES[name].number >= oldest)
        return tuple(name for name in able if name != _TURING)

    def require_options(self, options: BuildOptions) -> None:
        """Raises InputError: see the function of this name."""
        require_options(options)

    def build(self, request: BuildRequest, progress: ProgressCallback) -> BuiltEngine:
        """Build one plan that holds code for all targets of the request.

        Raises:
            InputError: no target, no ONNX file, a batch that the model does not have, or an option
                that only full TensorRT obeys.
            GateFailedError: the builder refuses the network; its own words are in the message.
            EnvironmentLackError: the builder crashed, ran out of time, or does not load.
        """
        self.require_options(request.options)
        require_buildable(request)
        output = run_worker(
            request, progress, command=self._worker_command, timeout_s=self._timeout_s
        )
        return BuiltEngine(
            plan=output.plan, summary=self._summarize(request, output), build_log=output.log
        )

    def _summarize(self, request: BuildRequest, output: WorkerOutput) -> EngineSummary:
        records = build_log.read_records(output.log)
        nodes = build_log.read_nodes(records)
        layers = build_log.read_layers(records)
        memory = build_log.read_memory(records)
        found = inventory.figures(layers, nodes)
        return EngineSummary(
            backend=self.name,
            version=output.version or self.version(),
            # One table holds for the whole plan: see inventory.
            per_target=MappingProxyType(dict.fromkeys(request.targets, found)),
            plan_bytes=len(output.plan),
            activation_memory_bytes=memory.get("Activation"),
            weights_memory_bytes=memory.get("Weights"),
            warnings=inventory.findings(layers, nodes)
            + output.notes
            + build_log.messages(records, "WARNING"),
        )


def require_options(options: BuildOptions) -> None:
    """Return only if TensorRT-RTX, here or not, neither ignores an option nor fails on it.

    Raises:
        InputError: naming those of ``options``, with the reasons.
    """
    reasons = [f"{name}: {_REFUSED[name]}" for name in options.full_tensorrt_only]
    if reasons:
        raise InputError(
            f"TensorRT-RTX cannot do this ({'; '.join(reasons)}): use the backend tensorrt on the "
            "device, or leave it out"
        )
