"""Running an ONNX graph on the CPU with ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from exporter.errors import EnvironmentLackError, GateFailedError
from models.file_names import is_text

if TYPE_CHECKING:
    import onnx

FloatArray = npt.NDArray[np.float32]
Batch = tuple[npt.NDArray[Any], ...]
"""One array ``[n, ...]`` for each input of a network, in its order, of the same ``n`` images.

Float32, but for graphs that take pixels: these are uint8."""

Outputs = dict[str, FloatArray]
"""Each output of a network by name, in its order: ``[n, ...]``."""

Runner = Callable[[Batch], Outputs]
BATCH_SIZE = 16
"""Images a step where the caller does not care; bounds the memory of intermediate tensors."""


class OnnxRunner:
    """One graph, ready to run.

    ``model`` is a file or a graph in memory. Quantized graphs are computed as they are written,
    rounded and scaled in float32. ``optimize=False`` turns graph optimizations off:
    ONNX Runtime 1.32 computes wrong results on quantized graphs with half scales at its default
    level, so a graph that holds half tensors is judged without them. ``threads=0`` means as
    many as ``OMP_NUM_THREADS`` says, else all cores;
    a runner of one thread may be called from several. It travels to other processes with its graph,
    which nobody may change meanwhile.
    """

    def __init__(
        self, model: Path | onnx.ModelProto, *, optimize: bool = True, threads: int = 0
    ) -> None:
        self._made_of = (model, optimize, threads)
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Fused integer kernels may saturate where there is no VNNI. Without them constant weights
        # are dequantized once, too.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        # Threads that spin after their work take the cores from numpy's and from other processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.intra_op_num_threads = threads or _threads_of_the_environment()
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if isinstance(model, Path):
            source = str(model) if is_text(model) else model.read_bytes()
        else:
            source = model.SerializeToString()
        try:
            self._session = ort.InferenceSession(
                source,
                options,
                providers=["CPUExecutionProvider"],
                # It rounds float biases to int32, which no engine does: 30 dB on a network whose
                # INT8 is otherwise the same bit for bit.
                disabled_optimizers=["WeightBiasQuantization"],
            )
        except Exception as error:
            # The bindings raise a private exception class for each status code.
            raise GateFailedError(
                f"ONNX Runtime refuses the graph: {_first_line(error)}"
            ) from error
        self.output_names = [output.name for output in self._session.get_outputs()]
        self.input_names = [value.name for value in self._session.get_inputs()]

    def __reduce__(self) -> tuple[Callable[[Any], OnnxRunner], tuple[Any]]:
        model, optimize, threads = self._made_of
        return partial(OnnxRunner, optimize=optimize, threads=threads), (model,)

    def __call__(self, *inputs: FloatArray) -> FloatArray:
        """``[N, ...]`` float32 a graph input to its first output, usually the only one."""
        return self.run(inputs)[self.output_names[0]]

    def run(self, batch: Batch) -> Outputs:
        """All outputs by name, computed at most ``BATCH_SIZE`` images a step."""
        chunks = [self._step(chunk) for chunk in in_steps(batch, BATCH_SIZE)]
        columns = zip(*chunks, strict=True)
        values = [column[0] if len(column) == 1 else np.concatenate(column) for column in columns]
        return dict(zip(self.output_names, values, strict=True))

    def run_at_once(self, batch: Batch) -> Outputs:
        """All outputs by name in one step, whatever the memory: for stopwatches."""
        return dict(zip(self.output_names, self._step(batch), strict=True))

    def _step(self, batch: Batch) -> list[FloatArray]:
        try:
            feed = dict(zip(self.input_names, batch, strict=True))
            values: list[FloatArray] = self._session.run(self.output_names, feed)
        except Exception as error:
            # As above.
            raise GateFailedError(
                f"ONNX Runtime cannot run the graph: {_first_line(error)}"
            ) from error
        return values


def in_steps(batch: Batch, size: int) -> Iterator[Batch]:
    """The images of ``batch``, at most ``size`` at a time."""
    for start in range(0, len(batch[0]), size):
        yield tuple(array[start : start + size] for array in batch)


def joined(parts: Iterable[Outputs]) -> Outputs:
    """Outputs of images that follow one another as those of all of them."""
    found: dict[str, list[FloatArray]] = {}
    for part in parts:
        for name, values in part.items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(values) for name, values in found.items()}


def fits(
    array: npt.NDArray[Any], extents: Sequence[int | str], dtype: npt.DTypeLike = np.float32
) -> bool:
    """Whether ``array`` is ``[N, *extents]`` of ``dtype``; a word stands for any extent."""
    found = array.shape[1:]
    return (
        array.dtype == np.dtype(dtype)
        and array.ndim == len(extents) + 1
        and all(isinstance(e, str) or e == f for e, f in zip(extents, found, strict=True))
    )


def _threads_of_the_environment() -> int:
    """The number that binds torch too, 0 where it is unset; ONNX Runtime does not read it."""
    number = os.environ.get("OMP_NUM_THREADS", "")
    return int(number) if number.isdigit() else 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLackError(
            "onnxruntime is not installed; pip install onnxruntime, or 'repvgg-exporter[export]'"
        ) from error
    return onnxruntime
