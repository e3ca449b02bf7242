"""Running an ONNX graph on the CPU with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from exporter.errors import EnvironmentLackError, GateFailedError

if TYPE_CHECKING:
    import onnx

FloatArray = npt.NDArray[np.float32]
BATCH_SIZE = 16
"""Images a step where the caller does not care; bounds the memory of intermediate tensors."""


class OnnxRunner:
    """One graph with one image input, ready to run.

    ``model`` is a file or a graph in memory. ``outputs`` names further tensors of the graph that
    :meth:`run_all` returns beside its outputs. ``optimize=False`` turns graph optimizations off:
    ONNX Runtime 1.32 computes wrong results on quantized graphs with half scales at its default
    level, so a graph that holds half tensors is judged without them.
    """

    def __init__(self, model: Path | onnx.ModelProto, *, optimize: bool = True) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        try:
            self._session = ort.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            # The bindings raise a private exception class for each status code.
            raise GateFailedError(
                f"ONNX Runtime refuses the graph: {_first_line(error)}"
            ) from error
        self.output_names = [output.name for output in self._session.get_outputs()]
        self.input_name: str = self._session.get_inputs()[0].name

    def __call__(self, images: FloatArray) -> FloatArray:
        """``[N, C, H, W]`` float32 to the first output, usually logits ``[N, num_classes]``."""
        chunks = [self._run(self.output_names[:1], chunk)[0] for chunk in _chunks(images)]
        return np.concatenate(chunks)

    def run_all(self, images: FloatArray) -> dict[str, FloatArray]:
        """All outputs by name, in one step."""
        return dict(zip(self.output_names, self._run(self.output_names, images), strict=True))

    def _run(self, names: list[str], images: FloatArray) -> list[FloatArray]:
        try:
            values: list[FloatArray] = self._session.run(names, {self.input_name: images})
        except Exception as error:
            # As above.
            raise GateFailedError(
                f"ONNX Runtime cannot run the graph: {_first_line(error)}"
            ) from error
        return values


def _chunks(images: FloatArray) -> Iterator[FloatArray]:
    for start in range(0, len(images), BATCH_SIZE):
        yield images[start : start + BATCH_SIZE]


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
