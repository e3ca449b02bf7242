"""`plan` as a user runs it, and the bundle without an engine that it promises."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from calibration.cache_text import parse_cache_text
from exporter.bundle import Bundle
from exporter.cli import main
from exporter.device import options_for

EVIDENCE = {
    "manifest.json", "model.onnx", "engine.json", "reference.npz", "parity.json", "junit.xml",
    "report.html", "sbom.cdx.json", "SHA256SUMS",
}  # fmt: skip
BLOCKED = ("torch", "onnx", "onnxruntime", "onnxsim", "tensorrt", "tensorrt_rtx")
REASON = (
    "orin-nano (sm87) needs full TensorRT, run on the device itself; tensorrt-rtx builds for "
    "sm75, sm80, sm86, sm89, sm120, sm121"
)


def planned(command, *arguments):
    process = command("plan", *arguments, "--json")
    assert (0, "") == (process.returncode, process.stderr)
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def exported(command, tmp_path_factory):
    """Run `engine A0` on 64 images; what two of this module's exports share is made once."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REPVGG_EXPORT_CACHE", str(cache))
            return command("engine", "A0", "--evaluation-images", "64", *arguments)

    return run


@pytest.fixture(scope="module")
def deferred(exported, tmp_path_factory):
    """An fp16 bundle for a device that builds its own engine."""
    out = tmp_path_factory.mktemp("deferred") / "bundle"
    return out, exported("--precision", "fp16", "--target", "orin-nano", "--out", str(out))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_plan_foretells_stages_files_targets_and_sizes(command, bundles, precision):
    """What `engine` then made: the same names; graphs within 1 %, the engine within 5 %."""
    out, process = bundles(precision)
    made = json.loads(process.stdout)
    plan = planned(command, "A0", "--precision", precision)
    assert list(made["seconds"]) == [stage["stage"] for stage in plan["stages"]]
    assert {path.name for path in out.iterdir()} == {file["name"] for file in plan["files"]}
    assert made["engine"]["targets"] == plan["engine"]["build_here"]
    sizes = {file["name"]: file["bytes"] for file in plan["files"] if file["bytes"] is not None}
    for name, size in sizes.items():
        tolerance = 0.05 if name == "model.engine" else 0.01
        assert (out / name).stat().st_size == pytest.approx(size, rel=tolerance), name


def test_a_plan_writes_nothing_and_reads_well(command, tmp_path):
    """Tables and lines on standard output, nothing on standard error, no folder made."""
    process = command("plan", "A0", "--target", "orin", "--precision", "int8", cwd=tmp_path)
    assert (0, "") == (process.returncode, process.stderr)
    assert [] == list(tmp_path.iterdir())
    for part in (
        "RepVGG-A0 int8: what would be done",
        "left to the device for orin (sm87)",
        "engine deferred, about 10.4 MB",
        "trtexec --onnx=model.int8.onnx --saveEngine=trtexec.engine --stronglyTyped "
        "--minShapes=images:1x3x64x64 --optShapes=images:8x3x64x64 --maxShapes=images:32x3x64x64",
    ):
        assert part in process.stdout


