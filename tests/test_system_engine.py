"""The main job, run as a user runs it: from the bundled A0 to a published bundle."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibration.cache_text import parse_cache_text
from calibration.table import CalibrationTable
from exporter.bundle import Bundle, file_sha256
from exporter.cli import main
from exporter.errors import InputError
from exporter.parity.comparison import compare
from exporter.pipeline import run
from exporter.request import ExportRequest, validate

COMMON = {
    "manifest.json", "model.onnx", "model.engine", "engine.json", "reference.npz", "parity.json",
    "junit.xml", "report.html", "build.log", "sbom.cdx.json", "SHA256SUMS",
}  # fmt: skip
FILES = {
    "fp32": COMMON,
    "fp16": COMMON | {"model.fp16.onnx"},
    "bf16": COMMON | {"model.bf16.onnx"},
    "int8": COMMON | {"model.int8.onnx", "calibration.json", "calibration.cache"},
    "fp8": COMMON | {"model.fp8.onnx", "calibration.json"},
}
PRECISIONS = tuple(FILES)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_command_exits_0_and_the_bundle_has_every_file_of_the_contract(bundles, precision):
    """`engine A0` publishes exactly the contract's files at each precision."""
    out, process = bundles(precision)
    assert (0, "") == (process.returncode, "" if process.returncode == 0 else process.stderr)
    assert FILES[precision] == {path.name for path in out.iterdir()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_manifest_hashes_every_file_that_is_not_made_from_it(bundles, precision):
    """The manifest's sha256 and size are those of the files, and none is left out."""
    out, _ = bundles(precision)
    entries = json.loads((out / "manifest.json").read_text())["files"]
    assert FILES[precision] - {"manifest.json", "SHA256SUMS"} == set(entries)
    for name, entry in entries.items():
        content = (out / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_ledger_has_the_stages_of_the_contract_in_order(bundles, precision):
    """What ran passed; the engine says not_run and why, and is not counted as passed."""
    out, _ = bundles(precision)
    parity = json.loads((out / "parity.json").read_text())
    middle = [] if precision == "fp32" else [precision]
    stages = ["reparameterized", "onnx", "simplified", *middle, "engine"]
    assert stages == [row["stage"] for row in parity["stages"]]
    assert "pass" == parity["verdict"]
    assert ["pass"] * (len(stages) - 1) == [row["status"] for row in parity["stages"][:-1]]
    engine = parity["stages"][-1]
    assert ("not_run", None) == (engine["status"], engine["sqnr_db"])
    assert engine["reason"]
    assert ["engine"] == parity["not_run"]


def test_int8_keeps_top1_within_half_a_point_on_the_held_out_images(bundles):
    """INT8 agrees with the trained network on the 360 test images, by at least 35 dB."""
    out, _ = bundles("int8")
    parity = json.loads((out / "parity.json").read_text())
    row = next(row for row in parity["stages"] if row["stage"] == "int8")
    assert 360 == parity["image_count"]
    assert parity["original_top1"] >= 0.98
    assert abs(parity["original_top1"] - row["top1"]) <= 0.005
    assert row["sqnr_db"] >= 35
    assert row["top1_agreement"] >= 0.98


def test_the_int8_engine_runs_all_22_convolutions_in_int8_on_every_target(bundles):
    """engine.json counts 22 of 22 INT8 convolutions on sm80 to sm121."""
    engine = json.loads((bundles("int8")[0] / "engine.json").read_text())
    assert ["sm80", "sm86", "sm89", "sm120", "sm121"] == engine["targets"]
    for figures in engine["per_target"].values():
        assert {"total": 22, "int8": 22, "half": 0, "float": 0, "bf16": 0, "fp8": 0} == figures[
            "convolutions"
        ]
    assert {"total": 22, "int8": 22, "half": 0, "float": 0, "bf16": 0, "fp8": 0} == engine[
        "convolutions"
    ]


def test_the_fp16_engine_runs_all_22_convolutions_in_half_with_fused_bias_and_relu(bundles):
    """engine.json counts 22 half convolutions with fused epilogue, sm75 included."""
    engine = json.loads((bundles("fp16")[0] / "engine.json").read_text())
    assert ["sm75", "sm80", "sm86", "sm89", "sm120", "sm121"] == engine["targets"]
    for figures in engine["per_target"].values():
        assert {"total": 22, "int8": 0, "half": 22, "float": 0, "bf16": 0, "fp8": 0} == figures[
            "convolutions"
        ]
        assert 22 == figures["epilogue_fused"]


def test_the_bf16_engine_runs_all_22_convolutions_in_bfloat16_with_fused_bias_and_relu(bundles):
    """engine.json counts 22 of 22 on sm80 to sm121, and the ledger has its row and how it came."""
    out, _ = bundles("bf16")
    engine = json.loads((out / "engine.json").read_text())
    assert ["sm80", "sm86", "sm89", "sm120", "sm121"] == engine["targets"]
    counts = {"total": 22, "int8": 0, "half": 0, "float": 0, "bf16": 22, "fp8": 0}
    for figures in engine["per_target"].values():
        assert (counts, 22) == (figures["convolutions"], figures["epilogue_fused"])
    rows = json.loads((out / "parity.json").read_text())["stages"]
    (row,) = (row for row in rows if row["stage"] == "bf16")
    assert row["sqnr_db"] >= 45
    assert (1.0, {"min_sqnr_db": 32.0, "min_top1_agreement": 0.98}) == (
        row["top1_agreement"],
        row["tolerance"],
    )
    (note,) = (n for n in Bundle.load(out).manifest["notes"] if "bf16" in n)
    assert note.startswith("the bf16 row was computed in float32 and rounded wherever the graph")


def test_the_fp8_engine_runs_all_22_convolutions_in_fp8(bundles):
    """engine.json counts 22 of 22 on sm89 to sm121; the ledger's row is far above its gate."""
    out, _ = bundles("fp8")
    engine = json.loads((out / "engine.json").read_text())
    assert ["sm89", "sm120", "sm121"] == engine["targets"]
    counts = {"total": 22, "int8": 0, "half": 0, "float": 0, "bf16": 0, "fp8": 22}
    for figures in engine["per_target"].values():
        assert (counts, 0) == (figures["convolutions"], figures["epilogue_fused"])
    rows = json.loads((out / "parity.json").read_text())["stages"]
    (row,) = (row for row in rows if row["stage"] == "fp8")
    assert row["sqnr_db"] >= 29
    assert row["top1_agreement"] >= 0.99


def test_the_calibration_of_an_fp8_bundle_is_no_int8_calibration(bundles, tmp_path):
    """Scales reach to 448, the table says so, and an int8 export refuses it."""
    out, _ = bundles("fp8")
    table = CalibrationTable.loads((out / "calibration.json").read_text())
    assert ("minmax", "float8e4m3fn") == (table.method, table.options["data_type"])
    for name, scale in table.activation_scales.items():
        assert np.float32(table.ranges[name].threshold / 448) == np.float32(scale)
    spec = validate(
        ExportRequest(
            model="A0", calibration_table=str(out / "calibration.json"), out=str(tmp_path / "out")
        )
    )
    with pytest.raises(InputError) as caught:
        run(spec)
    assert str(caught.value) == (
        f"calibration table {out / 'calibration.json'} holds scales for float8e4m3fn, not for "
        "int8: leave --calibration-table away to calibrate anew"
    )
    assert not (tmp_path / "out").exists()


def test_a_bf16_bundle_computes_what_its_row_says(bundles):
    """Bundle.run emulates; its answers are bfloat16 numbers, and as near as the ledger says."""
    bundle = Bundle.load(bundles("bf16")[0])
    images, logits = bundle.reference()
    found = bundle.run(images)
    assert np.array_equal(found.view(np.uint32) & 0xFFFF, np.zeros_like(found, dtype=np.uint32))
    assert compare(logits, found).sqnr_db >= 45


def test_the_plan_is_a_real_serialized_engine(bundles):
    """model.engine starts with TensorRT's magic and holds at least the INT8 weights."""
    out, _ = bundles("int8")
    plan = (out / "model.engine").read_bytes()
    assert b"vtrt" == plan[:4]
    assert len(plan) > 7_000_000


def test_the_int8_graph_has_scalar_activation_scales_and_nothing_between_conv_and_relu(bundles):
    """Every activation scale is 0-d, every Relu reads a Conv."""
    model = onnx.load(bundles("int8")[0] / "model.int8.onnx")
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    producer = {node.output[0]: node.op_type for node in model.graph.node}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert 22 == len(quantizers)
    assert [[]] * 22 == [dims[node.input[1]] for node in quantizers]
    relus = [node for node in model.graph.node if node.op_type == "Relu"]
    assert ["Conv"] * 22 == [producer[node.input[0]] for node in relus]


def test_the_calibration_table_and_cache_agree_and_belong_to_the_graph(bundles):
    """calibration.json names the ONNX it was made from; the cache holds the same scales."""
    out, _ = bundles("int8")
    table = CalibrationTable.loads((out / "calibration.json").read_text())
    cache = (out / "calibration.cache").read_text()
    assert hashlib.sha256((out / "model.onnx").read_bytes()).hexdigest() == table.onnx_sha256
    assert dict(table.activation_scales) == parse_cache_text(cache)
    assert 128 == table.image_count
    assert cache.startswith("TRT-100300-EntropyCalibration2\n")


def test_both_graphs_say_what_they_are(bundles):
    """Node descriptions, and metadata that a program can use without the bundle."""
    out, _ = bundles("int8")
    manifest = json.loads((out / "manifest.json").read_text())
    plain, precise = onnx.load(out / "model.onnx"), onnx.load(out / "model.int8.onnx")
    for model in (plain, precise):
        found = {entry.key: entry.value for entry in model.metadata_props}
        assert ("A0", "10") == (found["variant"], found["num_classes"])
        assert manifest["weights"]["sha256"] == found["weights_sha256"]
        assert manifest["preprocess"] == json.loads(found["preprocess"])
        assert manifest["class_names"] == json.loads(found["class_names"])
        words = {node.name: node.doc_string for node in model.graph.node}
        assert (
            "3x3 convolution, 3 -> 48 channels, stride 2; all branches of block stage0 in one "
            "kernel"
        ) == words["stage0.conv"]
    assert "22 of them fused RepVGG blocks" in plain.graph.doc_string
    assert manifest["calibration"]["sha256"] == found["calibration_sha256"]
    assert "clipped at" in words["images.q"]


def test_every_scale_of_the_cache_belongs_to_a_tensor_of_the_float_graph(bundles):
    """Implicit INT8 reads model.onnx, where each convolution's input must have its scale."""
    out, _ = bundles("int8")
    graph = onnx.load(out / "model.onnx").graph
    scales = parse_cache_text((out / "calibration.cache").read_text())
    tensors = {value.name for value in graph.input} | {t for n in graph.node for t in n.output}
    assert scales.keys() <= tensors
    read = {node.input[0] for node in graph.node if node.op_type == "Conv"}
    assert 22 == len(read)
    assert read == scales.keys()
    table = CalibrationTable.loads((out / "calibration.json").read_text())
    for name, scale in scales.items():
        assert (scale, name) == (table.activation_scales[name], name)
        # What the Q/DQ graph holds is the same number.
    stored = {
        t.name.removesuffix(".scale"): float(numpy_helper.to_array(t))
        for t in onnx.load(out / "model.int8.onnx").graph.initializer
        if t.name.removesuffix(".scale") in scales and t.name.endswith(".scale")
    }
    assert scales == stored


def test_activation_scales_of_shape_1_cost_all_int8_and_end_the_build(bundles, command, tmp_path):
    """The trap: TensorRT-RTX builds the graph and runs no convolution in INT8. Exit code 1."""
    copy = Path(shutil.copytree(bundles("int8")[0], tmp_path / "copy"))
    graph = copy / "model.int8.onnx"
    model = onnx.load(graph)
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    spoiled = {name for node in quantizers for name in node.input[1:]}
    for tensor in model.graph.initializer:
        if tensor.name in spoiled:
            tensor.dims.append(1)
    onnx.checker.check_model(model)
    onnx.save(model, graph)
    manifest = json.loads((copy / "manifest.json").read_text())
    found = {"sha256": file_sha256(graph), "bytes": graph.stat().st_size}
    manifest["files"][graph.name] = found
    (copy / "manifest.json").write_text(json.dumps(manifest))
    before = (copy / "model.engine").read_bytes()

    process = command("build", str(copy), "--target", "sm80,sm86", "--quiet")

    assert 1 == process.returncode
    assert (
        "repvgg-export: on sm80 only 0 of 22 convolutions run in INT8 (0 INT8, 0 half, 22 float): "
        "give every activation QuantizeLinear/DequantizeLinear a scale of shape [] (shape [1] "
        "silently costs INT8) and quantize input and weights of every convolution\n"
    ) == process.stderr
    assert before == (copy / "model.engine").read_bytes()


def test_the_user_is_told_that_the_bundled_weights_were_used_and_how_to_pass_others(bundles):
    """One note says so, in the JSON result and in the manifest."""
    out, process = bundles("int8")
    notes = json.loads(process.stdout)["notes"]
    assert notes == json.loads((out / "manifest.json").read_text())["notes"]
    assert 1 == len(notes)
    assert "bundled weights" in notes[0]
    assert "--weights path" in notes[0]
    assert "--weights hub" in notes[0]


def test_reference_npz_holds_real_inputs_and_the_original_networks_outputs(bundles):
    """The bundle's own INT8 graph reproduces the recorded logits within the gate."""
    out, _ = bundles("int8")
    bundle = Bundle.load(out)
    images, logits = bundle.reference()
    assert ((8, 3, 64, 64), (8, 10)) == (images.shape, logits.shape)
    np.testing.assert_allclose(bundle.run(images), logits, atol=0.5)


def test_junit_xml_has_a_case_for_each_stage(bundles):
    """The engine is skipped with its reason, nothing fails."""
    suite = ElementTree.parse(bundles("int8")[0] / "junit.xml").getroot()
    assert ("5", "0", "1") == tuple(suite.get(key) for key in ("tests", "failures", "skipped"))
    cases = {case.get("name"): case for case in suite}
    assert cases["engine"].find("skipped").get("message")


def test_report_html_is_self_contained_and_names_the_verdict(bundles):
    """The page refers to nothing outside itself."""
    page = (bundles("int8")[0] / "report.html").read_text()
    assert "RepVGG-A0 at int8" in page
    assert "http" not in page.replace("http-equiv", "")
    assert "int8 passed on 360 real images; engine did not run: " in page
    for section in ("road", "parity", "recipes", "mixed", "layers", "ranges", "images", "engine"):
        assert f'<section id="{section}"' in page
    assert 8 == page.count('src="data:image/png;base64,')


def test_parity_json_has_the_figures_of_every_layer(bundles):
    """22 convolutions in INT8 and the classifier in float, each with its own error and ranges."""
    parity = json.loads((bundles("int8")[0] / "parity.json").read_text())
    rows = parity["layers"]["rows"]
    assert ["int8"] * 22 + ["float"] == [row["computed_in"] for row in rows]
    assert all(25 < row["sqnr_db"] <= row["own_sqnr_db"] + 1 for row in rows)
    assert all(row["activations"]["before"]["largest"] > 0 for row in rows)
    worst = parity["worst_images"]
    assert ("int8", 0, 8) == (worst["stage"], worst["changed"], len(worst["rows"]))
    assert "localization" not in parity


def test_verify_accepts_a_fresh_bundle_and_names_a_flipped_byte(bundles, command, tmp_path):
    """`verify` exits 0 on what `engine` made, and 1 naming the damaged file."""
    copy = Path(shutil.copytree(bundles("int8")[0], tmp_path / "copy"))
    assert 0 == command("verify", str(copy)).returncode
    engine = copy / "model.engine"
    content = bytearray(engine.read_bytes())
    content[1000] ^= 1
    engine.write_bytes(content)
    process = command("verify", str(copy))
    assert 1 == process.returncode
    assert "model.engine" in process.stderr


def test_recipes_climb_from_plain_to_full(command, tmp_path, bundles, monkeypatch):
    """Equalization and second-order rounding each bring decibels; the table names its recipe."""
    # The float graph is made once.
    monkeypatch.setenv("REPVGG_EXPORT_CACHE", str(tmp_path / "cache"))
    found = {}
    for recipe in ("minmax", "equalize"):
        out = tmp_path / recipe
        process = command(
            "engine", "A0", "--recipe", recipe, "--target", "orin", "--out", str(out), "--json"
        )
        assert process.returncode == 0, process.stderr
        found[recipe] = json.loads(process.stdout)["parity"]["stages"][3]["sqnr_db"]
        assert recipe == json.loads((out / "manifest.json").read_text())["calibration"]["recipe"]
    parity = json.loads((bundles("int8")[0] / "parity.json").read_text())
    assert found["minmax"] + 2 < found["equalize"]
    assert found["equalize"] + 4 < parity["stages"][3]["sqnr_db"]


def test_keep_float_keeps_the_named_convolutions_and_says_so(command, tmp_path, capsys):
    """The engine runs the others in INT8; a name that is none is refused with the known ones."""
    out = tmp_path / "b"
    arguments = (
        "engine", "A0", "--target", "sm86", "--recipe", "equalize", "--image-size", "32",
        "--calib-images", "32", "--evaluation-images", "64", "--min-agreement", "0",
        "--quiet",
    )  # fmt: skip
    process = command(
        *arguments, "--keep-float", "stage0.conv, stage4.0.conv", "--out", str(out), "--json"
    )
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout)["engine"]["convolutions"]
    assert {"total": 22, "int8": 20, "half": 0, "float": 2, "bf16": 0, "fp8": 0} == counts
    assert 2 == main([*arguments, "--keep-float", "stage9.conv", "--out", str(tmp_path / "c")])
    refusal = capsys.readouterr().err
    assert "no convolution is called stage9.conv; known: linear, stage0.conv" in refusal
