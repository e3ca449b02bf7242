"""What TensorRT-RTX makes of one INT8 network in several forms: kernels, types, memory. No GPU.

    python benchmarks/int8_graph_forms.py build/A0-int8

Of the bundle's graph, with scales in float and in half (opset 19):

* ``channel``: one weight scale a channel, as published;
* ``tensor``: one a weight tensor, weights rounded anew to nearest;
* ``ratio``: the published integers under the largest scale of their tensor, and the ratio of each
  channel's scale to it multiplied behind the convolution, where the bias is added: the same
  numbers, and nothing but scalars on what the convolution reads.

``output`` is what the convolutions write; SQNR is that of ONNX Runtime on the bundle's reference
inputs, without optimizations, and differs between rows of the same numbers by chance.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calibration.table import CalibrationTable
from exporter.bundle import CALIBRATION, MODEL, Bundle
from exporter.engine import BuildRequest, TensorRtRtx, build_log, inventory
from exporter.parity.comparison import compare
from exporter.profiles import BatchProfile
from exporter.quantization.half_scales import to_half_scales
from exporter.quantize import quantize
from exporter.running.onnx_runner import OnnxRunner
from exporter.spec import Precision

RESULTS = Path(__file__).parent / "results"
TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")
HEADER = (
    f"{'weights':8} {'scales':6} {'target':6} {'INT8':>4} {'half':>4} {'output':6} {'others':>6} "
    f"{'activations MB':>14} {'plan MB':>7} {'SQNR dB':>7}"
)


def with_ratios(model: onnx.ModelProto) -> onnx.ModelProto:
    """The form ``ratio`` of a Q/DQ graph whose convolutions all have per-channel INT8 weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        nodes.append(node)
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            scales = stored[node.input[1]]
            stored[node.input[1]] = np.array(scales.max())
            stored[node.input[2]] = np.array(0, dtype=np.int8)
            stored[f"{node.output[0]}.ratio"] = (scales / scales.max()).reshape(1, -1, 1, 1)
            del node.attribute[:]
        elif node.op_type == "Conv":
            weight, bias, output = node.input[1], node.input[2], node.output[0]
            stored[bias] = stored[bias].reshape(1, -1, 1, 1)
            del node.input[2]
            node.output[0] = f"{output}.sum"
            scaled = f"{output}.scaled"
            nodes.append(helper.make_node("Mul", [f"{output}.sum", f"{weight}.ratio"], [scaled]))
            nodes.append(helper.make_node("Add", [scaled, bias], [output]))
    del copy.graph.node[:], copy.graph.initializer[:], copy.graph.value_info[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(numpy_helper.from_array(v, name) for name, v in stored.items())
    onnx.checker.check_model(copy)
    return copy


def forms(bundle: Bundle) -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """Weights, scales and the graph."""
    published = onnx.load(bundle.graph_path)
    table = CalibrationTable.loads((bundle.path / CALIBRATION).read_text("utf-8"))
    model = onnx.load(bundle.path / MODEL)
    head = [node.name for node in model.graph.node if node.op_type == "Gemm"]
    tensor = quantize(model, table, keep_float=head, per_tensor_weights=True)
    named = {"channel": published, "tensor": tensor, "ratio": with_ratios(published)}
    for weights, graph in named.items():
        yield weights, "float", graph
        yield weights, "half", to_half_scales(graph)


def row(path: Path, target: str) -> str:
    """What the builder makes of the graph in ``path`` for one target."""
    request = BuildRequest(
        onnx_path=path,
        precision=Precision.INT8,
        targets=(target,),
        batch=BatchProfile(1, 8, 32),
    )
    built = TensorRtRtx().build(request, lambda _phase, _fraction: None)
    records = build_log.read_records(built.build_log)
    nodes = build_log.read_nodes(records)
    kernels = inventory.convolution_layers(build_log.read_layers(records), nodes)
    written = Counter(tensor.datatype for kernel in kernels for tensor in kernel.outputs)
    counts, summary = built.summary.convolutions, built.summary
    memory = (summary.activation_memory_bytes or 0) / 1e6
    return (
        f"{target:6} {counts.int8:4} {counts.half:4} {'/'.join(written):6} "
        f"{summary.other_kernels:6} {memory:14.1f} {summary.plan_bytes / 1e6:7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="an int8 bundle of a plain chain, float scales")
    bundle = Bundle.load(parser.parse_args().bundle)
    images, logits = bundle.reference()
    lines = [f"TensorRT-RTX {TensorRtRtx().version()}, {bundle.manifest['model']['name']}", HEADER]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        for weights, scales, graph in forms(bundle):
            onnx.save(graph, path)
            sqnr = compare(logits, OnnxRunner(path, optimize=False)(images)).sqnr_db
            # Float matrix products do not compile for Turing.
            for target in TARGETS[scales == "float" :]:
                lines.append(f"{weights:8} {scales:6} {row(path, target)} {sqnr:7.1f}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    (RESULTS / "int8_graph_forms.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