def test_a_plan_needs_neither_torch_nor_onnx_nor_a_runtime(bundles):
    """The device half's machines can plan, for a variant and for a bundle."""
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
    for model in ("A0", str(bundles("fp16")[0])):
        program = (
            f"import sys\n{block}\nfrom exporter.cli import main\n"
            f"sys.exit(main(['plan', {model!r}, '--target', 'rtx3060', '--json']))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert (0, "") == (done.returncode, done.stderr)
        assert ["sm86"] == json.loads(done.stdout)["engine"]["build_here"]


def test_a_plan_of_a_bundle_has_its_files_and_only_the_engine_left(command, bundles):
    """Sizes are those on disk; the inputs are the graph's."""
    out, _ = bundles("fp16")
    plan = planned(command, str(out), "--target", "agx-orin", "--dla", "1")
    assert ["engine"] == [stage["stage"] for stage in plan["stages"]]
    for file in plan["files"]:
        assert (file["bytes"], False) == ((out / file["name"]).stat().st_size, file["estimate"])
    size = (out / "model.engine").stat().st_size
    assert (size, False) == (plan["engine"]["bytes"], plan["engine"]["estimate"])
    assert [{"name": "images", "shape": ["batch", 3, 64, 64]}] == plan["inputs"]
    assert f"repvgg-export build {out}" == plan["commands"][0]["line"]
    assert all("--useDLACore=1" in row["line"] for row in plan["commands"][1:])


def test_a_plan_of_a_bundle_refuses_what_was_decided_at_export(command, bundles):
    """Options of the export would be dropped in silence otherwise."""
    out, _ = bundles("fp16")
    assert "DLA core must be 0 or more, not -1" in command("plan", str(out), "--dla", "-1").stderr
    for option in (("--batch", "4"), ("--classes", "5")):
        process = command("plan", str(out), *option)
        assert 2 == process.returncode
        assert (
            f"repvgg-export: {out} is exported already: beside a bundle `plan` takes --target, "
            "--backend and --dla only\n" == process.stderr
        )


def test_a_plan_of_a_damaged_bundle_is_refused_with_the_file(command, bundles, tmp_path):
    """One flipped byte, exit code 1, the file named."""
    copy = Path(shutil.copytree(bundles("fp16")[0], tmp_path / "copy"))
    content = bytearray((copy / "model.fp16.onnx").read_bytes())
    content[1000] ^= 1
    (copy / "model.fp16.onnx").write_bytes(content)
    process = command("plan", str(copy))
    assert 1 == process.returncode
    assert f"bundle {copy}: model.fp16.onnx missing or not what the manifest" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--target", "nano"), "target nano is not supported: Jetson Nano and TX1 (sm53): "),
        (("--target", "orim"), "unknown target 'orim' (nearest: orin, orin-nx; known: compute "),
        (("--target", "t4"), "target sm75 cannot do int8: on Turing (sm75) the builder runs "),
        (("--target", "thor", "--dla", "0"), "target thor (sm110) has no DLA (with DLA: orin, "),
        (("--dla", "0"), "DLA needs a target that has one: orin, agx-orin, orin-nx, xavier, "),
        (("--backend", "tensort"), "unknown backend 'tensort' (nearest: tensorrt"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(command, arguments, sentence):
    """Exit code 2; for `plan` and `engine` alike."""
    # Without a target `engine` may run on the device itself, which then is what has the DLA or not.
    names = ("plan",) if arguments[0] == "--dla" else ("plan", "engine")
    for name in names:
        process = command(name, "A0", *arguments)
        assert 2 == process.returncode
        assert process.stderr.startswith(f"repvgg-export: {sentence}")
        assert 1 == process.stderr.count("\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--target", "orin-nx", "--dla", "0"),
            "a DLA needs a fixed batch, not 1:8:32",
        ),
        (
            ("--target", "orin-nx", "--dla", "0", "--batch", "1", "--dynamic-size", "64:96:128"),
            "a DLA needs a fixed image size, not 64:96:128",
        ),
        (
            ("--target", "orin-nx", "--dla", "2", "--batch", "1"),
            "target orin-nx (sm87) has DLA cores 0 to 1, no core 2",
        ),
        (
            ("--target", "sm86", "--quantization", "implicit"),
            "TensorRT-RTX cannot do this (quantization implicit: it takes INT8 from Q/DQ nodes "
            "only): use the backend tensorrt on the device, or leave it out",
        ),
        (
            ("--dla", "0"),
            "TensorRT-RTX cannot do this (dla: it builds for no DLA): use the backend tensorrt on "
            "the device, or leave it out",
        ),
    ],
)
def test_what_a_builder_cannot_obey_is_refused_before_the_work(capsys, arguments, sentence):
    """Also where the builder is a device that sees the bundle later: exit code 2, one sentence."""
    backend = ("--backend", "tensorrt-rtx") if "orin-nx" not in arguments else ()
    assert 2 == main(["engine", "A0", *arguments, *backend, "--quiet"])
    assert f"repvgg-export: {sentence}\n" == capsys.readouterr().err


