"""What an export would do, told without doing it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.devices import ARCHITECTURES, DEVICES, resolve_targets
from exporter.engine import TensorRtRtx
from exporter.errors import EnvironmentLackError, InputError
from exporter.plan.commands import EngineBuild, GraphInput, tensorrt_rtx, trtexec
from exporter.plan.content import PlannedFile
from exporter.plan.engine import MissingBackend, choose_backend, decide_engine, defer
from exporter.plan.planning import make_plan
from exporter.plan.sizes import count_weights, engine_bytes, graph_bytes
from exporter.plan.view import plan_lines, plan_tables, size_text
from exporter.profiles import BatchProfile, SizeProfile
from exporter.request import ExportRequest, validate
from exporter.spec import Precision
from models.variants import VARIANTS

ENGINES = Path(__file__).parent.parent / "benchmarks" / "results" / "engines.json"
SHAPES = (
    "--minShapes=images:1x3x224x224 --optShapes=images:8x3x224x224 --maxShapes=images:32x3x224x224"
)
BUILD = EngineBuild(
    precision="int8",
    inputs=(GraphInput(name="images", shape=("batch", 3, 224, 224)),),
    batch=BatchProfile(1, 8, 32),
)
NEEDS = "full TensorRT, run on the device itself"
RTX_INT8 = "tensorrt-rtx builds for sm80, sm86, sm89, sm120, sm121"


class OnTheDevice(MissingBackend):
    """Full TensorRT on a machine with one GPU."""

    name = "tensorrt"

    def supported_targets(self, precision):
        assert precision in Precision
        return ("sm87",)


def here(_name, target=None, options=None):
    """TensorRT-RTX, or rather its list of targets."""
    return MissingBackend()


def nothing_installed(_name, target=None, options=None):
    raise EnvironmentLackError("TensorRT-RTX is not installed")


def plan(*, find=here, dla_core=None, num_classes=None, **request):
    spec = validate(ExportRequest(**{"model": "A0", **request}))
    return make_plan(spec, find=find, dla_core=dla_core, num_classes=num_classes)


def commands(made):
    return {command.library: command.line for command in made.commands}


def test_without_a_target_everything_is_built_here():
    """The bundled A0 at int8: five capabilities, no device, nothing deferred."""
    made = plan()
    assert ("sm80", "sm86", "sm89", "sm120", "sm121") == made.built_here
    assert made.deferred is None
    assert ["here"] * 5 == [row["built"] for row in made.to_json()["targets"]]


@pytest.mark.parametrize("precision", Precision)
def test_what_the_missing_backend_knows_is_what_tensorrt_rtx_supports(precision):
    """The plan of a machine without the library is the plan of one with it."""
    assert TensorRtRtx().supported_targets(precision) == MissingBackend().supported_targets(
        precision
    )


def test_stages_are_those_of_the_pipeline_with_a_line_each():
    """int8 calibrates and quantizes, fp16 converts, fp32 does neither."""
    common = ["load", "reparameterize", "export", "simplify"]
    for precision, middle in (
        ("fp32", []),
        ("fp16", ["half"]),
        ("int8", ["calibrate", "quantize"]),
    ):
        stages = plan(precision=precision).stages
        assert [*common, *middle, "evidence", "engine", "publish"] == [
            stage.name for stage in stages
        ]
        assert all(stage.what and "\n" not in stage.what for stage in stages)


def test_the_engine_stage_says_what_is_built_and_what_is_left():
    """Both halves of a mixed list are in its line."""
    stages = {stage.name: stage.what for stage in plan(target="rtx3060,orin").stages}
    assert (
        "build one plan for sm86 and count its kernels; left to the device for orin (sm87)"
        == stages["engine"]
    )


def test_a_deferred_target_leaves_out_engine_and_build_log():
    """The files are those that a bundle without an engine has."""
    names = {file.name for file in plan(target="orin").files}
    assert {
        "model.onnx", "model.int8.onnx", "calibration.json", "calibration.cache", "reference.npz",
        "parity.json", "junit.xml", "report.html", "sbom.cdx.json", "manifest.json", "SHA256SUMS",
        "engine.json",
    } == names  # fmt: skip
    assert names | {"model.engine", "build.log"} == {file.name for file in plan().files}


def test_sizes_follow_from_the_parameters():
    """float32 4 bytes, half 2, int8 1 for a weight of a 3x3 kernel; within 2 % of that."""
    for name, variant in VARIANTS.items():
        count = count_weights(variant, 1000)
        assert variant.deploy_parameters() == count.parameters
        assert graph_bytes(count, "fp32") == pytest.approx(4 * count.parameters, rel=0.02), name
        assert graph_bytes(count, "fp16") == pytest.approx(2 * count.parameters, rel=0.02)
        expected = count.kernels + 4 * count.others
        assert graph_bytes(count, "int8") == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("A0", 33e6, 35e6), ("B1", 206e6, 210e6), ("B3", 440e6, 448e6)]
)
def test_sizes_of_float32_engines_are_near_those_measured(name, low, high):
    """Plans that TensorRT-RTX 1.7 built of ImageNet networks with 1000 classes."""
    count = count_weights(VARIANTS[name], 1000)
    assert low < engine_bytes(graph_bytes(count, "fp32"), "fp32", count.convolutions) < high


def test_sizes_of_engines_are_within_5_percent_of_every_one_in_the_table():
    """docs/engines.md: the bundled A0 with 10 classes, B1g4 with 1000."""
    counts = {name: count_weights(VARIANTS[name], n) for name, n in (("A0", 10), ("B1g4", 1000))}
    for row in json.loads(ENGINES.read_text("utf-8"))["engines"]:
        count, precision = counts[row["model"]], row["precision"]
        size = engine_bytes(graph_bytes(count, precision), precision, count.convolutions)
        assert row["plan_bytes"] == pytest.approx(size, rel=0.05), row["target"]


def test_classes_and_image_size_are_the_bundled_networks_or_imagenets():
    """10 classes at 64 pixels for the bundled A0, else 1000 at 224, unless told otherwise."""
    reference = {f.name: f.bytes for f in plan().files}["reference.npz"]
    assert 4 * 8 * (3 * 64 * 64 + 10) == reference
    other = plan(weights="random", num_classes=7, image_size="96x32")
    assert 4 * 8 * (3 * 96 * 32 + 7) == {f.name: f.bytes for f in other.files}["reference.npz"]
    assert ("batch", 3, 224, 224) == plan(weights="random").build.inputs[0].shape


def test_a_checkpoint_of_unknown_classes_is_noted(tmp_path):
    """The file is not read, so the sizes say what they assume; int8 asks for images."""
    weights = tmp_path / "a0.pth"
    weights.write_bytes(b"")
    made = plan(weights=str(weights))
    assert ("sizes are those of 1000 classes; --classes says otherwise",) == made.notes
    assert ("int8 needs calibration images of one's own: pass --calib",) == made.warnings
    assert () == plan(weights=str(weights), num_classes=5, precision="fp16").notes


def test_a_graph_with_scales_is_planned_without_images(tmp_path):
    """They would only check its scales."""
    graph = tmp_path / "qat.onnx"
    graph.touch()
    for given, names in ({}, ["quantize"]), ({"calibration": "photos"}, ["calibrate", "quantize"]):
        made = plan(weights=str(graph), **given)
        assert names == [s.name for s in made.stages if s.name in ("calibrate", "quantize")]
        assert () == made.warnings


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_the_plan_of_own_weights_does_not_promise_bundled_images(precision):
    """`engine` takes them for the bundled and for random weights alone."""

    def calibrate(**request):
        made = plan(precision=precision, target="sm89", **request)
        return next(stage.what for stage in made.stages if stage.name == "calibrate")

    assert "observe up to 512 calibration images (the bundled images)" == calibrate()
    assert "observe up to 512 calibration images (the bundled images)" == calibrate(
        model="A1", weights="random"
    )
    assert "observe up to 512 calibration images (none were named: pass --calib)" == calibrate(
        model="A1", weights="hub"
    )
    assert "observe up to 512 calibration images (photos)" == calibrate(
        model="A1", weights="hub", calibration="photos"
    )


@pytest.mark.parametrize(
    ("version", "precision", "words"),
    [
        ((8, 6), "fp32", "--onnx=model.onnx --saveEngine=trtexec.engine"),
        ((8, 6), "fp16", "--onnx=model.onnx --saveEngine=trtexec.engine --fp16"),
        ((8, 5), "int8", "--onnx=model.int8.onnx --saveEngine=trtexec.engine --int8"),
        ((10, 3), "fp16", "--onnx=model.fp16.onnx --saveEngine=trtexec.engine --stronglyTyped"),
        ((10, 16), "int8", "--onnx=model.int8.onnx --saveEngine=trtexec.engine --stronglyTyped"),
        ((10, 3), "bf16", "--onnx=model.bf16.onnx --saveEngine=trtexec.engine --stronglyTyped"),
        ((11, 4), "int8", "--onnx=model.int8.onnx --saveEngine=trtexec.engine"),
    ],
)
def test_trtexec_has_the_flags_that_its_tensorrt_knows(version, precision, words):
    """Precision flags before 10, strong typing in 10, nothing in 11."""
    assert f"trtexec {words} {SHAPES}" == trtexec(replace(BUILD, precision=precision), version)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_tensorrt_8_builds_neither_bf16_nor_fp8(precision):
    """There is no line rather than one that fails."""
    assert trtexec(replace(BUILD, precision=precision), (8, 6)) is None


_SHARED = {"--onnx", "--saveEngine", "--minShapes", "--optShapes", "--maxShapes", "--memPoolSize"}
TRTEXEC = {
    8: _SHARED | {"--fp16", "--int8", "--calib", "--useDLACore", "--allowGPUFallback"},
    10: _SHARED
    | {"--fp16", "--int8", "--calib", "--stronglyTyped", "--useDLACore", "--allowGPUFallback"},
    11: _SHARED | {"--useDLACore", "--allowGPUFallback"},
}
"""Options that `trtexec` of a release takes, as far as we use them.

