"""From the engine inspector's JSON to the verdict on an engine of full TensorRT.

The JSON is written by hand in the shape that TensorRT's documentation shows; no engine of full
TensorRT was at hand to print one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exporter.engine import (
    BuildRequest,
    ConvolutionCounts,
    EngineSummary,
    TargetFigures,
    check_engine,
)
from exporter.engine.inspector import read_inspection
from exporter.engine.tensorrt import summarize
from exporter.engine.worker_process import WorkerOutput
from exporter.errors import GateFailedError
from exporter.profiles import BatchProfile
from exporter.spec import Precision

LOG = """\
[VERBOSE] c0 [Conv] inputs: [x -> (1, 3, 64, 64)[FLOAT]], [c0.weight -> (8, 3, 3, 3)[FLOAT]], 
[VERBOSE] c0 [Conv] outputs: [c0.out -> (1, 8, 64, 64)[FLOAT]], 
[VERBOSE] r0 [Relu] inputs: [c0.out -> (1, 8, 64, 64)[FLOAT]], 
[VERBOSE] r0 [Relu] outputs: [r0.out -> (1, 8, 64, 64)[FLOAT]], 
[VERBOSE] c1.q [QuantizeLinear] inputs: [r0.out -> (1, 8, 64, 64)[FLOAT]], 
[VERBOSE] c1.q [QuantizeLinear] outputs: [c1.q.out -> (1, 8, 64, 64)[INT8]], 
[VERBOSE] c1 [Conv] inputs: [c1.q.out -> (1, 8, 64, 64)[FLOAT]], 
[VERBOSE] c1 [Conv] outputs: [c1.out -> (1, 8, 64, 64)[FLOAT]], 
[VERBOSE] r1 [Relu] inputs: [c1.out -> (1, 8, 64, 64)[FLOAT]], 
[VERBOSE] r1 [Relu] outputs: [r1.out -> (1, 8, 64, 64)[FLOAT]], 
[WARNING] something to know
"""  # noqa: W291
INT8 = "Thirty-two wide channel vectorized row major Int8 format"
HALF = "Channel major FP16 format where channel % 8 == 0"
FLOAT = "Row major linear FP32"
DYNAMIC = "N/A due to dynamic shapes"


def tensor(name: str, words: str) -> dict[str, Any]:
    return {"Name": name, "Dimensions": [1, 8, 64, 64], "Format/Datatype": words}


def convolution(name: str, words: str, weights: str, metadata: str = "", **more) -> dict[str, Any]:
    """A layer as the documentation prints it, from ``x`` of c0 or r0's output."""
    first = name.startswith("c0")
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [tensor("x" if first else "r0.out", words)],
        "Outputs": [tensor("r0.out" if first else "r1.out", words)],
        "ParameterType": "Convolution",
        "Weights": {"Type": weights, "Count": 216},
        "Bias": {"Type": "Float", "Count": 8},
        "TacticName": "",
        "Metadata": metadata,
        **more,
    }


def summary(*layers: dict[str, Any], precision: Precision = Precision.INT8) -> EngineSummary:
    request = BuildRequest(
        onnx_path=Path("m.onnx"),
        precision=precision,
        targets=("sm87",),
        batch=BatchProfile(1, 1, 1),
    )
    text = json.dumps({"Layers": list(layers), "Bindings": ["x", "logits"]})
    output = WorkerOutput(plan=b"1234", log=LOG, version="8.6.1", layers=text, notes=("a note",))
    return summarize(request, output, "unknown")


def counts(found: EngineSummary) -> tuple[int, int, int, int, int]:
    c = found.convolutions
    return c.int8, c.half, c.float, found.epilogue_fused, found.other_kernels


REFORMAT = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to c0 + r0",
    "LayerType": "Reformat",
    "Inputs": [tensor("x", FLOAT)],
    "Outputs": [tensor("x'", INT8)],
}
NOTHING = {"Name": "flatten", "LayerType": "NoOp", "Inputs": [], "Outputs": []}


