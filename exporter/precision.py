"""Float graph -> half graph with float32 input and output, and the check that half can hold it.

TensorRT 11 and TensorRT-RTX read the precision from the graph ("strongly typed"), so half means
half initializers and half tensors between a Cast after the input and a Cast before the output.

IEEE binary16 ends at 65504. A value beyond it becomes Inf, and the engine's answer NaN; that can be
known beforehand from the ranges of real images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableSequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.errors import GateFailedError
from exporter.graph import with_outputs
from exporter.onnx_runner import FloatArray, OnnxRunner

HALF_MAX = 65504.0


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a strongly typed half copy of a graph with one float input and one float output.

    Raises:
        GateFailedError: naming the tensor, if a weight is beyond half's range or NaN.
    """
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32:
            continue
        largest = float(np.max(np.abs(values), initial=0.0))
        if not largest <= HALF_MAX:
            raise _overflow(tensor.name, largest)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    source, target = graph.input[0].name, graph.output[0].name
    for node in graph.node:
        _rename(node.input, source, f"{source}.half")
        _rename(node.output, target, f"{target}.half")
    to_f16 = helper.make_node(
        "Cast", [source], [f"{source}.half"], name=f"{source}.cast", to=TensorProto.FLOAT16
    )
    to_f32 = helper.make_node(
        "Cast", [f"{target}.half"], [target], name=f"{target}.cast", to=TensorProto.FLOAT
    )
    nodes = [to_f16, *graph.node, to_f32]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(half)
    return half


def largest_magnitudes(
    model: onnx.ModelProto, batches: Iterable[FloatArray]
) -> Mapping[str, float]:
    """The largest ``|x|`` of every convolution's and the classifier's output over ``batches``."""
    names = [node.output[0] for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    runner = OnnxRunner(with_outputs(model, names))
    largest = dict.fromkeys(names, 0.0)
    for batch in batches:
        for name, values in runner.run_all(batch).items():
            # Not max(): it would drop a NaN.
            largest[name] = float(np.maximum(largest[name], np.max(np.abs(values))))
    return largest


def require_half_range(magnitudes: Mapping[str, float]) -> None:
    """Raise GateFailedError naming the first tensor that half cannot hold."""
    for name, largest in magnitudes.items():
        if not largest <= HALF_MAX:
            raise _overflow(name, largest)


def _overflow(name: str, largest: float) -> GateFailedError:
    return GateFailedError(
        f"half overflow in {name}: its values reach {largest:.7g}, half ends at {HALF_MAX:g}; "
        "use PRECISION=fp32 or int8"
    )


def _rename(names: MutableSequence[str], old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new
