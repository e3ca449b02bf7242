"""Reading a builder's log: excerpts of real logs, line for line, and the laws of the format."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from exporter.engine import build_log, inventory
from exporter.engine.progress import PhaseTracker
from exporter.engine.summary import ConvolutionCounts, TargetFigures

INT8_LOG = (
    "[VERBOSE] stage0/q [QuantizeLinear] inputs: [input -> (-1, 3, 64, 64)[FLOAT]], [stage0.a"
    "s -> ()[FLOAT]], [stage0.az -> ()[INT8]], \n"
    "[VERBOSE] stage0/q [QuantizeLinear] outputs: [stage0.xq -> (-1, 3, 64, 64)[INT8]], \n"
    "[VERBOSE] stage0/conv [Conv] inputs: [stage0.x -> (-1, 3, 64, 64)[FLOAT]], [stage0.w -> "
    "(48, 3, 3, 3)[FLOAT]], [stage0.bias -> (48)[FLOAT]], \n"
    "[VERBOSE] stage0/conv [Conv] outputs: [stage0.c -> (-1, 48, 32, 32)[FLOAT]], \n"
    "[VERBOSE] stage0/relu [Relu] inputs: [stage0.c -> (-1, 48, 32, 32)[FLOAT]], \n"
    "[VERBOSE] stage0/relu [Relu] outputs: [stage0.r -> (-1, 48, 32, 32)[FLOAT]], \n"
    "[INFO] Total Activation Memory: 8437760 bytes\n"
    "[INFO] Total Weights Memory: 7130884 bytes\n"
    "[VERBOSE] Layers:\n"
    "Name: __myl_MulMinMaxRounCastConc_myl0_0, LayerType: kgen, Inputs: [ { Name: input, Dime"
    "nsions: [1,3,64,64], Strides: [12288,4096,64,1], StrideOrder: [3,2,1,0], Datatype: Float"
    ", Format: (Linear) Row major linear format }], Constants: [ { Name: __mye5684_myl0, Dime"
    "nsions: [1,1,64,64], Strides: [4096,1,64,1], StrideOrder: [3,0,2,1], Datatype: Int8, For"
    "mat: (NHWC) Channel major format }, { Name: __mye5860_const-lit-in_myl0, Dimensions: [1]"
    ", Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear for"
    "mat }], Outputs: [ { Name: __mye2834stage0.c_before_bias.1_2_myl0, Dimensions: [1,4,64,6"
    "4], Strides: [16384,1,256,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Cha"
    "nnel major format }], TacticName: __myl_MulMinMaxRounCastConc_0x84922ab4e5a49ea358b7d968"
    "61f8369f, StreamId: 0, Metadata: [ONNX Layer: stage0/q]\x1f[ONNX Layer: stage0/conv]\x1f[O"
    "NNX Layer: stage0/dq]\x1f[ONNX Layer: stage0/wdq]\n"
    "Name: stage0/conv_myl0_1, LayerType: correlation, Inputs: [ { Name: __mye2834stage0.c_be"
    "fore_bias.1_2_myl0, Dimensions: [1,4,64,64], Strides: [16384,1,256,4], StrideOrder: [3,0"
    ",2,1], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: __my"
    "e5698_dconst_myl0, Dimensions: [48,4,3,3], Strides: [36,1,12,4], StrideOrder: [3,0,2,1],"
    " Datatype: Int8, Format: (NHWC) Channel major format }, { Name: __mye5131dconst_myl0, Di"
    "mensions: [1,48,1,1], Strides: [48,1,48,48], StrideOrder: [3,0,2,1], Datatype: Float, Fo"
    "rmat: (NHWC) Channel major format }, { Name: __mye5136dconst_myl0, Dimensions: [1,48,1,1"
    "], Strides: [48,1,48,48], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channe"
    "l major format }], Outputs: [ { Name: __myln_k_arg__bb1_3_myl0, Dimensions: [1,48,32,32]"
    ", Strides: [49152,1,1536,48], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Ch"
    "annel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Laye"
    "r: stage0/conv]\x1f[ONNX Layer: stage0/dq]\x1f[ONNX Layer: stage0/wdq]\n"
    "Name: __myl_MulAddReluMulMinMaxRounCast_myl0_2, LayerType: kgen, Inputs: [ { Name: __myl"
    "n_k_arg__bb1_3_myl0, Dimensions: [1,48,32,32], Strides: [49152,1,1536,48], StrideOrder: "
    "[3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], Constants: [ { Name:"
    " __mye5860_const-lit-in_myl0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype:"
    " Float, Format: (Linear) Row major linear format }, { Name: __mye5666_dconst_myl0, Dimen"
    "sions: [1,48,1,1], Strides: [48,1,48,48], StrideOrder: [3,0,2,1], Datatype: Float, Forma"
    "t: (NHWC) Channel major format }, { Name: __mye5671_dconst_myl0, Dimensions: [1,48,1,1],"
    " Strides: [48,1,48,48], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel "
    "major format }], Outputs: [ { Name: __mye2867stage1.0.c_before_bias.1_4_myl0, Dimensions"
    ": [1,48,32,32], Strides: [49152,1,1536,48], StrideOrder: [3,0,2,1], Datatype: Int8, Form"
    "at: (NHWC) Channel major format }], TacticName: __myl_MulAddReluMulMinMaxRounCast_0x8454"
    "80fd8090195fa8d7e6a234f31ffb, StreamId: 0, Metadata: [ONNX Layer: stage0/conv]\x1f[ONNX La"
    "yer: stage1.0/q]\x1f[ONNX Layer: stage0/relu]\n"
    "\n"
    "I/O Tensors:\n"
    " Name: input, IOMode: Input, DataType: Float, Dimensions: [1,3,64,64], Location: Device,"
    " IsShapeInferenceIO: false, ProfileInfo: [ { MinShape: [1,3,64,64], OptShape: [1,3,64,64"
    "], MaxShape: [1,3,64,64], Format: Row major linear FP32 format (kLINEAR) }]\n"
    "[VERBOSE] Adding 1 engine(s) to plan file.\n"
)

FAKE_LOG = (
    "[VERBOSE] Layers:\n"
    "Name: entry^bb^wait^1_myl0_1, LayerType: wait, Inputs: [], Constants: [], Outputs: [], T"
    "acticName: , StreamId: 1, EventId: 2, Metadata: \n"
    "Name: __myl_CastMulCast_myl0_3, LayerType: kgen, Inputs: [], Constants: [ { Name: __mye3"
    "109_dconst_myl0, Dimensions: [48,1,1,1], Strides: [1,1,1,1], StrideOrder: [3,2,1,0], Dat"
    "atype: Float, Format: (Linear) Row major linear format }, { Name: __mye4097_dconst_myl0,"
    " Dimensions: [48,3,3,3], Strides: [27,1,9,3], StrideOrder: [3,0,2,1], Datatype: Int8, Fo"
    "rmat: (NHWC) Channel major format }], Outputs: [ { Name: stage0.r.1_24_myl0, Dimensions:"
    " [48,3,3,3], Strides: [27,1,9,3], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC"
    ") Channel major format }], TacticName: __myl_CastMulCast_0x64b33c0f578fbb65de099c460cdca"
    "40a, StreamId: 0, Metadata: [ONNX Layer: stage0/wdq]\n"
    "Name: stage0/conv_myl0_4, LayerType: correlation, Inputs: [ { Name: stage0.r.1_23_myl0, "
    "Dimensions: [1,3,64,64], Strides: [12288,1,192,3], StrideOrder: [3,0,2,1], Datatype: Flo"
    "at, Format: (NHWC) Channel major format }, { Name: stage0.r.1_24_myl0, Dimensions: [48,3"
    ",3,3], Strides: [27,1,9,3], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Chan"
    "nel major format }], Constants: [ { Name: __mye4639_const_myl0, Dimensions: [1], Strides"
    ": [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }, { "
    "Name: __mye4643_const_myl0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: F"
    "loat, Format: (Linear) Row major linear format }, { Name: __mye3986dconst_myl0, Dimensio"
    "ns: [1,48,1,1], Strides: [48,1,48,48], StrideOrder: [3,0,2,1], Datatype: Float, Format: "
    "(NHWC) Channel major format }], Outputs: [ { Name: __myln_k_arg__bb1_25_myl0, Dimensions"
    ": [1,48,32,32], Strides: [49152,1,1536,48], StrideOrder: [3,0,2,1], Datatype: Float, For"
    "mat: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, Metada"
    "ta: [ONNX Layer: stage0/conv]\x1f[ONNX Layer: stage0/relu]\n"
    "Name: __mye4609_myl0_68, LayerType: wait, Inputs: [], Constants: [], Outputs: [], Tactic"
    "Name: , StreamId: 0, EventId: 1, Metadata: \n"
    "\n"
    "[VERBOSE] Adding 1 engine(s) to plan file.\n"
)


def read(log: str) -> tuple[tuple[build_log.Layer, ...], tuple[build_log.OnnxNode, ...]]:
    records = build_log.read_records(log)
    return build_log.read_layers(records), build_log.read_nodes(records)


def test_a_convolution_line_is_read_in_full():
    """Name, type, operand types, shapes and all ONNX origins of a layer are read."""
    layers, _ = read(INT8_LOG)

    layer = layers[1]

    assert layer.name == "stage0/conv_myl0_1"
    assert layer.type == "correlation"
    assert [(t.datatype, t.shape) for t in layer.inputs] == [("Int8", (1, 4, 64, 64))]
    assert [(t.datatype, t.shape) for t in layer.constants] == [
        ("Int8", (48, 4, 3, 3)),
        ("Float", (1, 48, 1, 1)),
        ("Float", (1, 48, 1, 1)),
    ]
    assert [t.datatype for t in layer.outputs] == ["Float"]
    assert {"stage0/conv", "stage0/dq", "stage0/wdq"} == layer.onnx_names


def test_the_onnx_graph_is_read_from_the_parser_messages():
    """Which ReLU reads which convolution is known from the log alone."""
    _, nodes = read(INT8_LOG)

    assert [(node.name, node.op, node.outputs) for node in nodes] == [
        ("stage0/q", "QuantizeLinear", ("stage0.xq",)),
        ("stage0/conv", "Conv", ("stage0.c",)),
        ("stage0/relu", "Relu", ("stage0.r",)),
    ]
    assert nodes[2].inputs == ("stage0.c",)


def test_a_real_int8_convolution_counts_as_int8_with_its_epilogue_apart():
    """INT8 operands count as INT8; ReLU and requantization in the next kernel are not fused."""
    assert TargetFigures(
        convolutions=ConvolutionCounts(total=1, int8=1, half=0, float=0),
        epilogue_fused=0,
        other_kernels=2,
    ) == inventory.figures(*read(INT8_LOG))


def test_fake_quantization_counts_as_float():
    """A float kernel between fake-quantize kernels is no INT8 convolution and not fused."""
    layers, _ = read(FAKE_LOG)
    _, nodes = read(INT8_LOG)

    found = inventory.figures(layers, nodes)

    assert ConvolutionCounts(total=1, int8=0, half=0, float=1) == found.convolutions
    assert found.other_kernels == 1, "waiting is not a kernel"


def test_a_relu_in_the_kernel_is_fused_until_a_later_kernel_requantizes():
    """A kernel that carries its ReLU is fused only if no reader of it belongs to the epilogue."""
    conv = "[ONNX Layer: stage0/conv]\x1f[ONNX Layer: stage0/dq]"
    carries_relu = INT8_LOG.replace(conv, conv + "\x1f[ONNX Layer: stage0/relu]")
    only_quantizes = carries_relu.replace(
        "[ONNX Layer: stage0/conv]\x1f[ONNX Layer: stage1.0/q]\x1f[ONNX Layer: stage0/relu]",
        "[ONNX Layer: stage0/q]",
    )
    pools = only_quantizes.replace("[ONNX Layer: stage0/q]\n", "[ONNX Layer: gap]\n")

    assert [
        inventory.figures(*read(log)).epilogue_fused
        for log in (carries_relu, only_quantizes, pools)
    ] == [0, 0, 1]


def test_weights_of_another_type_than_the_activation_are_not_int8():
    """INT8 needs both operands: mixed ones count as float and are told."""
    layers, nodes = read(
        re.sub(r"(\[48,4,3,3\].*?Datatype: )Int8", r"\1Half", INT8_LOG, flags=re.DOTALL)
    )

    assert inventory.figures(layers, nodes).convolutions.float == 1
    assert "convolutions in mixed are counted as float" in inventory.findings(layers, nodes)


def test_memory_is_read_in_bytes():
    """Activation and weights memory are read as stated."""
    memory = build_log.read_memory(build_log.read_records(INT8_LOG))

    assert memory == {"Activation": 8437760, "Weights": 7130884}


def test_a_log_without_a_table_says_that_it_does_not_know():
    """Nothing is invented where the log is silent."""
    layers, nodes = read("[INFO] nothing\n")

    assert inventory.figures(layers, nodes).convolutions.total == 0
    assert "unknown" in inventory.findings(layers, nodes)[0]


def test_a_missing_convolution_is_told():
    """ONNX convolutions without a kernel of their own are a finding."""
    layers, nodes = read(INT8_LOG)

    found = inventory.findings(layers[:1], nodes)

    assert found == ("the network has 1 convolutions, the engine 0 convolution kernels",)


def test_messages_leave_out_the_missing_driver():
    """Of a message that mixes a reason and the driver's noise, the reason stays, once."""
    noise = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime"
    records = build_log.read_records(
        f"[ERROR] {noise}\n[ERROR] types differ\n{noise}\n[ERROR] types differ\n[INFO] fine\n"
    )

    assert build_log.messages(records, "ERROR") == ("types differ",)


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=40)