Sources: sampleOptions.cpp of TensorRT 8 and 10 (github.com/NVIDIA/TensorRT), where `--memPoolSize`
without a unit is MiB and `--stronglyTyped` refuses `--best`; "Migrating trtexec Usage from TensorRT
10.x to 11.x" (docs.nvidia.com): `--fp16`, `--int8` and `--calib` are gone, and `--stronglyTyped` is
always on. `--workspace` is gone since 10, so no line has it.
"""


def test_every_device_has_a_plan_or_one_sentence_at_every_precision():
    """And every `trtexec` line has only options that its TensorRT knows, none that contradict."""
    options = [{}, {"allow_emulated": True}, {"quantization": "implicit"}, {"workspace_mib": 64}]
    seen, sentences = set(), set[str]()
    for target, precision, further in itertools.product(
        (*DEVICES, *ARCHITECTURES), ("fp32", "fp16", "int8"), options
    ):
        if "quantization" in further and precision != "int8":
            continue
        for core in (None, 0):
            given = {"target": target, "precision": precision, **further}
            try:
                made = plan(**given, dla_core=core, batch="4" if core == 0 else None)
            except InputError as error:
                sentences.add(str(error))
                seen.add(("refused", precision, core))
                continue
            json.dumps(made.to_json())
            assert made.targets
            sentences |= set(plan_lines(made))
            seen.add(("planned", precision, core))
            for command in made.commands:
                if not command.library.startswith("TensorRT "):
                    continue
                words = {word.partition("=")[0] for word in command.line.split()[1:]}
                for version in command.library.removeprefix("TensorRT ").split(", "):
                    assert words <= TRTEXEC[int(version.partition(".")[0])], (given, command)
                assert not ("--stronglyTyped" in words and words & {"--fp16", "--int8", "--calib"})
                assert ("--calib" in words) <= ("--int8" in words)
    assert not [sentence for sentence in sentences if "\n" in sentence]
    assert seen >= {("planned", p, None) for p in ("fp32", "fp16", "int8")}
    assert seen >= {("planned", p, 0) for p in ("fp16", "int8")} | {("refused", "fp32", 0)}


def test_implicit_int8_is_planned_where_a_tensorrt_has_it():
    """Float graph and cache up to 10; 11 does not build it, and the warning says that."""
    made = plan(target="agx-orin", quantization="implicit")
    assert (
        f"trtexec --onnx=model.onnx --saveEngine=trtexec.engine --int8 --calib=calibration.cache "
        f"{SHAPES.replace('224x224', '64x64')}" == commands(made)["TensorRT 10.16, 10.3, 8.6, 8.5"]
    )
    assert (
        "agx-orin (sm87): TensorRT 11.4 (installed by hand on JetPack 7.2.2) does not build "
        "implicit int8"
    ) in made.warnings
    with pytest.raises(InputError, match=r"TensorRT-RTX cannot do this \(quantization implicit: "):
        plan(target="rtx3060", quantization="implicit")


def test_trtexec_on_a_dla_takes_fixed_shapes_and_scales_from_the_cache():
    """Up to 10.7 float graph and cache; from 11.4 the typed graph; between them there is no DLA."""
    build = replace(BUILD, dla_core=1)
    shapes = SHAPES.replace("1x3x", "8x3x").replace("32x3x", "8x3x")
    dla = "--useDLACore=1 --allowGPUFallback"
    assert (
        "trtexec --onnx=model.onnx --saveEngine=trtexec.engine --int8 --fp16 "
        f"--calib=calibration.cache {dla} {shapes}" == trtexec(build, (10, 3))
    )
    assert (
        f"trtexec --onnx=model.onnx --saveEngine=trtexec.engine --fp16 {dla} {shapes}"
        == trtexec(replace(build, precision="fp16"), (8, 5))
    )
    assert f"trtexec --onnx=model.int8.onnx --saveEngine=trtexec.engine {dla} {shapes}" == trtexec(
        build, (11, 4)
    )
    assert trtexec(build, (10, 8)) is None
    assert trtexec(build, (11, 3)) is None


def test_tensorrt_rtx_names_its_targets_and_needs_no_gpu():
    """Capabilities as numbers; the engine is not run."""
    assert (
        "tensorrt_rtx --onnx=model.int8.onnx --saveEngine=trtexec.engine "
        f"--computeCapabilities=86,120 --skipInference {SHAPES} --memPoolSize=workspace:512"
        == tensorrt_rtx(replace(BUILD, workspace_mib=512), ("sm86", "sm120"))
    )


def test_commands_know_open_sizes_several_inputs_and_fixed_graphs():
    """Every input with a free extent is there; a graph without any needs no shapes."""
    size = SizeProfile.parse("64:96:128x32:64:96")
    inputs = (
        GraphInput(name="left", shape=("batch", 3, "height", "width")),
        GraphInput(name="right", shape=("batch", 5)),
    )
    line = trtexec(replace(BUILD, inputs=inputs, size=size), (11, 4))
    assert line is not None
    assert line.endswith(
        "--minShapes=left:1x3x64x32,right:1x5 --optShapes=left:8x3x96x64,right:8x5 "
        "--maxShapes=left:32x3x128x96,right:32x5"
    )
    fixed = replace(BUILD, inputs=(GraphInput(name="images", shape=(1, 3, 8, 8)),))
    assert "trtexec --onnx=model.int8.onnx --saveEngine=trtexec.engine" == trtexec(fixed, (11, 4))


def test_the_plan_of_an_orin_has_a_line_for_every_jetpack():
    """Equal lines are joined; this project's own command comes first."""
    made = commands(plan(target="orin-nano", image_size="224"))
    assert ["on the device", "TensorRT 10.16, 10.3", "TensorRT 8.6, 8.5"] == list(made)
    assert "repvgg-export build build/A0-int8" == made["on the device"]
    assert (
        f"trtexec --onnx=model.int8.onnx --saveEngine=trtexec.engine --stronglyTyped {SHAPES}"
        == made["TensorRT 10.16, 10.3"]
    )