def test_an_int8_engine_of_8_6_is_read_by_layer_names():
    """Without metadata the fused layer's name tells its nodes; weights and formats tell INT8."""
    found = summary(
        REFORMAT,
        convolution("c0.weight + c0.q + c0 + PWN(r0)", INT8, "Int8"),
        convolution("c1.weight + c1.q + c1 + r1", INT8, "Int8"),
        NOTHING,
    )

    assert (2, 0, 0, 2, 1) == counts(found)
    check_engine(found, Precision.INT8, 2)
    assert ("tensorrt", "8.6.1", ("sm87",), 4) == (
        found.backend,
        found.version,
        found.targets,
        found.plan_bytes,
    )
    assert ("a note", "something to know") == found.warnings


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", " "])
def test_metadata_names_the_nodes_of_a_layer(separator: str):
    """Whatever unprintable character stands between the nodes, as raw text in the JSON."""
    both = separator.join(["[ONNX Layer: c0]", "[ONNX Layer: r0]"])
    text = json.dumps({"Layers": [convolution("a", HALF, "Half", both)]})

    (layer,) = read_inspection(text.replace("\\u001e", "\x1e").replace("\\u001f", "\x1f"))

    assert frozenset({"c0", "r0"}) == layer.onnx_names


def test_open_shapes_hide_the_formats_but_not_the_weights():
    """Where the format says N/A, the weights' type decides."""
    found = summary(
        convolution("c0 + r0", DYNAMIC, "Half"),
        convolution("c1 + r1", DYNAMIC, "Int8"),
    )

    assert (1, 1, 0, 2, 0) == counts(found)


@pytest.mark.parametrize(
    ("tactic", "expected"),
    [
        ("sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nchw", (1, 0, 0)),
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwc", (0, 1, 0)),
        ("ampere_scudnn_128x64_relu_medium_nn_v1", (0, 0, 1)),
        ("0x00000000000003ea", (0, 0, 1)),
    ],
)
def test_without_weights_the_kernel_s_name_decides(tactic: str, expected: tuple[int, int, int]):
    """A layer that lists no weights is judged by its kernel; an unknown one counts as float."""
    layer = convolution("c0 + r0", DYNAMIC, "", TacticName=tactic)
    del layer["Weights"]

    assert expected == counts(summary(layer))[:3]


def test_int8_weights_under_float_activations_are_not_int8():
    """Weights that are stored in INT8 and multiplied in float count as float, and it is said."""
    found = summary(convolution("c0 + r0", FLOAT, "Int8"), convolution("c1 + r1", INT8, "Int8"))

    assert (1, 0, 1) == counts(found)[:3]
    assert "convolutions in mixed are counted as float" in found.warnings
    with pytest.raises(GateFailedError, match="on sm87 only 1 of 2 convolutions run in INT8"):
        check_engine(found, Precision.INT8, 2)


def test_a_separate_relu_kernel_leaves_the_epilogue_unfused():
    """A pointwise layer that reads the convolution and stems from its ReLU is counted apart."""
    relu = {
        "Name": "PWN(r1)",
        "LayerType": "PointWiseV2",
        "Inputs": [tensor("r1.out", INT8)],
        "Outputs": [tensor("y", INT8)],
    }
    found = summary(convolution("c0 + r0", INT8, "Int8"), convolution("c1", INT8, "Int8"), relu)

    assert (2, 0, 0, 1, 1) == counts(found)


def test_a_copy_between_layouts_is_no_epilogue():
    """It is named after the layer that it serves, and counts as another kernel only."""
    copy = {
        "Name": "Reformatting CopyNode for Output Tensor 0 to c0 + r0",
        "LayerType": "Reformat",
        "Inputs": [tensor("r0.out", INT8)],
        "Outputs": [tensor("r0.out'", HALF)],
    }

    assert (1, 0, 0, 1, 1) == counts(summary(convolution("c0 + r0", INT8, "Int8"), copy))


def generated(kind: str, tactic: str, constants: str) -> dict[str, Any]:
    """A layer of the other code generator, from c0 and r0."""
    return {
        "Name": "__myl_Conv",
        "LayerType": kind,
        "Inputs": [tensor("x", constants)],
        "Constants": [{"Name": "w", "Dimensions": [8, 3, 3, 3], "Format/Datatype": constants}],
        "Outputs": [tensor("r0.out", constants)],
        "TacticName": tactic,
        "Metadata": "[ONNX Layer: c0]\x1f[ONNX Layer: r0]",
    }


