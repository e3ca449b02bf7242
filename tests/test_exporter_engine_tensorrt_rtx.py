"""Real builds of RepVGG-A0 (64x64, random weights) on the CPU, and what the engines contain."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import exporter.engine
from calibration.images import Preprocess
from exporter.engine import (
    BuildRequest,
    BuiltEngine,
    ConvolutionCounts,
    check_engine,
    get_backend,
    parse_targets,
)
from exporter.engine.build_log import read_layers, read_records
from exporter.errors import GateFailedError, InputError
from exporter.graph.prologue import Prologue, with_prologue
from exporter.pixel_input import Layout
from exporter.profiles import BatchProfile
from exporter.spec import Precision
from models.variants import ConvLayer, find_variant

onnx = pytest.importorskip("onnx")
if importlib.util.find_spec("tensorrt_rtx") is None:
    pytest.skip("TensorRT-RTX is not installed", allow_module_level=True)

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

SIZE = 64
CLASSES = 10
CONVOLUTIONS = 22
OPEN_BATCH = "N"
FLOAT8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
FLOAT8_OPSET = 20
"""One above the oldest, and so above that of half scales, by which the two are told apart."""

NARROW = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
AMPERE_AND_LATER = ("sm80", "sm86", "sm89", "sm120", "sm121")


class Graph:
    """A deploy-form RepVGG under construction, node by node."""

    def __init__(self, dtype: type[np.generic], oldest: int = 17) -> None:
        # Half scales came with opset 19, bfloat16 convolutions with 22.
        self.opset = max(oldest, {np.float32: 17, np.float16: 19}.get(dtype, 22))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.dtype = dtype

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes) -> str:
        node = helper.make_node(op, inputs, [output], name=f"{op}:{output}", **attributes)
        self.nodes.append(node)
        return output

    def model(self, batch: str | int) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "repvgg",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        version = helper.find_min_ir_version_for(opsets)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version)
        onnx.checker.check_model(model)
        return model


def quantized(graph: Graph, layer: ConvLayer, x: str, weight: np.ndarray, shape: tuple[int, ...]):
    """Q/DQ on the activation (scale of ``shape``) and per output channel on the weights."""
    name = layer.name
    kind, largest = (FLOAT8, 448) if graph.opset == FLOAT8_OPSET else (np.int8, 127)
    step = np.abs(weight).max(axis=(1, 2, 3)) / largest
    whole = weight / step[:, None, None, None]
    whole = (np.round(whole) if kind is np.int8 else whole).astype(kind)
    weights = [
        graph.constant(f"{name}.q_weight", whole),
        graph.constant(f"{name}.weight_scale", step.astype(graph.dtype)),
        graph.constant(f"{name}.weight_zero", np.zeros(len(step), kind)),
    ]
    dequantized = graph.node("DequantizeLinear", weights, f"{name}.weight", axis=0)
    scale = graph.constant(f"{name}.scale", np.full(shape, 4 / largest, graph.dtype))
    zero = graph.constant(f"{name}.zero", np.zeros(shape, kind))
    integer = graph.node("QuantizeLinear", [x, scale, zero], f"{name}.integer")
    return graph.node("DequantizeLinear", [integer, scale, zero], f"{name}.input"), dequantized


@functools.cache
def repvgg_a0(
    precision: Precision,
    batch: str | int = OPEN_BATCH,
    scale_shape: tuple[int, ...] = (),
    half_scales: bool = False,
) -> onnx.ModelProto:
    """A0 as the exporter makes it: plain chain, half tensors for fp16, Q/DQ for int8.

    With ``half_scales`` everything between the quantized convolutions is half, not float.
    """
    random = np.random.default_rng(0)
    variant = find_variant("A0")
    code = NARROW.get(precision, TensorProto.FLOAT16 if half_scales else TensorProto.FLOAT)
    half = code != TensorProto.FLOAT
    oldest = FLOAT8_OPSET if precision is Precision.FP8 else 17
    graph = Graph(np.dtype(helper.tensor_dtype_to_np_dtype(code)).type, oldest)
    x = graph.node("Cast", ["input"], "half", to=code) if half else "input"
    for layer in variant.layers:
        weight = random.standard_normal(layer.weight_shape, np.float32) * 0.05
        bias = graph.constant(f"{layer.name}.bias", np.full(len(weight), 0.1, graph.dtype))
        if precision.is_quantized:
            x, weights = quantized(graph, layer, x, weight, scale_shape)
        else:
            weights = graph.constant(f"{layer.name}.weight", weight.astype(graph.dtype))
        x = graph.node(
            "Conv",
            [x, weights, bias],
            f"{layer.name}.sum",
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
            strides=[layer.stride] * 2,
        )
        x = graph.node("Relu", [x], f"{layer.name}.out")
    classifier = random.standard_normal((CLASSES, variant.feature_channels), np.float32) * 0.05
    x = graph.node("Flatten", [graph.node("GlobalAveragePool", [x], "pooled")], "flat")
    weights = graph.constant("linear.weight", classifier.astype(graph.dtype))
    bias = graph.constant("linear.bias", np.zeros(CLASSES, graph.dtype))
    last = "half_logits" if half else "logits"
    x = graph.node("Gemm", [x, weights, bias], last, transB=1)
    if half:
        graph.node("Cast", [x], "logits", to=TensorProto.FLOAT)
    return graph.model(batch)


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Temporary files go to a folder that must be empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def build(tmp_path: Path):
    """Builds a model with the one backend there is."""

    def run(
        model: onnx.ModelProto,
        precision: Precision,
        targets: tuple[str, ...] = ("sm86",),
        *,
        batch: BatchProfile = BatchProfile(1, 1, 1),  # noqa: B008
        progress=lambda _phase, _fraction: None,
        workspace_mib: int | None = None,
    ) -> BuiltEngine:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        request = BuildRequest(
            onnx_path=path,
            precision=precision,
            targets=targets,
            batch=batch,
            workspace_mib=workspace_mib,
        )
        return get_backend("auto").build(request, progress)

    return run


@pytest.mark.parametrize(
    ("precision", "figure", "fused", "others"),
    [
        (Precision.FP32, "float", 22, 3),
        (Precision.FP16, "half", 22, 3),
        (Precision.BF16, "bf16", 22, 3),
        (Precision.INT8, "int8", 0, 24),
        (Precision.FP8, "fp8", 0, 24),
    ],
)
def test_an_a0_engine_contains_what_was_asked_for(
    build, precision: Precision, figure: str, fused: int, others: int
):
    """On every target of the precision, all 22 convolutions run in it; only 8 bits leave epilogues.

    The other kernels are cast or quantization of the input, pooling and classifier, and for 8
    bits one epilogue a convolution.
    """
    targets = parse_targets(None, get_backend("auto"), precision)

    built = build(repvgg_a0(precision), precision, targets)

    none = dict.fromkeys(("int8", "half", "float", "bf16", "fp8"), 0)
    for figures in built.summary.per_target.values():
        counts = {"total": CONVOLUTIONS, **none, figure: CONVOLUTIONS}
        assert figures.convolutions.to_json() == counts
        assert (figures.epilogue_fused, figures.other_kernels) == (fused, others)
    check_engine(built.summary, precision, CONVOLUTIONS)
    assert built.summary.targets == targets
    assert built.plan[:4] == b"vtrt"
    assert built.summary.plan_bytes == len(built.plan)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.INT8])
def test_normalization_in_the_graph_adds_no_kernel(build, precision: Precision, layout: Layout):
    """Cast, Sub, Mul and Transpose end up in the kernel that casts or quantizes the input."""
    targets = parse_targets(None, get_backend("auto"), precision)
    model = repvgg_a0(precision)
    plain = build(model, precision, targets).summary
    prologue = Prologue(layout=layout, preprocess=Preprocess())
    pixels = build(with_prologue(model, prologue), precision, targets).summary

    assert plain.per_target == pixels.per_target
    check_engine(pixels, precision, CONVOLUTIONS)


def test_turing_does_half(build):
    """An fp16 engine for sm75 runs all convolutions in half with bias and ReLU fused."""
    summary = build(repvgg_a0(Precision.FP16), Precision.FP16, ("sm75",)).summary

    check_engine(summary, Precision.FP16, CONVOLUTIONS)
    assert summary.epilogue_fused == CONVOLUTIONS


def test_a_scale_of_shape_1_costs_all_int8_and_the_gate_says_so(build):
    """The trap: the graph builds and shrinks, runs in float, and only the gate notices."""
    model = repvgg_a0(Precision.INT8, scale_shape=(1,))

    summary = build(model, Precision.INT8, ("sm80", "sm86")).summary

    assert summary.plan_bytes < 10_000_000
    assert summary.convolutions == ConvolutionCounts(total=22, int8=0, half=0, float=22)
    with pytest.raises(GateFailedError, match=r"on sm80 only 0 of 22 .*scale of shape \[\]"):
        check_engine(summary, Precision.INT8, CONVOLUTIONS)


def test_a_bf16_engine_from_a_half_graph_fails_the_gate(build):
    """What the builder makes of the wrong graph is half, and half is not what was asked for."""
    summary = build(repvgg_a0(Precision.FP16), Precision.BF16, ("sm80",)).summary

    with pytest.raises(GateFailedError) as caught:
        check_engine(summary, Precision.BF16, CONVOLUTIONS)
    assert str(caught.value) == (
        "on sm80 only 0 of 22 convolutions run in bfloat16 (0 INT8, 22 half, 0 float): make "
        "weights, biases and activations of every convolution bfloat16"
    )


def test_turing_has_no_bfloat16_and_the_builder_says_so(build):
    """The refusal of `parse_targets` is the builder's own."""
    with pytest.raises(GateFailedError, match=r"sm75.* HW-specific datatypes: b16"):
        build(repvgg_a0(Precision.BF16), Precision.BF16, ("sm75",))