def test_the_plan_of_a_card_has_the_line_of_tensorrt_rtx_and_of_full_tensorrt():
    """rtx5090 is too new for TensorRT 8.6."""
    assert ["TensorRT-RTX", "TensorRT 11.4", "TensorRT 10.13"] == list(
        commands(plan(target="rtx5090"))
    )


def test_xavier_is_built_with_trtexec_because_this_project_does_not_run_there():
    """The deferred engine's own advice is a trtexec line, and a note says why."""
    made = plan(target="xavier")
    assert made.deferred is not None
    assert made.deferred.build_with.startswith("trtexec --onnx=model.int8.onnx ")
    assert ["TensorRT 8.5"] == list(commands(made))
    assert (
        "xavier: JetPack 5.1 is the last for Xavier: Python 3.8 and TensorRT 8.5 there are older "
        "than this project runs on, so build with trtexec",
    ) == made.notes


def test_a_dla_is_planned_with_what_stands_against_it():
    """An open batch, a cache for another version, and the JetPack whose TensorRT has no DLA."""
    made = plan(target="orin-nx", dla_core=0)
    assert (
        "a DLA has no dynamic shapes: the commands take batch 8; `engine` wants --batch 8",
        "calibration.cache is written for TensorRT 10.3; trtexec of another wants its own version "
        "in the first line (repvgg-export build writes it by itself)",
        "orin-nx (sm87): TensorRT about 10.16 (JetPack 7.2) does not build int8 for a DLA",
    ) == made.warnings
    assert ["on the device", "TensorRT 10.3, 8.6, 8.5"] == list(commands(made))