@given(st.lists(st.tuples(st.sampled_from(build_log.SEVERITIES), text), max_size=8))
def test_records_read_back_as_written(written: list[tuple[str, str]]):
    """Any message that holds no record of its own survives the log, but for closing line breaks."""
    written = [(severity, message.replace("[", "(")) for severity, message in written]
    log = "".join(build_log.format_record(severity, message) for severity, message in written)

    read_back = [(record.severity, record.message) for record in build_log.read_records(log)]

    assert [(severity, message.rstrip("\n")) for severity, message in written] == read_back


@given(st.text(alphabet="Name: []{},LayerTypIputs\x1f\n", max_size=200))
def test_no_text_makes_the_reader_fail(noise: str):
    """A log that is cut or garbled gives fewer facts, never an exception."""
    for log in (noise, INT8_LOG[: len(noise) * 17] + noise, "[VERBOSE] Layers:\n" + noise):
        inventory.findings(*read(log))


events = st.lists(
    st.tuples(
        st.sampled_from(["start", "step", "finish"]),
        st.sampled_from("abc"),
        st.integers(min_value=-1, max_value=5),
    ),
    max_size=40,
)


@given(events)
def test_progress_never_goes_back_and_stays_a_fraction(happened: list[tuple[str, str, int]]):
    """Whatever a builder announces, the fraction grows and stays within 0 and 1."""
    tracker, seen = PhaseTracker(), [0.0]
    for kind, name, number in happened:
        if kind == "start":
            tracker.start(name, number)
        elif kind == "step":
            tracker.step(name, number)
        else:
            tracker.finish(name)
        seen.append(tracker.fraction)

    assert sorted(seen) == seen
    assert seen[-1] <= 1.0


def test_nested_phases_fill_one_step_of_their_parent():
    """Half of the second of four steps is 3/8 of the whole."""
    tracker = PhaseTracker()
    tracker.start("build", 4)
    tracker.step("build", 0)
    tracker.start("inner", 2)
    tracker.step("inner", 0)

    assert tracker.fraction == 0.375