def test_a_scale_of_shape_1_costs_all_fp8_too(build):
    """The same trap as at INT8; the gate says what the engine runs instead."""
    model = repvgg_a0(Precision.FP8, scale_shape=(1,))

    summary = build(model, Precision.FP8, ("sm89",)).summary

    assert (0, 22) == (summary.convolutions.fp8, summary.convolutions.total)
    with pytest.raises(GateFailedError, match=r"on sm89 only 0 of 22 .* in FP8 .*costs FP8"):
        check_engine(summary, Precision.FP8, CONVOLUTIONS)


def test_an_fp8_engine_from_a_float_or_int8_graph_fails_the_gate(build):
    """Neither falling back to float nor another type of 8 bits is what was asked for."""
    for precision, words in (
        (Precision.FP32, "0 INT8, 0 half, 22 float"),
        (Precision.INT8, "22 INT8, 0 half, 0 float"),
    ):
        summary = build(repvgg_a0(precision), Precision.FP8, ("sm89",)).summary
        with pytest.raises(GateFailedError) as caught:
            check_engine(summary, Precision.FP8, CONVOLUTIONS, allow_emulated=True)
        sentence = f"on sm89 only 0 of 22 convolutions run in FP8 ({words}): give every"
        assert str(caught.value).startswith(sentence)


