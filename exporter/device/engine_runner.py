"""Runs a serialized engine: arrays in, arrays out, every input checked before the GPU sees it.

The runtime (`tensorrt` or `tensorrt_rtx`) and the device memory are handed in, so one code path
serves TensorRT 8.6 to 11 and TensorRT-RTX. It uses only what all of their bindings have; what
TensorRT-RTX compiles at the start is the part of `compiling`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from exporter.device.compiling import CompiledKernels
from exporter.device.engine_ports import cut, ordered, read_port
from exporter.device.kernel_cache import Startup
from exporter.device.memory import Array, DeviceMemory
from exporter.engine.tensorrt_names import IExecutionContext
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.profiles import BatchProfile
from exporter.running.onnx_runner import Batch, Outputs


@dataclass(slots=True)
class _Buffer:
    """Device memory for one port, kept as long as it is large enough."""

    address: int
    size_bytes: int


class EngineRunner:
    """One engine on one GPU, ready to run; as a context manager it gives its memory back.

    ``trt`` is the library that made the engine, ``memory`` belongs to the caller. ``input_names``
    is the order in which batches come; without it, the engine's own. With ``runtime_cache`` kernels
    that TensorRT-RTX compiles here are kept for the next start. ``startup`` says what this one
    took.

    Raises:
        EnvironmentLackError: the library does not load this engine, or memory is short.
        InputError: the engine has inputs or outputs of a type that numpy has not, or other inputs
            than ``input_names``.
    """

    def __init__(
        self,
        plan: Path,
        trt: Any,
        memory: DeviceMemory,
        *,
        input_names: Sequence[str] = (),
        runtime_cache: bool = True,
    ) -> None:
        began = time.perf_counter()
        self._memory = memory
        self._buffers: dict[str, _Buffer] = {}
        self._said: list[str] = []
        # Kept: the bindings hold no reference of their own to the logger.
        self._logger = _make_logger(trt, self._said)
        self._runtime = trt.Runtime(self._logger)
        content = plan.read_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EnvironmentLackError(
                f"{trt.__name__} {trt.__version__} does not load {plan} on this GPU"
                f"{self._words()}; `repvgg-export build` makes an engine for this machine"
            )
        self._kernels = CompiledKernels(trt, content, caching=runtime_cache)
        self._context: IExecutionContext = self._kernels.create_context(self._engine)
        if self._context is None:
            raise EnvironmentLackError(f"no execution context for {plan}{self._words()}")
        ports = [
            read_port(trt, self._engine, index) for index in range(self._engine.num_io_tensors)
        ]
        self.inputs = ordered(tuple(port for port in ports if port.smallest), input_names)
        self.outputs = tuple(port for port in ports if not port.smallest)
        self.startup = Startup(load_ms=_since(began))
        self._kernels.describe(self.startup)

    def __enter__(self) -> EngineRunner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._release()

    def close(self) -> None:
        """Keep what was compiled, then give everything back."""
        try:
            self._kernels.keep(self.startup)
        finally:
            self._release()

    def _release(self) -> None:
        """Give the buffers back, then let context, engine and runtime go, in this order."""
        try:
            while self._buffers:
                _, buffer = self._buffers.popitem()
                self._memory.free(buffer.address)
        finally:
            self._context = None
            self._kernels.release()
            self._engine = None
            self._runtime = None

    @property
    def batch_profile(self) -> BatchProfile:
        """The numbers of images that one execution takes."""
        corners = zip(
            *((p.smallest[0], p.usual[0], p.largest[0]) for p in self.inputs), strict=True
        )
        low, usual, high = corners
        return BatchProfile(max(low), usual[0], min(high))

    def run(self, batch: Batch) -> Outputs:
        """All outputs by name; a batch beyond the profile's maximum is cut.

        Raises:
            InputError: another number of arrays, data type or shape than the engine takes.
            GateFailedError: TensorRT refuses to execute; its own words are in the message.
        """
        self._require(batch)
        pieces: list[Outputs] = []
        start = 0
        for size in cut(len(batch[0]), self.batch_profile):
            pieces.append(self._step(tuple(array[start : start + size] for array in batch)))
            start += size
        return {port.name: np.concatenate([p[port.name] for p in pieces]) for port in self.outputs}

    def prepare(self, batch: Batch, *, cuda_graph: bool = False) -> Callable[[], None]:
        """Put one batch on the device; what this returns executes there once and waits.

        It stays valid until the runner is used for anything else. With ``cuda_graph`` the launch is
        captured once and replayed.

        Raises:
            InputError: as :meth:`run`, and for more images than one execution takes.
        """
        self._require(batch)
        if len(cut(len(batch[0]), self.batch_profile)) > 1:
            raise InputError(
                f"batch {len(batch[0])} is above the engine's profile {self.batch_profile}"
            )
        # Held until the copies are done.
        held = self._feed(batch)
        # The first execution initializes lazily, which cannot be captured.
        self._execute_timed()
        self._memory.synchronize()
        del held
        launch = self._memory.capture(self._execute) if cuda_graph else self._execute

        def execute_and_wait() -> None:
            launch()
            self._memory.synchronize()

        return execute_and_wait

    def _require(self, batch: Batch) -> None:
        if len(batch) != len(self.inputs):
            names = ", ".join(port.name for port in self.inputs)
            raise InputError(
                f"{len(batch)} arrays were passed, the engine takes {len(self.inputs)}: {names}"
            )
        for port, array in zip(self.inputs, batch, strict=True):
            complaint = port.complaint(array)
            if complaint:
                raise InputError(complaint)
        counts = {len(array) for array in batch}
        if len(counts) > 1:
            raise InputError(f"the inputs hold different numbers of images: {sorted(counts)}")

    def _step(self, batch: Batch) -> Outputs:
        # Held until the copies are done.
        held = self._feed(batch)
        self._execute_timed()
        outputs: Outputs = {}
        for port in self.outputs:
            shape = tuple(self._context.get_tensor_shape(port.name))
            outputs[port.name] = np.empty(shape, dtype=port.dtype)
            self._memory.copy_out(outputs[port.name], self._buffers[port.name].address)
        self._memory.synchronize()
        del held
        return outputs

    def _feed(self, batch: Batch) -> list[Array]:
        """Shapes, addresses and the copies of the inputs; returns what the copies read."""
        held: list[Array] = []
        for port, array in zip(self.inputs, batch, strict=True):
            if not self._context.set_input_shape(port.name, array.shape):
                raise GateFailedError(
                    f"the engine refuses shape {list(array.shape)} of {port.name}{self._words()}"
                )
            contiguous = np.ascontiguousarray(array)
            self._bind(port.name, contiguous.nbytes)
            self._memory.copy_in(self._buffers[port.name].address, contiguous)
            held.append(contiguous)
        for port in self.outputs:
            shape = tuple(self._context.get_tensor_shape(port.name))
            if any(extent < 0 for extent in shape):
                raise GateFailedError(
                    f"the engine's output {port.name} has the open shape {list(shape)}, which "
                    "depends on the data; such outputs are not supported"
                )
            self._bind(port.name, int(np.prod(shape, dtype=np.int64)) * port.dtype.itemsize)
        return held

    def _bind(self, name: str, size_bytes: int) -> None:
        """A buffer of at least this size, known to the context."""
        # TensorRT wants an address even for nothing.
        size_bytes = max(size_bytes, 1)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size_bytes < size_bytes:
            if buffer is not None:
                del self._buffers[name]
                self._memory.free(buffer.address)
            buffer = _Buffer(self._memory.allocate(size_bytes), size_bytes)
            self._buffers[name] = buffer
        if not self._context.set_tensor_address(name, buffer.address):
            raise GateFailedError(f"the engine refuses the memory of {name}{self._words()}")

    def _execute_timed(self) -> None:
        """Execute; of the first time, note how long it took."""
        if self.startup.first_run_ms is not None:
            self._execute()
            return
        # The copies to the device are still on the stream.
        self._memory.synchronize()
        began = time.perf_counter()
        self._execute()
        self._memory.synchronize()
        self.startup.first_run_ms = _since(began)

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._memory.stream):
            raise GateFailedError(f"the engine does not run{self._words()}")

    def _words(self) -> str:
        """What the library complained about since it was last asked, as the end of a sentence."""
        said, self._said[:] = "; ".join(dict.fromkeys(self._said)), []
        return f": {said}" if said else ""


def _since(began: float) -> float:
    """Milliseconds."""
    return 1e3 * (time.perf_counter() - began)


def _make_logger(trt: Any, said: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the complaints, prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                said.append(" ".join(msg.split()))

    return Logger()