@pytest.mark.parametrize("name", ["plan", "engine"])
def test_what_is_not_there_is_refused_all_at_once(name, capsys, tmp_path):
    """By `plan` and `engine` alike, before anything is loaded; exit code 2, nothing written."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter").write_text("dear")
    given = {
        "--calib": "nope", "--evaluation": "taken/letter", "--preprocess": "nope3",
        "--calibration-table": "taken", "--calibration-cache": "nope5", "--out": "taken",
    }  # fmt: skip
    words = [word for option, path in given.items() for word in (option, str(tmp_path / path))]
    assert 2 == main([name, "A0", *words, "--batch", "x", "--quiet"])
    assert (
        "repvgg-export: batch 'x' must be one number or min:opt:max, such as 1:8:32; "
        f"image folder {tmp_path}/nope does not exist; "
        f"image folder {tmp_path}/taken/letter is not a folder; "
        f"preprocess file {tmp_path}/nope3 does not exist or is no file; "
        f"calibration table {tmp_path}/taken does not exist or is no file; "
        f"calibration cache {tmp_path}/nope5 does not exist or is no file; "
        f"OUT {tmp_path}/taken exists and is no bundle; name a new folder or remove it first\n"
    ) == capsys.readouterr().err
    assert ["letter"] == [path.name for path in tmp_path.rglob("*") if path.is_file()]


def test_a_plan_may_replace_a_bundle_or_an_empty_folder(capsys, tmp_path):
    """As `engine` does; a file in the place of OUT is refused."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    for name in ("empty", "bundle", "new"):
        assert 0 == main(["plan", "A0", "--target", "orin", "--out", str(tmp_path / name)])
    (tmp_path / "file").write_text("")
    assert 2 == main(["plan", "A0", "--target", "orin", "--out", str(tmp_path / "file")])
    assert "file exists and is no bundle; name a new folder" in capsys.readouterr().err


def test_a_plan_of_no_classes_is_refused(capsys):
    """It would be one of 1000."""
    assert 2 == main(["plan", "A0", "--classes", "0", "--batch", "x"])
    assert (
        "repvgg-export: batch 'x' must be one number or min:opt:max, such as 1:8:32; "
        "classes must be at least 1, not 0\n"
    ) == capsys.readouterr().err


def test_an_int8_dla_engine_is_deferred_with_all_that_the_device_needs(command, exported, tmp_path):
    """No file to be named: the bundle records the DLA and has the scales for it."""
    out = tmp_path / "bundle"
    process = exported(
        "--target", "orin-nx", "--dla", "0", "--batch", "4", "--recipe", "minmax",
        "--calib-images", "16", "--min-sqnr", "1", "--min-agreement", "0", "--out", str(out),
    )  # fmt: skip
    assert 0 == process.returncode, process.stderr
    bundle = Bundle.load(out)
    assert {"dla": 0} == bundle.manifest["spec"]["build"]
    options = options_for(bundle)
    assert (0, None, "auto") == (
        options.dla.core, options.calibration_cache, options.quantization.value,
    )  # fmt: skip
    tensors = {t for node in onnx.load(out / "model.onnx").graph.node for t in node.input}
    assert parse_cache_text((out / "calibration.cache").read_text()).keys() <= tensors
    again = planned(command, str(out))
    assert 0 == again["dla_core"]
    assert "--useDLACore=0" in again["commands"][1]["line"]
    lines = json.loads((out / "engine.json").read_text())["commands"]
    assert (
        "trtexec --onnx=model.onnx --saveEngine=trtexec.engine --int8 --fp16 "
        "--calib=calibration.cache --useDLACore=0 --allowGPUFallback "
        "--minShapes=images:4x3x64x64 --optShapes=images:4x3x64x64 --maxShapes=images:4x3x64x64"
    ) == lines["10.3"]


def test_an_engine_for_the_device_is_deferred_and_all_else_is_there(deferred):
    """Exit code 0 and every file but engine and build log."""
    out, process = deferred
    assert 0 == process.returncode, process.stderr
    assert EVIDENCE | {"model.fp16.onnx"} == {path.name for path in out.iterdir()}
    assert () == Bundle.load(out).damaged_files()
    assert ["sm87"] == json.loads((out / "manifest.json").read_text())["targets"]


def test_engine_json_of_a_deferred_bundle_says_why_and_how(deferred):
    """Status, reason, this project's command, and the line for every JetPack."""
    out, _ = deferred
    engine = json.loads((out / "engine.json").read_text())
    assert ("deferred", ["sm87"], ["orin-nano"], REASON, "repvgg-export build BUNDLE") == tuple(
        engine[key] for key in ("status", "targets", "devices", "reason", "build_with")
    )
    assert ["10.16", "10.3", "8.6", "8.5"] == list(engine["commands"])