def test_ampere_has_no_fp8_and_the_builder_says_so(build):
    """The refusal of `parse_targets` is the builder's own."""
    with pytest.raises(GateFailedError, match=r"sm86.* HW-specific datatypes: fp8_e4m3"):
        build(repvgg_a0(Precision.FP8), Precision.FP8, ("sm86",))


def test_turing_emulates_int8_in_half_which_passes_only_where_allowed(build):
    """On sm75 a Q/DQ graph with half scales builds, and not one convolution runs in INT8.

    One layer table holds for a plan, so sm86 beside it loses its INT8 as well.
    """
    model = repvgg_a0(Precision.INT8, half_scales=True)

    alone = build(model, Precision.INT8, ("sm86",)).summary
    beside = build(model, Precision.INT8, ("sm75", "sm86")).summary

    assert (22, 0) == (alone.convolutions.int8, alone.convolutions.half)
    assert (0, 22) == (beside.convolutions.int8, beside.convolutions.half)
    check_engine(beside, Precision.INT8, CONVOLUTIONS, allow_emulated=True)
    with pytest.raises(GateFailedError, match=r"on sm75 only 0 of 22 convolutions run in INT8"):
        check_engine(beside, Precision.INT8, CONVOLUTIONS)


def test_turing_refuses_a_quantized_graph_with_float_around_it(build):
    """Emulation needs half scales: the classifier's float Gemm does not compile for sm75."""
    with pytest.raises(GateFailedError, match=r"SM75.*FP32 GEMM is not supported"):
        build(repvgg_a0(Precision.INT8), Precision.INT8, ("sm75",))