def test_a_dla_that_the_target_lacks_is_refused():
    """The refusal of the device table ends the plan."""
    with pytest.raises(InputError, match=r"target orin-nano \(sm87\) has no DLA"):
        plan(target="orin-nano", dla_core=0)


def test_a_precision_that_brings_nothing_is_a_warning():
    """V100 has no INT8 tensor cores; Orin at fp16 has nothing to warn of."""
    assert ("v100 (sm70) at int8: Volta cards have no INT8 tensor cores: fp16 is faster",) == plan(
        target="v100"
    ).warnings
    assert () == plan(target="orin", precision="fp16").warnings


def test_a_target_that_cannot_do_the_precision_is_refused_as_engine_refuses_it():
    """INT8 on Turing with TensorRT-RTX: one sentence, no plan."""
    with pytest.raises(InputError, match="target sm75 cannot do int8: on Turing"):
        plan(target="t4")


def test_an_unknown_capability_is_refused():
    """sm99 is nobody's; it is neither built nor deferred."""
    with pytest.raises(InputError, match=r"unknown target 'sm99' \(nearest: sm89; "):
        plan(target="orin,sm99")


def test_without_the_library_the_plan_is_the_same_and_says_that_engine_would_stop():
    """A machine with numpy only can plan."""
    made = plan(target="rtx3060", find=nothing_installed)
    assert ("sm86",) == made.built_here
    assert (
        "`engine` would stop here with exit code 3: TensorRT-RTX is not installed",
    ) == made.warnings


