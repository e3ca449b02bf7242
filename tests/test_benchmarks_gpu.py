"""The bookkeeping of `make gpu-test`. The commands are fakes: nothing here ran on a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exporter.cli import build_parser
from exporter.engine.driver import driver_lack

ROOT = Path(__file__).resolve().parents[1]
RTX = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
WORK, DATA = Path("work"), Path("data")


@pytest.fixture(scope="module")
def gpu_test() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        yield import_module("gpu_test")


class Device:
    """Answers commands as a machine would on which everything runs; ``odd`` overrides that.

    ``odd`` maps the beginning of a command to the exit code and what is printed.
    """

    def __init__(self, gpu_test: ModuleType, **odd: tuple[int, Any]) -> None:
        self.module = gpu_test
        self.odd = {name.replace("_", " "): answer for name, answer in odd.items()}
        self.commands: list[str] = []
        self.warm: set[str] = set()

    def __call__(self, arguments: Sequence[str]) -> Any:
        assert "--json" == arguments[-1]
        build_parser().parse_args(arguments)
        line = " ".join(arguments)
        self.commands.append(line)
        code, printed = 0, self.usual(arguments)
        for words, answer in self.odd.items():
            if all(word in arguments or word == line.split()[0] for word in words.split()):
                code, printed = answer
        stdout = "" if code else json.dumps(printed)
        stderr = f"progress\nrepvgg-export: {printed}\n" if code else ""
        return self.module.Finished(exit_code=code, stdout=stdout, stderr=stderr, seconds=1.5)

    def usual(self, arguments: Sequence[str]) -> dict[str, Any]:
        command, bundle = arguments[:2]
        if command == "benchmark" and "--compare" not in arguments:
            state = "warm" if bundle in self.warm else "cold"
            self.warm.add(bundle)
            off = "--no-runtime-cache" in arguments
            return {
                "runtime_cache": "off" if off else state, "library": "rtx", "note": None,
                "load_ms": 1.0,
            }  # fmt: skip
        return {
            "engine": {"engine": {"status": "built"}, "verdict": "pass"},
            "build": {"engine": {"status": "built"}},
            "inspect": {"kind": "bundle"},
            "verify": {"parity": {"stages": [{"stage": "engine", "status": "pass"}]}},
            "evaluate": {"top1": 0.98, "images": 360},
            "benchmark": {"ratios": [{"batch": 1, "median": 0.8}]},
        }[command]


@pytest.fixture
def outcomes(gpu_test: ModuleType) -> Callable[..., dict[str, Any]]:
    """``outcomes("sm86", benchmark___cuda_graph=(3, "no"))`` -> outcome by step, in order."""

    def run(target: str, precisions: Sequence[str] = ("fp16", "int8"), **odd: Any) -> Any:
        machine = gpu_test.Machine(target=target, rtx_targets=RTX)
        todo = gpu_test.steps(machine, WORK, DATA, precisions=precisions, seconds=0.5)
        assert len(todo) == len({step.name for step in todo})
        device = Device(gpu_test, **odd)
        found = {o.step.name: o for o in gpu_test.run_steps(todo, device)}
        found["document"] = gpu_test.document(list(found.values()), {"device": {"name": "D"}})
        found["commands"] = device.commands
        return found

    return run


def test_everything_runs_in_order_on_a_gpu_that_rtx_knows(outcomes):
    """Each command is one that the command line takes; the file says what each one gave."""
    found = outcomes("sm86")
    document = found["document"]
    assert document["passed"] is True
    passed = {k: v for k, v in document["counts"].items() if v}
    assert {"passed": len(document["steps"])} == passed
    assert (
        "engine A0 --precision fp16 --target sm86 --out work/A0-fp16 --json"
        == (found["commands"][0])
    )
    first = document["steps"][0]
    assert (
        "repvgg-export engine A0 --precision fp16 --target sm86 --out work/A0-fp16 --json",
        "passed", None, 0, 1.5, True, {"engine": {"status": "built"}, "verdict": "pass"},
    ) == tuple(
        first[key]
        for key in ("command", "status", "reason", "exit_code", "seconds", "applies", "result")
    )  # fmt: skip
    assert {"ratios": [{"batch": 1, "median": 0.8}]} == found["int8 / fp16 --cuda-graph"].result
    assert "D" == document["device"]["name"]
    assert document == json.loads(json.dumps(document))


def test_a_failing_step_ends_only_what_needs_it(outcomes):
    """Its own sentence is kept; the other precision goes on; the whole has not passed."""
    found = outcomes("sm86", **{"build work/A0-int8": (1, "no gate")})
    build = found["build int8"]
    assert ("failed", "repvgg-export: no gate", 1) == (
        build.status.value, build.reason, build.exit_code,
    )  # fmt: skip
    skipped = [name for name, o in found.items() if getattr(o, "status", None) == "skipped"]
    assert [
        "cold start int8", "warm start int8", "no runtime cache int8", "CUDA graph int8",
        "verify int8", "evaluate int8", "int8 / fp16", "int8 / fp16 --cuda-graph",
    ] == skipped  # fmt: skip
    assert "these did not pass: build int8" == found["verify int8"].reason
    assert "passed" == found["verify fp16"].status.value == found["inspect int8"].status.value
    assert found["document"]["passed"] is False


def test_what_the_machine_lacks_is_told_in_its_own_words(outcomes):
    """Exit code 3 is no pass; the sentence of --json comes first."""
    words = "CUDA graphs need cuda-python"
    found = outcomes("sm86", ("fp16",), **{"benchmark --cuda-graph": (3, words)})
    graph = found["CUDA graph fp16"]
    assert ("lacking", f"repvgg-export: {words}") == (graph.status.value, graph.reason)
    assert found["document"]["passed"] is False


@pytest.mark.parametrize(
    ("step", "odd", "status", "reason"),
    [
        (
            "verify fp16",
            {"verify work/A0-fp16": {"stage": "engine", "status": "not_run", "reason": "sm90"}},
            "lacking",
            "sm90",
        ),
        (
            "verify fp16",
            {"verify work/A0-fp16": {"stage": "engine", "status": "fail", "reason": "far off"}},
            "failed",
            "far off",
        ),
        (
            "evaluate fp16",
            {"evaluate engine": {"top1": 0.5}},
            "failed",
            "top-1 is 50.00 %, ONNX Runtime's 98.00 %",
        ),
        (
            "warm start fp16",
            {"benchmark engine": {"runtime_cache": "cold", "library": "r", "note": "ignored"}},
            "failed",
            "the start was cold, not warm: ignored",
        ),
        (
            "cold start fp16",
            {"benchmark engine": {"runtime_cache": None, "library": "trt 10"}},
            "not applicable",
            "trt 10 has no runtime cache",
        ),
        (
            "export portable fp16",
            {"engine tensorrt-rtx": {"engine": {"status": "deferred", "reason": "needs full"}}},
            "lacking",
            "deferred: needs full",
        ),
        (
            "verify fp16",
            {"verify work/A0-fp16": None},
            "failed",
            "its result lacks what was to be judged: KeyError('parity')",
        ),
        ("build fp16", {"build": []}, "failed", "it ended with 0 and printed no JSON object"),
    ],
)
def test_a_result_must_hold_what_the_step_is_about(outcomes, step, odd, status, reason):
    """Exit code 0 alone passes nothing that ran elsewhere, colder or worse."""
    ((words, printed),) = odd.items()
    if words.startswith("verify"):
        printed = {"parity": {"stages": [printed]}} if printed else {"no": "ledger"}
    found = outcomes("sm86", ("fp16",), **{words: (0, printed)})
    assert (status, reason) == (found[step].status.value, found[step].reason)
    assert found["document"]["passed"] is found[step].is_fine is (status == "not applicable")


def test_full_tensorrt_without_a_runtime_cache_passes(outcomes):
    """What the library does not have is not asked of it, nor TensorRT-RTX on a Jetson."""
    answer = {"runtime_cache": None, "library": "trt", "note": None, "ratios": []}
    odd = {"benchmark engine": (0, answer), "engine tensorrt-rtx": (3, "not installed")}
    found = outcomes("sm87", **odd)
    states = {name: o.status.value for name, o in found.items() if hasattr(o, "status")}
    assert "not applicable" == states["cold start fp16"] == states["no runtime cache int8"]
    assert "not applicable" == states["warm start fp16"]
    assert ("lacking", "skipped") == (
        states["export portable fp16"], states["verify portable fp16"],
    )  # fmt: skip
    assert found["document"]["passed"] is True


def test_on_a_gpu_that_rtx_does_not_know_its_words_are_recorded(outcomes):
    """Hopper: the portable plan is tried all the same; without full TensorRT nothing passes."""
    words = "target sm90 (Hopper: h100, h200) needs full TensorRT, run on the device itself"
    row = {"stage": "engine", "status": "not_run", "reason": "it does not load"}
    found = outcomes("sm90", build=(2, words), verify=(0, {"parity": {"stages": [row]}}))
    assert ("failed", f"repvgg-export: {words}", 2) == (
        found["build fp16"].status.value, found["build fp16"].reason,
        found["build fp16"].exit_code,
    )  # fmt: skip
    portable = found["verify portable fp16"]
    assert ("lacking", "it does not load", False) == (
        portable.status.value, portable.reason, portable.step.applies,
    )  # fmt: skip
    assert found["document"]["passed"] is False


def test_int8_on_turing_is_tried_and_does_not_count(outcomes):
    """It is refused there with the reason, which is recorded; the rest passes."""
    found = outcomes("sm75", **{"engine int8": (2, "target sm75 cannot do int8")})
    export = found["export int8"]
    assert ("failed", False) == (export.status.value, export.step.applies)
    assert "passed" == found["verify portable fp16"].status.value
    assert found["document"]["passed"] is True
    assert found["document"]["counts"]["failed"] == 3


@pytest.mark.skipif(driver_lack() is None, reason="this machine has a GPU")
def test_without_a_driver_nothing_is_run_or_written(tmp_path: Path):
    """Exit code 3 and one sentence."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_test.py", "--out", tmp_path / "found.json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert (3, "") == (done.returncode, done.stdout)
    assert f"gpu-test: {driver_lack()}; nothing was run or written\n" == done.stderr
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(("odd", "code"), [({}, 0), ({"build": (1, "no")}, 1)])
def test_the_exit_code_is_that_of_all_steps(gpu_test, monkeypatch, tmp_path, capsys, *, odd, code):
    """0 only if all that apply passed; the file is written either way, and each step is told."""
    monkeypatch.setattr(gpu_test, "driver_lack", lambda: None)
    monkeypatch.setattr(gpu_test, "device_target", lambda: "sm89")
    monkeypatch.setattr(gpu_test, "command_runner", lambda _work: Device(gpu_test, **odd))
    out = tmp_path / "found.json"
    assert code == gpu_test.main(["--out", str(out)])
    found = json.loads(out.read_text())
    assert {"created", "passed", "counts", "device", "system", "versions", "steps"} == set(found)
    assert (code == 0) is found["passed"]
    lines = capsys.readouterr().out.splitlines()
    assert len(found["steps"]) + 1 == len(lines)
    assert "export fp16: passed" == lines[0]


def test_a_command_of_the_runner_is_a_real_process(gpu_test: ModuleType, tmp_path: Path):
    """Its exit code, words and time come back, and its caches lie in the run's own folder."""
    done = gpu_test.command_runner(tmp_path)(["verify", str(tmp_path / "absent"), "--json"])
    assert (2, True) == (done.exit_code, done.seconds > 0)
    assert done.stderr.startswith("repvgg-export: ")
    assert 2 == json.loads(done.stdout)["exit_code"]