def test_int8_tells_that_its_epilogues_are_apart(build):
    """Whether INT8 pays is not known from the build, and engine.json says so."""
    warnings = build(repvgg_a0(Precision.INT8), Precision.INT8).summary.warnings

    assert [w for w in warnings if w.startswith("22 of 22 convolutions leave bias, ReLU")]


def tactics(built: BuiltEngine) -> set[str]:
    layers = read_layers(read_records(built.build_log))
    return {layer.tactic for layer in layers if re.search("_0x[0-9a-f]{32}", layer.tactic)}


def test_a_plan_for_several_targets_has_one_layer_table(build):
    """The log's table is the plan's: its kernels are in it, those of a target alone are not."""
    model = repvgg_a0(Precision.FP16)
    both = build(model, Precision.FP16, ("sm75", "sm86"))
    alone = build(model, Precision.FP16, ("sm86",))
    only_alone = tactics(alone) - tactics(both)

    assert len(tactics(both)) == 3
    assert len(only_alone) == 1
    assert [name for name in tactics(both) if name.encode() not in both.plan] == []
    assert [name for name in only_alone if name.encode() in both.plan] == []
    assert [name for name in only_alone if name.encode() not in alone.plan] == []


def test_an_open_batch_keeps_the_figures(build):
    """A profile of 1:8:32 changes the scratch memory, not the convolutions."""
    model = repvgg_a0(Precision.INT8)
    fixed = build(model, Precision.INT8)

    ranged = build(model, Precision.INT8, batch=BatchProfile(1, 8, 32))

    check_engine(ranged.summary, Precision.INT8, CONVOLUTIONS)
    memory = ranged.summary.activation_memory_bytes, fixed.summary.activation_memory_bytes
    assert memory[0] > memory[1] > 0
    assert ranged.summary.weights_memory_bytes > 7_000_000
    assert "MinShape: [1,3,64,64], OptShape: [8,3,64,64], MaxShape: [32,3,64,64]" in (
        ranged.build_log
    )


def test_a_fixed_batch_is_built_as_it_is_and_only_so(build):
    """A model with a fixed batch of 2 builds for batch 2; another batch is bad input."""
    model = repvgg_a0(Precision.FP16, batch=2)

    build(model, Precision.FP16, batch=BatchProfile(2, 2, 2), workspace_mib=512)
    with pytest.raises(InputError, match="'input' has a fixed batch of 2, but batch 1:4:8"):
        build(model, Precision.FP16, batch=BatchProfile(1, 4, 8))


def changed(model: onnx.ModelProto, name: str, value: np.ndarray) -> onnx.ModelProto:
    """A copy with another value of the constant ``name``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(t for t in copy.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    return copy


def test_a_network_the_parser_refuses_is_told_in_its_words(build):
    """Node, operator and the parser's own reason are in the message."""
    model = changed(repvgg_a0(Precision.INT8), "stage1.1.zero", np.array(3, np.int8))

    with pytest.raises(GateFailedError) as caught:
        build(model, Precision.INT8)

    assert "QuantizeLinear:stage1.1.integer (QuantizeLinear)" in str(caught.value)
    assert "Non-zero zero point is not supported" in str(caught.value)