def test_full_tensorrt_asked_for_and_missing_defers_to_the_device():
    """T4 can do INT8 with full TensorRT: the bundle goes there without an engine."""
    made = plan(target="t4", backend="tensorrt", find=nothing_installed)
    assert made.deferred is not None
    assert ("sm75",) == made.deferred.capabilities
    assert () == made.warnings
    with pytest.raises(EnvironmentLackError, match="TensorRT-RTX is not installed"):
        plan(backend="tensorrt", find=nothing_installed)


def test_what_the_backend_at_hand_cannot_build_is_deferred():
    """Named targets are divided; the reason names those that wait and what can be built here."""
    decision = decide_engine(resolve_targets("orin,rtx3060,h100"), here("auto"), Precision.INT8)
    assert ("sm86",) == decision.build_here
    assert ["sm87", "sm90"] == [target.capability for target in decision.deferred]
    assert f"orin (sm87), h100 (sm90) need {NEEDS}; {RTX_INT8}" == decision.reason


def test_on_the_device_itself_the_engine_is_built_there():
    """Full TensorRT on an Orin builds for it and leaves other GPUs to theirs."""
    decision = decide_engine(resolve_targets("orin,t4"), OnTheDevice(), Precision.INT8)
    assert ("sm87",) == decision.build_here
    assert f"t4 (sm75) needs {NEEDS}; tensorrt builds for sm87" == decision.reason


