"""The exact words of what the engine room refuses, beside the tests of what it does.

Inside the building process a refusal is a BadInputError or a RefusedError; `worker_process` makes
exit codes 2 and 1 of them, as the last tests here show.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from exporter.engine import (
    BuildOptions,
    BuildRequest,
    ConvolutionCounts,
    Dla,
    EngineSummary,
    TargetFigures,
    check_engine,
    get_backend,
    network_parser,
    parse_targets,
    plan_header,
)
from exporter.engine.builder_config import write_timing_cache
from exporter.engine.callbacks import make_logger
from exporter.engine.capabilities import Api, Capability, needs, probe
from exporter.engine.installation import require_buildable
from exporter.engine.profile_shapes import profile_shapes
from exporter.engine.refusal import BadInputError, RefusedError
from exporter.engine.worker import ProgressPrinter, build
from exporter.engine.worker_process import run_worker
from exporter.errors import EnvironmentLackError, ExporterError, GateFailedError, InputError
from exporter.plan.engine import MissingBackend, decide_engine
from exporter.profiles import BatchProfile, SizeProfile
from exporter.spec import Precision

FOLDER = Path(__file__).parent / "tensorrt_api"


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"tensorrt_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


surface = _module("surface")
recording_fake = _module("recording_fake")

REQUEST = BuildRequest(
    onnx_path=Path("typed.onnx"),
    precision=Precision.FP16,
    targets=("sm86",),
    batch=BatchProfile(1, 8, 32),
)
OLD, RTX = "tensorrt-8.6.1", "tensorrt_rtx-1.7.1"


def built(release: str, request: BuildRequest, **answers) -> None:
    """Build on the fake of a release, as the worker does."""
    fake = recording_fake.RecordingTensorRt(surface.Surface.load(release), **answers)
    api = probe(fake)
    printer = ProgressPrinter(io.StringIO())
    build(api, release.partition("-")[0], make_logger(api, io.StringIO()), printer, request)


def with_options(**options) -> BuildRequest:
    return replace(REQUEST, options=BuildOptions(**options))


@pytest.mark.parametrize(
    ("release", "request_", "answers", "error", "sentence"),
    [
        (
            RTX,
            REQUEST,
            {"IBuilderConfig.set_compute_capability": False},
            BadInputError,
            "tensorrt_rtx 1.7.1.116 cannot build for sm86",
        ),
        (
            OLD,
            with_options(dla=Dla(core=2)),
            {},
            BadInputError,
            "no DLA core 2 on this machine, it has 2",
        ),
        (
            OLD,
            REQUEST,
            {"IBuilderConfig.add_optimization_profile": -1},
            RefusedError,
            "the builder rejects the profile batch 1:8:32",
        ),
        (
            OLD,
            replace(REQUEST, size=SizeProfile.parse("64:96:128")),
            {"IBuilderConfig.add_optimization_profile": -1},
            RefusedError,
            "the builder rejects the profile batch 1:8:32, size 64:96:128",
        ),
        (
            OLD,
            REQUEST,
            {"Runtime.deserialize_cuda_engine": lambda _fake: None},
            RefusedError,
            "the finished plan does not load on this device",
        ),
    ],
)
def test_what_the_library_refuses_is_said(release, request_, answers, error, sentence: str):
    """Each call that says no has its sentence."""
    with pytest.raises(error) as caught:
        built(release, request_, **answers)
    assert sentence == str(caught.value)


def test_a_builder_without_words_refuses_without_words():
    """What it said stands in the log; the parent reads it there."""
    with pytest.raises(RefusedError) as caught:
        built(OLD, REQUEST, **{"Builder.build_serialized_network": lambda _fake: None})
    assert () == caught.value.args


@pytest.mark.parametrize(
    ("capabilities", "words", "sentence"),
    [
        (
            {Capability.PARSER_NODES},
            {"node_name": "conv1", "node_operator": "Conv"},
            "conv1 (Conv): no such type",
        ),
        (
            {Capability.PARSER_NODES},
            {"node_name": "", "node_operator": ""},
            "model (ONNX): no such type",
        ),
        (set(), {"node": 3}, "node 3 (ONNX): no such type"),
        (set(), {"node": -1}, "model (ONNX): no such type"),
    ],
)
def test_a_parsers_words_come_with_the_node(capabilities, words, sentence: str):
    """One sentence for each error, with what the release tells of the node."""
    told = {
        key: lambda value=value: value for key, value in {**words, "desc": "no such type"}.items()
    }
    parser = SimpleNamespace(
        parse_from_file=lambda _path: False,
        num_errors=2,
        get_error=lambda _index: SimpleNamespace(**told),
    )
    trt = SimpleNamespace(OnnxParser=lambda _network, _logger: parser)
    api = Api(trt=trt, capabilities=frozenset(capabilities))
    with pytest.raises(RefusedError) as caught:
        network_parser.parse(api, None, None, Path("model.onnx"))
    assert (sentence, sentence) == caught.value.args


def test_a_timing_cache_that_cannot_be_used_is_named(tmp_path: Path):
    """Reading it and writing it back."""
    with pytest.raises(BadInputError) as caught:
        built(OLD, with_options(timing_cache=tmp_path))
    assert str(caught.value) == (
        f"timing cache {tmp_path} cannot be read: [Errno 21] Is a directory: '{tmp_path}'"
    )
    cache = SimpleNamespace(serialize=lambda: b"timings")
    config = SimpleNamespace(get_timing_cache=lambda: cache)
    path = tmp_path / "absent" / "timings"
    with pytest.raises(BadInputError) as caught:
        write_timing_cache(config, path)
    assert str(caught.value) == (
        f"timing cache {path} cannot be written: [Errno 2] No such file or directory: "
        f"'{path}.partial'"
    )


def test_a_marked_function_does_not_run_without_its_capability():
    """A programming error, named with what is lacking."""

    @needs(Capability.CALIBRATOR, Capability.RUNTIME_CACHE)
    def marked(_api: Api) -> None: ...

    with pytest.raises(RuntimeError) as caught:
        marked(Api(trt=None, capabilities=frozenset({Capability.CALIBRATOR})))
    assert "marked called on a TensorRT without RUNTIME_CACHE" == str(caught.value)


@pytest.mark.parametrize(
    ("shape", "request_", "sentence"),
    [
        (
            (2, 3, 64, 64),
            REQUEST,
            "input 'x' has a fixed batch of 2, but batch 1:8:32 was asked for: export the model "
            "with an open batch, or ask for this one",
        ),
        (
            (-1, 3, -1, 64),
            REQUEST,
            "input 'x' has shape [-1, 3, -1, 64]: only the batch may be open (-1)",
        ),
        (
            (-1, -1, 64, 64),
            replace(REQUEST, size=SizeProfile.parse("64:96:128")),
            "input 'x' has shape [-1, -1, 64, 64]: only batch, height and width may be open (-1)",
        ),
    ],
)
def test_shapes_that_fit_no_profile_are_refused(shape, request_, sentence: str):
    """The input is named with its shape."""
    with pytest.raises(BadInputError) as caught:
        profile_shapes("x", shape, request_)
    assert sentence == str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": ()}, "an engine needs at least one target, such as sm86"),
        ({}, "no ONNX file to build an engine from: typed.onnx"),
    ],
)
def test_a_request_that_lacks_something_is_refused(changes, sentence: str):
    """Before a process is started; exit code 2."""
    with pytest.raises(InputError) as caught:
        require_buildable(replace(REQUEST, **changes))
    assert (2, sentence) == (caught.value.exit_code, str(caught.value))


def summary(int8: int, half: int = 0, floats: int = 0) -> EngineSummary:
    counts = ConvolutionCounts(total=int8 + half + floats, int8=int8, half=half, float=floats)
    figures = TargetFigures(convolutions=counts, epilogue_fused=0, other_kernels=0)
    return EngineSummary(backend="b", version="1", per_target={"sm86": figures}, plan_bytes=1)


ADVICE = {
    Precision.INT8: "give every activation QuantizeLinear/DequantizeLinear a scale of shape [] "
    "(shape [1] silently costs INT8) and quantize input and weights of every convolution",
    Precision.FP16: "make weights, biases and activations of every convolution half",
    Precision.FP32: "build fp32 from the float graph",
}


@pytest.mark.parametrize(
    ("found", "precision", "sentence"),
    [
        (
            summary(0, 21, 1),
            Precision.INT8,
            "on sm86 only 0 of 22 convolutions run in INT8 (0 INT8, 21 half, 1 float): ",
        ),
        (
            summary(2, 20),
            Precision.FP16,
            "on sm86 only 20 of 22 convolutions run in half (2 INT8, 20 half, 0 float): ",
        ),
        (
            summary(0, 22),
            Precision.FP32,
            "on sm86 only 0 of 22 convolutions run in float (0 INT8, 22 half, 0 float): ",
        ),
    ],
)
def test_the_gates_words_hold_counts_and_advice(found, precision: Precision, sentence: str):
    """Exit code 1."""
    with pytest.raises(GateFailedError) as caught:
        check_engine(found, precision, 22)
    assert (1, sentence + ADVICE[precision]) == (caught.value.exit_code, str(caught.value))


def test_a_table_of_other_convolutions_vouches_for_nothing():
    """Exit code 1."""
    with pytest.raises(GateFailedError) as caught:
        check_engine(summary(21), Precision.INT8, 22)
    assert str(caught.value) == (
        "the engine for sm86 has 21 convolution kernels where the network has 22 convolutions: its "
        "layer table cannot vouch for int8; see the build log"
    )
    assert 1 == caught.value.exit_code


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (", ", "no target in ', '; choose from: sm80, sm86, sm89, sm120, sm121"),
        (
            "ampere",
            "unknown target 'ampere' (known: sm80, sm86, sm89, sm120, sm121)",
        ),
        (
            "sm87x",
            "unknown target 'sm87x' (nearest: sm89; known: sm80, sm86, sm89, sm120, sm121)",
        ),
    ],
)
def test_what_is_no_target_is_refused(text: str, sentence: str):
    """With the nearest and the known ones; exit code 2."""
    with pytest.raises(InputError) as caught:
        parse_targets(text, MissingBackend(), Precision.INT8)
    assert (2, sentence) == (caught.value.exit_code, str(caught.value))


@pytest.mark.parametrize(
    ("backend", "module", "version", "sentence"),
    [
        (
            "tensorrt",
            "tensorrt",
            "8.5.3.1",
            "TensorRT 8.5.3.1 is too old, 8.6 or later is needed: on Jetson it comes with JetPack, "
            "elsewhere pip install 'repvgg-exporter[tensorrt]'",
        ),
        (
            "tensorrt-rtx",
            "tensorrt_rtx",
            "1.4.0.76",
            "TensorRT-RTX 1.4.0.76 is too old, 1.5 or later is needed: "
            "pip install 'repvgg-exporter[rtx]'",
        ),
    ],
)
def test_an_old_library_is_a_lack(monkeypatch, backend, module, version, sentence: str):
    """Exit code 3, with the way to a newer one."""
    monkeypatch.setattr(importlib.util, "find_spec", {module: True}.get)
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)
    with pytest.raises(EnvironmentLackError) as caught:
        get_backend(backend)
    assert (3, sentence) == (caught.value.exit_code, str(caught.value))


def test_an_unknown_backend_is_refused_with_the_nearest():
    """Exit code 2."""
    with pytest.raises(InputError) as caught:
        get_backend("openvino")
    assert "unknown backend 'openvino' (known: auto, tensorrt-rtx, tensorrt)" == str(caught.value)


def test_a_backend_that_is_not_installed_builds_nothing():
    """It advises; asked to build it is a lack, exit code 3. Without any, targets must be named."""
    with pytest.raises(EnvironmentLackError) as caught:
        MissingBackend().build(REQUEST, lambda *_: None)
    assert "TensorRT-RTX is not installed, so no engine can be built" == str(caught.value)
    with pytest.raises(ValueError, match=r"^without a backend the targets must be named$"):
        decide_engine((), None, Precision.FP16)


def header(**changes: int) -> bytes:
    """The first bytes of a plan of 100 bytes."""
    size = changes.get("size", 100)
    return b"vtrt" + bytes(12) + size.to_bytes(8, "little") + bytes(76)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"nothing", "{path} is not a TensorRT-RTX plan, or is cut within its header"),
        (header()[:40], "{path} is not a TensorRT-RTX plan, or is cut within its header"),
        (
            header(size=101),
            "engine {path} is damaged: its header speaks of 101 bytes, the file has 100",
        ),
    ],
    ids=["another file", "cut", "another size"],
)
def test_a_damaged_plan_is_named(tmp_path: Path, content: bytes, sentence: str):
    """Exit code 2."""
    path = tmp_path / "model.engine"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        plan_header.read_plan_header(path)
    assert sentence.format(path=path) == str(caught.value)


WORKER = """
import json, os, sys
folder = sys.argv[-1]
print(json.dumps({{"phase": "Optimizing", "fraction": 0.5}}), flush=True)
{body}
"""
BUILT = {"status": "built", "version": "1", "errors": []}
LEAVE = "json.dump({content}, open(os.path.join(folder, 'result.json'), 'w'))"


@pytest.mark.parametrize(
    ("body", "error", "sentence"),
    [
        (
            "sys.exit('out of ideas')",
            EnvironmentLackError,
            "the engine builder ended with exit code 1 and left no result (last phase: "
            "Optimizing); its last words: out of ideas",
        ),
        (
            "os.kill(os.getpid(), 9)",
            EnvironmentLackError,
            "the engine builder was killed by SIGKILL, as happens when memory runs out (last "
            "phase: Optimizing)",
        ),
        (
            "import time; time.sleep(60)",
            EnvironmentLackError,
            "the engine builder did not finish within 2 s and was stopped (last phase: "
            "Optimizing): try fewer targets, or a machine with more cores and memory",
        ),
        (
            LEAVE.format(content={"status": "refused", "version": "1", "errors": list("abcde")}),
            GateFailedError,
            "the engine builder refuses the network: a; b; c; and 2 more",
        ),
        (
            LEAVE.format(content={"status": "bad_input", "version": "1", "errors": ["a  b"]}),
            InputError,
            "a b",
        ),
        (
            LEAVE.format(content={"status": "lacking", "version": "1", "errors": ["no library"]}),
            EnvironmentLackError,
            "no library",
        ),
        (
            LEAVE.format(content=BUILT),
            EnvironmentLackError,
            "the engine builder reports success but left no plan",
        ),
        (
            "[open(os.path.join(folder, name), 'w') for name in ('plan', 'build.log')]; "
            + LEAVE.format(content=BUILT),
            EnvironmentLackError,
            "the engine builder reports success but its plan is empty",
        ),
    ],
)
def test_how_a_worker_ends_is_one_sentence(body: str, error: type[ExporterError], sentence: str):
    """Refused is 1, bad input 2, whatever the machine lacks or does 3."""
    command = [sys.executable, "-c", WORKER.format(body=body)]
    # Starting Python is part of the time.
    limit = 2.0 if "sleep" in body else 60.0
    with pytest.raises(ExporterError) as caught:
        run_worker(REQUEST, lambda *_: None, command=command, timeout_s=limit)
    assert (error, sentence) == (type(caught.value), str(caught.value))


def test_a_worker_that_cannot_be_started_is_a_lack(tmp_path: Path):
    """Exit code 3."""
    command = [str(tmp_path / "absent")]
    with pytest.raises(EnvironmentLackError) as caught:
        run_worker(REQUEST, lambda *_: None, command=command)
    assert str(caught.value) == (
        "the engine builder cannot be started: [Errno 2] No such file or directory: "
        f"{json.dumps(command[0])[1:-1]!r}"
    )