def test_inspect_says_what_a_deferred_bundle_waits_for(deferred, command):
    """In a table and a sentence for people."""
    out, _ = deferred
    process = command("inspect", str(out))
    assert (0, "") == (process.returncode, process.stderr)
    assert (
        f"note: the engine for orin-nano is deferred: {REASON}; on the device: repvgg-export build "
        "BUNDLE\n"
    ) in process.stdout
    assert "status deferred" in process.stdout


def test_the_ledger_of_a_deferred_bundle_keeps_the_engine_not_run(deferred):
    """It never counts as passed, and the reason is that it is deferred."""
    out, _ = deferred
    parity = json.loads((out / "parity.json").read_text())
    row = parity["stages"][-1]
    assert ("engine", "not_run", f"the engine is deferred: {REASON}") == (
        row["stage"], row["status"], row["reason"],
    )  # fmt: skip
    assert ("pass", ["engine"]) == (parity["verdict"], parity["not_run"])


def test_the_user_is_told_that_there_is_no_engine_yet(deferred):
    """A note, in the manifest too; the closing line; the table of files; the report."""
    out, process = deferred
    note = "no engine for orin-nano (sm87) yet; on the device: repvgg-export build BUNDLE"
    assert f"note: {note}\n" in process.stderr
    assert note in json.loads((out / "manifest.json").read_text())["notes"]
    assert f"\n{out}: no engine yet for sm87; " in process.stdout
    (row,) = (line for line in process.stdout.splitlines() if line.startswith("│ engine.json "))
    assert "why there is no engine, and how to build it" == row.split("│")[3].strip()
    page = (out / "report.html").read_text()
    assert f"No engine for sm87 yet: {REASON}." in page
    assert "trtexec --onnx=model.fp16.onnx" in page


def test_a_deferred_bundle_runs_and_verifies(deferred, command):
    """The graph computes the recorded outputs; `verify` passes what it can run."""
    out, _ = deferred
    bundle = Bundle.load(out)
    images, logits = bundle.reference()
    np.testing.assert_allclose(bundle.run(images), logits, atol=0.05)
    process = command("verify", str(out), "--json")
    assert 0 == process.returncode, process.stderr
    assert "not_run" == json.loads(process.stdout)["parity"]["stages"][-1]["status"]


def test_targets_built_here_get_their_engine_beside_deferred_ones(exported, deferred, tmp_path):
    """One bundle: an engine for sm86, and under `deferred` what waits for the Orin."""
    out = tmp_path / "bundle"
    # All but the engine is what the deferred bundle was made from.
    process = exported(
        "--precision", "fp16", "--target", "rtx3060,orin-nano", "--out", str(out), "--json"
    )
    assert 0 == process.returncode, process.stderr
    engine = json.loads((out / "engine.json").read_text())
    assert (["sm86"], ["sm87"]) == (engine["targets"], engine["deferred"]["targets"])
    assert ("built", "deferred") == (engine["status"], engine["deferred"]["status"])
    assert REASON == engine["deferred"]["reason"]
    assert b"vtrt" == (out / "model.engine").read_bytes()[:4]
    assert "No engine for sm87 yet" in (out / "report.html").read_text()
    assert ["sm86"] == json.loads((out / "manifest.json").read_text())["targets"]


def test_the_shapes_of_the_commands_are_inputs_of_the_graph(deferred):
    """trtexec refuses a shape for an input that the graph has not."""
    out, _ = deferred
    graph = onnx.load(out / "model.fp16.onnx", load_external_data=False).graph
    (line, *_) = json.loads((out / "engine.json").read_text())["commands"].values()
    assert f"--optShapes={graph.input[0].name}:8x3x64x64" in line
    assert "batch" == graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_a_reader_that_leaves_early_is_no_failure():
    """`plan ... | head -1`: no message, exit 0."""
    words = [sys.executable, "-m", "exporter", "plan", "A0", "--target", "orin"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (b"", 0) == (process.stderr.read(), process.wait(60))
    process.stderr.close()