def test_a_backend_is_not_needed_for_devices_that_build_their_own():
    """Only then may it be missing; a desktop card still needs it."""
    assert choose_backend("auto", resolve_targets("orin,h100"), nothing_installed) is None
    decision = decide_engine(resolve_targets("orin"), None, Precision.INT8)
    assert ((), f"orin (sm87) needs {NEEDS}") == (decision.build_here, decision.reason)
    for text in ("orin,rtx3060", "sm99", None):
        with pytest.raises(EnvironmentLackError):
            choose_backend("auto", resolve_targets(text), nothing_installed)


@pytest.mark.parametrize(
    ("text", "precision", "sentence"),
    [
        (
            "xavier",
            Precision.BF16,
            "target xavier (sm72) cannot do bf16: bfloat16 came with Ampere (sm80); use fp16",
        ),
        (
            "orin",
            Precision.FP8,
            "target orin (sm87) cannot do fp8: FP8 came with Ada Lovelace (sm89); use int8, or "
            "fp16 before Ampere",
        ),
    ],
)
def test_a_device_that_cannot_do_the_precision_is_not_deferred(text, precision, sentence):
    """Its own TensorRT could not build it either, with a backend here or without."""
    for found in (None, MissingBackend()):
        with pytest.raises(InputError) as caught:
            decide_engine(resolve_targets(text), found, precision)
        assert sentence == str(caught.value)


def test_nothing_deferred_is_no_deferred_engine():
    """engine.json then holds figures only."""
    decision = decide_engine(resolve_targets("sm86"), here("auto"), Precision.INT8)
    assert defer(decision, BUILD) is None


def test_engine_json_of_a_deferred_engine():
    """Status, targets, reason and how to build it; JSON all through."""
    decision = decide_engine(resolve_targets("orin-nano"), here("auto"), Precision.INT8)
    deferred = defer(decision, BUILD)
    assert deferred is not None
    content = json.loads(json.dumps(deferred.to_json()))
    lines = content.pop("commands")
    assert {
        "status": "deferred",
        "backend": "tensorrt",
        "targets": ["sm87"],
        "devices": ["orin-nano"],
        "reason": f"orin-nano (sm87) needs {NEEDS}; {RTX_INT8}",
        "build_with": "repvgg-export build BUNDLE",
        "warnings": [],
    } == content
    assert ["10.16", "10.3", "8.6", "8.5"] == list(lines)
    assert f"the engine is deferred: {decision.reason}" == deferred.not_run_reason


