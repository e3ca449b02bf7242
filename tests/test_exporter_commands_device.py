"""What the device half's commands refuse: exit code and sentence, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import minisign
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter import bundle as files
from exporter import verify
from exporter.bundle.writer import BundleWriter
from exporter.cli import main
from exporter.device import runners
from exporter.device.accuracy import Evaluation
from exporter.device.kernel_cache import CacheState, Startup
from exporter.engine import driver
from exporter.errors import EnvironmentLackError
from exporter.profiles import BatchProfile

NO_DRIVER = "no NVIDIA driver on this machine (libcuda.so.1 does not load)"
Refused = Callable[[Sequence[str]], tuple[int, str]]


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "driver_lack", lambda: NO_DRIVER)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """The exit code and the one line of a command that fails, without its prefix."""

    def run(arguments: Sequence[str]) -> tuple[int, str]:
        code = main(arguments)
        printed = capsys.readouterr().err.splitlines()
        assert printed[-1].startswith("repvgg-export: ")
        return code, printed[-1].removeprefix("repvgg-export: ")

    return run


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one ReLU, whose recorded outputs are its own."""
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 4])
        for name in ("images", "logits")
    ]
    node = helper.make_node("Relu", ["images"], ["logits"])
    graph = helper.make_graph([node], "relu", ports[:1], ports[1:])
    images = np.random.default_rng(0).normal(size=(4, 3, 4, 4)).astype(np.float32)
    gate = {"min_sqnr_db": 20.0}
    rows = [{"stage": "simplified", "reference": "original", "status": "pass", "tolerance": gate}]
    with BundleWriter(tmp_path / "bundle") as writer:
        opset = [helper.make_opsetid("", 17)]
        onnx.save(
            helper.make_model(graph, opset_imports=opset, ir_version=8), writer.path(files.MODEL)
        )
        np.savez(writer.path(files.REFERENCE), images=images, logits=np.maximum(images, 0))
        writer.write_text(files.PARITY, files.dumps({"stages": rows}))
        return writer.publish(
            {
                "model": {"num_classes": None},
                "preprocess": {"image_size": [4, 4]},
                "spec": {"precision": "fp32", "batch": "1:2:4"},
            }
        ).path


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("build", "--dla", "-1"), 2, "DLA core must be 0 or more, not -1"),
        (("build", "--optimization-level", "9"), 2, "optimization level must be 0 to 5, not 9"),
        (
            ("build", "--target", "sm86", "--backend", "tensort"),
            2,
            "unknown backend 'tensort' (nearest: tensorrt; known: auto, tensorrt-rtx, tensorrt)",
        ),
        (
            ("build", "--backend", "tensorrt-rtx", "--target", "orin"),
            2,
            "target sm87 (Ampere: orin, agx-orin, orin-nx, orin-nano) needs full TensorRT, run on "
            "the device itself; tensorrt-rtx builds for sm80, sm86, sm89, sm120, sm121",
        ),
        (
            ("build", "--backend", "tensorrt-rtx"),
            3,
            f"there is no GPU to build the engine for: {NO_DRIVER}; run this on the device, or "
            "name one with --target, such as sm86",
        ),
        (("evaluate",), 2, "evaluate needs a bundle and --data DIR, or --merge FILE ..."),
        (
            ("evaluate", "--merge", "x"),
            2,
            "--merge reads finished evaluations; leave out BUNDLE, --data and --shard",
        ),
        (
            ("evaluate", "--data", ".", "--shard", "3/2"),
            2,
            "shard 3/2 must be part/parts with 1 <= part <= parts",
        ),
        (
            ("evaluate", "--data", ".", "--shard", "half"),
            2,
            "shard 'half' must be part/parts, such as 2/4",
        ),
        (
            ("evaluate", "--data", ".", "--threads", "-1"),
            2,
            "threads must be at least 0 (all cores), not -1",
        ),
        (
            ("evaluate", "--data", ".", "--backend", "gpu"),
            2,
            "unknown backend 'gpu' (known: auto, engine, onnxruntime)",
        ),
        (
            ("benchmark", "--batch", "1,x"),
            2,
            "batch '1,x' must be numbers of at least 1, such as 1,8,32",
        ),
        (
            ("benchmark", "--batch", "0"),
            2,
            "batch '0' must be numbers of at least 1, such as 1,8,32",
        ),
        (
            ("benchmark", "--batch", "5", "--backend", "onnxruntime"),
            2,
            "batch 5 is outside the bundle's profile 1:2:4",
        ),
        (("benchmark", "--seconds", "-1"), 2, "seconds must be a number of at least 0, not -1"),
        (("benchmark", "--seconds", "nan"), 2, "seconds must be a number of at least 0, not nan"),
        (("benchmark", "--warmup", "-1"), 2, "warmup must be at least 0 runs, not -1"),
        (
            ("benchmark", "--cuda-graph", "--backend", "onnxruntime"),
            2,
            "CUDA graphs belong to the engine, not to ONNX Runtime",
        ),
        (
            ("benchmark", "--backend", "engine"),
            3,
            "bundle {bundle} holds no engine yet; `repvgg-export build` makes one on the device",
        ),
    ],
)
def test_a_refusal_has_its_exit_code_and_sentence(
    refused: Refused, bundle: Path, arguments: tuple[str, ...], code: int, sentence: str
):
    """Usage is 2, what the machine lacks is 3; the bundle stays as it was."""
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    command, *options = arguments
    own = [] if arguments == ("evaluate",) else [str(bundle)]
    merged = "--merge" in arguments
    line = [command, *options, *(["--shard", "1/2"] if merged else own)]
    assert (code, sentence.format(bundle=bundle)) == refused(line)
    assert before == {path.name: path.read_bytes() for path in bundle.iterdir()}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An engine that computes the ReLU and starts warm; the list is told whether it may cache."""
    told: list[bool] = []

    def opened(_bundle, _stack, *, cuda_graph: bool, runtime_cache: bool) -> runners.BundleRunner:
        told.append(runtime_cache)
        return runners.BundleRunner(
            backend=runners.RunBackend.ENGINE,
            library="fake engine",
            run=lambda batch: {"logits": np.maximum(batch[0], 0)},
            batch=BatchProfile(1, 2, 4),
            prepare=lambda _batch: lambda: None,
            startup=Startup(
                load_ms=3.0, first_run_ms=4.0, cache=CacheState.WARM, cold_load_ms=50.0,
                cold_first_run_ms=60.0, notes=["the cache was damaged"],
            ),
        )  # fmt: skip

    monkeypatch.setattr(runners, "_engine", opened)
    return told


@pytest.mark.parametrize(
    "command", [("verify",), ("benchmark", "--seconds", "0")], ids=lambda words: words[0]
)
def test_the_runtime_cache_is_used_unless_it_is_left_out(bundle: Path, engine, capsys, command):
    """What is wrong with it is a note on standard error, and no note when quiet."""
    words = [*command, str(bundle)]
    assert 0 == main(words)
    assert "note: the cache was damaged\n" == capsys.readouterr().err
    assert 0 == main([*words, "--no-runtime-cache", "--quiet"])
    assert "" == capsys.readouterr().err
    assert [True, False] == engine


def test_benchmark_tells_what_a_cold_and_a_warm_start_take(bundle: Path, engine, capsys):
    """In the JSON object and below the table."""
    arguments = ["benchmark", str(bundle), "--seconds", "0"]
    assert 0 == main([*arguments, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (3.0, 4.0, "warm", 50.0, 60.0, "the cache was damaged") == tuple(
        found[key]
        for key in (
            "load_ms", "first_run_ms", "runtime_cache", "cold_load_ms", "cold_first_run_ms", "note",
        )
    )  # fmt: skip
    assert 0 == main(arguments)
    words = " ".join(capsys.readouterr().out.split())
    for part in ("loaded in 3.0 ms", "first run 4.0 ms", "runtime cache warm", "cold: 50.0 ms and"):
        assert part in words
    assert 0 == main([*arguments, "--backend", "onnxruntime", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (None, None, None) == (found["runtime_cache"], found["first_run_ms"], found["note"])
    assert found["load_ms"] > 0


COUNTED = Evaluation(
    bundle="b", bundle_sha256="0", precision="int8", backend="engine", library="l", data="d",
    class_names=("a", "b"), confusion={(0, 0): 1}, top5_correct=1,
).to_json()  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "'class_names'"),
        ("3", "'int' object is not subscriptable"),
        (json.dumps({**COUNTED, "class_names": ["a"], "confusion": [[0, 1, 1]]}), None),
        (json.dumps({**COUNTED, "confusion": []}), "it counts no images"),
        (json.dumps({**COUNTED, "confusion": [[0, 0, 0]]}), "it counts no images"),
        (
            json.dumps({**COUNTED, "shards": ["x"]}),
            "shard 'x' must be part/parts, such as 2/4",
        ),
    ],
)
def test_what_is_no_evaluation_is_not_merged(refused: Refused, tmp_path: Path, content, words):
    """The file is named with the reason; exit code 2."""
    path = tmp_path / "part.json"
    path.write_text(content)
    words = words or "a counted class has no name"
    sentence = f"{path} is not what `evaluate --json` prints: {words}"
    assert (2, sentence) == refused(["evaluate", "--merge", str(path)])


def test_an_absent_evaluation_is_named(refused: Refused, tmp_path: Path):
    """Exit code 2."""
    path = tmp_path / "absent.json"
    sentence = f"evaluation {path} cannot be read: No such file or directory"
    assert (2, sentence) == refused(["evaluate", "--merge", str(path)])


def test_a_stage_that_fails_is_the_first_named(refused: Refused, bundle: Path, monkeypatch):
    """`verify` prints the ledger and ends with 1."""
    monkeypatch.setattr(
        "exporter.verify.OnnxRunner.run", lambda _self, batch: {"logits": np.zeros_like(batch[0])}
    )
    code, sentence = refused(["verify", str(bundle)])
    assert 1 == code
    assert sentence == f"bundle {bundle}: stage simplified: SQNR is 0.0 dB, required 20 dB"


def test_a_stage_that_fails_is_one_object_for_programs(bundle: Path, monkeypatch, capsys):
    """What is wrong stands beside what was measured, and on standard error."""
    monkeypatch.setattr(
        "exporter.verify.OnnxRunner.run", lambda _self, batch: {"logits": np.zeros_like(batch[0])}
    )
    assert 1 == main(["verify", str(bundle), "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    sentence = f"bundle {bundle}: stage simplified: SQNR is 0.0 dB, required 20 dB"
    assert (sentence, 1) == (found["error"], found["exit_code"])
    assert "fail" == found["parity"]["verdict"]
    assert f"repvgg-export: {sentence}\n" == printed.err


def test_an_engine_that_must_run_and_does_not_is_a_lack(refused: Refused, bundle: Path, capsys):
    """Exit code 3 with the reason of its row, after the table; without the option that is 0."""
    assert 0 == main(["verify", str(bundle)])
    sentence = (
        f"bundle {bundle}: the engine was not run, which --require-engine demands: bundle {bundle} "
        "holds no engine yet; `repvgg-export build` makes one on the device"
    )
    assert (3, sentence) == refused(["verify", str(bundle), "--require-engine"])
    assert 3 == main(["verify", str(bundle), "--require-engine", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (sentence, 3) == (found["error"], found["exit_code"])
    assert "not_run" == found["parity"]["stages"][-1]["status"]


@pytest.mark.usefixtures("engine")
def test_an_engine_that_must_run_and_does_is_all_that_was_demanded(bundle: Path):
    assert 0 == main(["verify", str(bundle), "--require-engine"])


def test_a_failed_stage_comes_before_an_engine_that_did_not_run(
    refused: Refused, bundle: Path, monkeypatch
):
    """Another machine would not make it good: exit code 1."""
    monkeypatch.setattr(
        "exporter.verify.OnnxRunner.run", lambda _self, batch: {"logits": np.zeros_like(batch[0])}
    )
    code, sentence = refused(["verify", str(bundle), "--require-engine"])
    assert 1 == code
    assert "stage simplified" in sentence


def test_a_machine_that_runs_nothing_verifies_nothing(refused: Refused, bundle: Path, monkeypatch):
    """Intact files alone are no verdict: exit code 3, each reason once."""

    def missing(*_: object, **__: object) -> object:
        raise EnvironmentLackError("onnxruntime is not installed")

    monkeypatch.setattr(verify, "OnnxRunner", missing)
    monkeypatch.setattr(runners, "_onnxruntime", missing)
    assert (
        3,
        f"bundle {bundle}: its files are intact, but nothing can be run here: onnxruntime is not "
        f"installed; bundle {bundle} holds no engine yet; `repvgg-export build` makes one on the "
        "device",
    ) == refused(["verify", str(bundle)])


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify",), ("build", "--target", "sm86"), ("benchmark", "--backend", "onnxruntime"),
        ("evaluate", "--data", "."),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_by_every_command(refused: Refused, bundle: Path, arguments):
    """Exit code 1, before anything is run."""
    (bundle / files.MODEL).write_bytes(b"")
    command, *options = arguments
    assert (
        1,
        f"bundle {bundle}: model.onnx missing or not what the manifest says",
    ) == refused([command, str(bundle), *options])


def test_a_build_tells_which_files_are_still_those_of_the_export(bundle: Path, monkeypatch, capsys):
    """They say that the engine did not run; no note when quiet."""

    def build(opened: files.Bundle, **_: object) -> files.Bundle:
        (opened.path / files.ENGINE_SUMMARY).write_text('{"warnings": []}')
        return opened

    monkeypatch.setattr("exporter.device.build_engine", build)
    assert 0 == main(["build", str(bundle), "--json"])
    assert (
        "note: report.html, parity.json and junit.xml are still those of the export; "
        "`repvgg-export verify` judges the new engine\n"
    ) == capsys.readouterr().err
    assert 0 == main(["build", str(bundle), "--json", "--quiet"])
    assert "" == capsys.readouterr().err


def test_verify_says_what_it_knows_of_the_signature(bundle: Path, tmp_path: Path, capsys):
    """None, there but not checked, checked; in words and for programs."""
    pair = minisign.KeyPair.generate()
    key, public = tmp_path / "my.key", tmp_path / "my.pub"
    key.write_bytes(bytes(pair.secret_key))
    public.write_bytes(bytes(pair.public_key))

    def verified(*options: str) -> tuple[str, dict[str, str | None]]:
        assert 0 == main(["verify", str(bundle), *options])
        words = " ".join(capsys.readouterr().out.split())
        assert 0 == main(["verify", str(bundle), *options, "--json"])
        return words, json.loads(capsys.readouterr().out)["signature"]

    words, state = verified()
    assert ("none", False) == (state["status"], "sign" in words)
    assert 0 == main(["sign", str(bundle), "--key", str(key)])
    assert (
        f"{bundle}: signed, manifest.json.minisig and SHA256SUMS.minisig\n"
        == capsys.readouterr().out
    )
    words, state = verified()
    assert "not_checked" == state["status"]
    assert "signed, not checked (pass --public-key)" in words
    words, state = verified("--public-key", str(public))
    assert "valid" == state["status"]
    assert str(state["trusted_comment"]).endswith("\tfile:manifest.json\thashed")
    assert "files intact; signature valid" in words
    assert 0 == main(["sign", str(bundle), "--key", str(key), "--json"])
    assert ["manifest.json.minisig", "SHA256SUMS.minisig"] == json.loads(capsys.readouterr().out)[
        "signatures"
    ]