@pytest.mark.parametrize(
    ("kind", "tactic", "expected"),
    [
        ("correlation", "", (1, 0, 0, 1, 0)),
        ("fusion", "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32", (1, 0, 0, 1, 0)),
        ("fusion", "pointwise_vectorized", (0, 0, 0, 0, 1)),
        ("kgen", "__myl_Cast", (0, 0, 0, 0, 1)),
    ],
)
def test_generated_kernels_count_where_they_multiply(
    kind: str, tactic: str, expected: tuple[int, ...]
):
    """Kernels of the other code generator are judged by type, and fusions by their kernel."""
    assert expected == counts(summary(generated(kind, tactic, "Int8")))


def test_the_split_fields_of_11_are_read():
    """From 11 on, layout and data type are two fields."""
    layer = convolution("c0 + r0", "", "Half")
    for side in ("Inputs", "Outputs"):
        del layer[side][0]["Format/Datatype"]
        layer[side][0] |= {"Format": "Channel major, 8 wide", "DataType": "Half"}

    (read,) = read_inspection(json.dumps({"Layers": [layer], "I/O Tensors": []}))

    assert ("Half", "Half") == (read.inputs[0].datatype, read.outputs[0].datatype)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (INT8, "Int8"),
        (HALF, "Half"),
        (FLOAT, "Float"),
        ("Half(64,1:8,8)", "Half"),
        ("Row major linear BFloat16 format", "BFloat16"),
        ("Row major linear FP8 format", "FP8"),
        (DYNAMIC, ""),
    ],
)
def test_a_data_type_is_found_amid_its_layout(words: str, expected: str):
    """Every wording of a format gives one type, and none where it says none."""
    layer = convolution("c0", words, "Half")

    assert expected == read_inspection(json.dumps({"Layers": [layer]}))[0].inputs[0].datatype


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"Layers": 3}', '{"Layers": ["c0", 7]}'])
def test_text_that_lists_no_layers_gives_none(text: str):
    """Names alone, as below detailed verbosity, and damaged text are no layer table."""
    assert () == read_inspection(text)


def test_an_engine_without_layer_information_fails_the_gate():
    """What the engine contains is then unknown, and that is not a pass."""
    found = summary()

    with pytest.raises(GateFailedError, match="its layer table cannot vouch for int8"):
        check_engine(found, Precision.INT8, 2)


def test_what_runs_on_a_dla_is_not_judged_and_said():
    """The DLA's layer hides its convolutions: the others are judged, the rest is a warning."""
    dla = {"Name": "{ForeignNode[c0...r0]}", "LayerType": "DLA", "Inputs": [], "Outputs": []}
    found = summary(dla, convolution("c1 + r1", HALF, "Half"))

    assert (1, 1) == (found.dla_layers, found.to_json()["dla_layers"])
    assert (0, 1, 0, 1, 0) == counts(found)
    assert found.warnings[0] == (
        "1 part(s) of the network run on the DLA, where the engine does not tell which data type "
        "they compute in"
    )
    check_engine(found, Precision.FP16, 2)
    with pytest.raises(GateFailedError, match="only 0 of 1 convolutions run in INT8"):
        check_engine(found, Precision.INT8, 2)


def test_half_passes_for_int8_only_where_emulation_is_allowed():
    """On Turing quantized convolutions run in half; float ones fail all the same."""

    def engine(half: int, floats: int) -> EngineSummary:
        found = ConvolutionCounts(total=half + floats, int8=0, half=half, float=floats)
        figures = TargetFigures(convolutions=found, epilogue_fused=0, other_kernels=0)
        return EngineSummary(backend="b", version="1", per_target={"sm75": figures}, plan_bytes=1)

    check_engine(engine(22, 0), Precision.INT8, 22, allow_emulated=True)
    for summary_, allowed in ((engine(22, 0), False), (engine(21, 1), True)):
        with pytest.raises(GateFailedError, match="on sm75 only"):
            check_engine(summary_, Precision.INT8, 22, allow_emulated=allowed)
    with pytest.raises(GateFailedError, match="on sm75 only 0 of 22"):
        check_engine(engine(22, 0), Precision.FP32, 22, allow_emulated=True)