def test_the_missing_driver_is_not_in_the_message(build):
    """The builder mixes its reason with noise about the driver; only the reason is kept."""
    weight = np.zeros((48, 48, 3, 3), np.float16)
    model = changed(repvgg_a0(Precision.FP32), "stage1.1.weight", weight)

    with pytest.raises(GateFailedError, match="`kernel` is of type Half") as caught:
        build(model, Precision.FP32)

    assert "Cuda" not in str(caught.value)


def test_a_network_the_builder_refuses_is_told_in_its_words(build):
    """What compiles for no kernel of a target names the operation and the target."""
    with pytest.raises(GateFailedError, match=r"SM75.*FP32 GEMM is not supported"):
        build(repvgg_a0(Precision.FP32), Precision.FP32, ("sm75", "sm86"))


@pytest.mark.parametrize("content", [b"", b"not a model"])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes):
    """A damaged file ends in an error of ours, not in a crash."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    request = BuildRequest(
        onnx_path=path, precision=Precision.FP16, targets=("sm86",), batch=BatchProfile(1, 1, 1)
    )

    with pytest.raises(GateFailedError, match="refuses the network"):
        get_backend("auto").build(request, lambda *_: None)


def test_a_missing_model_or_target_is_bad_input(build, tmp_path: Path):
    """Neither is left to the builder to find out."""
    request = BuildRequest(
        onnx_path=tmp_path / "no.onnx",
        precision=Precision.FP16,
        targets=("sm86",),
        batch=BatchProfile(1, 1, 1),
    )

    with pytest.raises(InputError, match=r"no\.onnx"):
        get_backend("auto").build(request, lambda *_: None)
    with pytest.raises(InputError, match="at least one target"):
        build(repvgg_a0(Precision.FP16), Precision.FP16, ())
    with pytest.raises(InputError, match="cannot build for sm99"):
        build(repvgg_a0(Precision.FP16), Precision.FP16, ("sm99",))


def test_progress_ends_at_1_and_never_goes_back(build):
    """The builder's phases arrive as growing fractions that end with the finished engine."""
    seen: list[tuple[str, float]] = []

    build(repvgg_a0(Precision.FP16), Precision.FP16, progress=lambda *step: seen.append(step))

    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert ["Starting", "Reading the network"] == [phase for phase, _ in seen[:2]]
    assert seen[-1] == ("Engine built", 1.0)
    assert len(seen) > 10


def test_two_builds_of_a_half_engine_are_equal(build):
    """The plan is a function of model and targets alone."""
    model = repvgg_a0(Precision.FP16)

    assert build(model, Precision.FP16).plan == build(model, Precision.FP16).plan


def test_strange_folders_where_the_program_runs_do_not_matter(tmp_path: Path):
    """Packages in the working directory that share a name with ours or TensorRT are not used."""
    model = tmp_path / "model.onnx"
    model.write_bytes(repvgg_a0(Precision.FP16).SerializeToString())
    strange = tmp_path / "strange"
    for name in ("models", "exporter", "calibration", "tensorrt_rtx", "json"):
        (strange / name).mkdir(parents=True)
        (strange / name / "__init__.py").write_text("raise RuntimeError('picked up')")
    program = tmp_path / "program" / "build.py"
    program.parent.mkdir()
    program.write_text(
        "from pathlib import Path\n"
        "from exporter.engine import BuildRequest, get_backend\n"
        "from exporter.profiles import BatchProfile; from exporter.spec import Precision\n"
        f"request = BuildRequest(onnx_path=Path({str(model)!r}), precision=Precision.FP16,\n"
        "                       targets=('sm86',), batch=BatchProfile(1, 1, 1))\n"
        "print(get_backend('auto').build(request, lambda *_: None).summary.convolutions.half)\n"
    )
    home = str(Path(exporter.engine.__file__).resolve().parents[2])

    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=strange,
        env={**os.environ, "PYTHONPATH": home},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout.strip(), done.stderr) == ("22", "")