def test_json_of_a_plan_has_all_of_it():
    """One object, with the facts of the device that was named."""
    content = json.loads(json.dumps(plan(target="agx-orin", batch="4", dla_core=1).to_json()))
    assert {
        "model", "precision", "out", "batch", "dynamic_size", "inputs", "dla_core", "stages",
        "files", "targets", "engine", "commands", "warnings", "notes",
    } == set(content)  # fmt: skip
    (target,) = content["targets"]
    assert "Jetson AGX Orin" == target["products"]
    assert "2 DLA cores" == target["dla"]
    assert ("tensorrt", "on the device") == (target["backend"], target["built"])
    assert {"fp16", "int8", "bf16"} == {p for p, a in target["precisions"].items() if a["worth"]}
    assert "deferred" == content["engine"]["deferred"]["status"]
    assert ("4:4:4", 1) == (content["batch"], content["dla_core"])


def test_pixels_are_planned_as_uint8_in_their_layout():
    """The input, the shapes of every command, the stage and the smaller reference inputs."""
    made = plan(with_preprocess="nhwc", image_size="96", target="orin,sm86")
    assert [{"name": "images", "shape": ["batch", 96, 96, 3], "dtype": "uint8"}] == made.to_json()[
        "inputs"
    ]
    lines = [line for line in commands(made).values() if "Shapes" in line]
    assert len(lines) > 2
    assert all("--optShapes=images:8x96x96x3" in line for line in lines)
    (stage,) = (stage for stage in made.stages if stage.name == "prologue")
    assert "put the normalization of uint8 nhwc pixels in front; compare again" == stage.what
    floats = plan(image_size="96")
    assert "prologue" not in {stage.name for stage in floats.stages}
    sizes = [
        next(file.bytes for file in p.files if file.name == "reference.npz") for p in (made, floats)
    ]
    assert sizes[0] == 8 * (3 * 96 * 96 + 4 * 10)
    assert sizes[1] == 8 * 4 * (3 * 96 * 96 + 10)


def test_a_dla_leaves_pixels_to_the_gpu():
    """It has neither uint8 nor float32."""
    words = "a DLA takes no uint8 and no float32: the GPU normalizes the pixels"
    wanted = {"target": "agx-orin", "batch": "4", "dla_core": 0}
    assert words in plan(with_preprocess="nchw", **wanted).warnings
    assert words not in plan(**wanted).warnings


def test_a_network_of_ones_own_has_no_plan():
    """Its sizes are not known before it is traced."""
    spec = replace(validate(ExportRequest(model="A0")), variant=None, name="Detector")
    with pytest.raises(InputError, match="a plan needs a published variant or a bundle, not Det"):
        make_plan(spec, find=here)


def test_the_view_shows_stages_files_targets_and_precisions():
    """Four tables, then software, engine, commands, warnings and notes in that order."""
    made = plan(target="orin,rtx3060")
    stages, files, targets, precisions = plan_tables(made)
    assert [len(made.stages), len(made.files), 2, 10] == [
        table.row_count for table in (stages, files, targets, precisions)
    ]
    starts = [line.split(":")[0] for line in plan_lines(made)]
    assert [
        "orin", "engine", "engine deferred, about 10.4 MB (estimate of TensorRT-RTX)",
        "on the device", "TensorRT-RTX", "TensorRT 11.4", "TensorRT 10.16, 10.13, 10.3",
        "TensorRT 8.6, 8.5", "note",
    ] == starts  # fmt: skip


def test_targets_with_the_same_advice_share_their_rows():
    """The default's five capabilities make two groups: with fp8 and without."""
    *_, precisions = plan_tables(plan())
    assert 10 == precisions.row_count


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (PlannedFile(name="a", bytes=28_170_000), "about 28.2"),
        (PlannedFile(name="a", bytes=28_170_000, exists=True), "28.2"),
        (PlannedFile(name="a"), "< 0.5"),
    ],
)
def test_estimates_are_marked_as_such(file, text):
    """An exact size has no `about`; small evidence has no figure."""
    assert text == size_text(file)


def test_the_planned_out_is_the_bundle_folder():
    """As `engine` would name it."""
    assert "build/A0-fp16" == plan(precision="fp16").out
    assert str(Path("x") / "y") == plan(out="x/y").out
