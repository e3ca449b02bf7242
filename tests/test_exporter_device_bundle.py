"""A published bundle on the device: verified with its engine, its engine built, it opened to run.

Where an engine runs here, it is a fake that stands for one; builds are real, by TensorRT-RTX.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter import bundle as files
from exporter.bundle import Bundle
from exporter.bundle.writer import BundleWriter
from exporter.device import (
    RunBackend,
    build,
    build_engine,
    open_runner,
    options_for,
    runners,
    sign_bundle,
)
from exporter.device.kernel_cache import Startup
from exporter.devices import DEVICES
from exporter.engine import (
    BuildOptions,
    BuiltEngine,
    ConvolutionCounts,
    Dla,
    EngineSummary,
    Quantization,
    TargetFigures,
    Typing,
    driver,
)
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.profiles import BatchProfile
from exporter.running.onnx_runner import OnnxRunner
from exporter.verify import verify

NO_DRIVER = "no NVIDIA driver on this machine (libcuda.so.1 does not load)"
INT8_GATE = {"min_sqnr_db": 25.0, "min_top1_agreement": 0.98}


def network() -> onnx.ModelProto:
    """A 3x3 convolution, ReLU, pooling and a classifier of four classes."""
    generator = np.random.default_rng(0)
    constants = {
        "kernel": generator.normal(size=(16, 3, 3, 3)),
        "bias": generator.normal(size=16),
        "weight": generator.normal(size=(16, 4)),
    }
    nodes = [
        helper.make_node("Conv", ["images", "kernel", "bias"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("MatMul", ["f", "weight"], ["logits"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def publish(
    out: Path,
    *,
    precision: str = "fp32",
    engine: bytes | None = b"plan",
    status: str = "pass",
) -> Bundle:
    """A bundle as the pipeline would leave it, of the small network.

    At int8 the precision graph is the float one: what INT8 does to it is not the question here.
    ``status`` is that of the stages after ``simplified``.
    """
    model = network()
    images = np.random.default_rng(1).normal(size=(8, 3, 16, 16)).astype(np.float32)
    rows = [("simplified", {"max_relative": 1e-4})]
    with BundleWriter(out) as writer:
        onnx.save(model, writer.path(files.MODEL))
        if precision != "fp32":
            onnx.save(model, writer.path(f"model.{precision}.onnx"))
            rows.append((precision, INT8_GATE))
        logits = OnnxRunner(model).run((images,))["logits"]
        np.savez(writer.path(files.REFERENCE), images=images, logits=logits)
        writer.write_text(files.REPORT, "report")
        stages = [
            {
                "stage": name,
                "reference": "original",
                "status": "pass" if name == "simplified" else status,
                "reason": "no CPU can" if status == "not_run" else None,
                "tolerance": gate,
            }
            for name, gate in (*rows, ("engine", {}))
        ]
        writer.write_text(files.PARITY, files.dumps({"stages": stages}))
        if engine is not None:
            writer.path(files.ENGINE).write_bytes(engine)
            writer.write_text(files.ENGINE_SUMMARY, files.dumps({"backend": "tensorrt-rtx"}))
        spec = {"precision": precision, "batch": "1:2:4", "dynamic_size": None}
        return writer.publish(
            {
                "model": {"num_classes": 4},
                "preprocess": {"image_size": [16, 16]},
                "targets": ["sm86"],
                "spec": spec,
                "notes": ["no engine for orin (sm87) yet; on the device: ...", "another"],
            }
        )


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "driver_lack", lambda: NO_DRIVER)


def engine_that(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """Put a fake in the engine's place."""
    fake = runners.BundleRunner(
        backend=RunBackend.ENGINE,
        library="fake engine",
        run=run,
        batch=BatchProfile(1, 2, 4),
        prepare=lambda _batch: lambda: None,
    )
    monkeypatch.setattr(runners, "_engine", lambda *_, **__: fake)


def exact(batch: Any) -> dict[str, Any]:
    return OnnxRunner(network()).run(batch)


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize(
    ("precision", "stages"),
    [("fp32", ["simplified", "engine"]), ("int8", ["simplified", "int8", "engine"])],
)
def test_without_a_driver_the_engine_row_says_so(tmp_path: Path, precision: str, stages):
    """The graphs are judged, the engine is not run, and that is no pass."""
    ledger = verify(publish(tmp_path / "b", precision=precision))
    assert stages == [row.stage for row in ledger.stages]
    assert "pass" == ledger.verdict
    assert ("engine",) == ledger.not_run
    assert NO_DRIVER == ledger.stages[-1].reason


def test_a_bundle_without_engine_says_how_to_make_one(tmp_path: Path):
    """Deferred engines are built on the device."""
    bundle = publish(tmp_path / "b", engine=None)
    row = verify(bundle).stages[-1]
    assert ("engine", "not_run") == (row.stage, row.status)
    assert (
        f"bundle {bundle.path} holds no engine yet; `repvgg-export build` makes one on the device"
        == row.reason
    )


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_that_computes_the_same_passes(tmp_path: Path, monkeypatch, precision: str):
    """It is held against the original's outputs, with the gate of the graph it was built from."""
    engine_that(monkeypatch, exact)
    ledger = verify(publish(tmp_path / "b", precision=precision))
    row = ledger.stages[-1]
    assert ("engine", "pass", "pass") == (row.stage, row.status, ledger.verdict)
    assert row.gate == ledger.stages[-2].gate
    assert row.gate.to_json()
    assert () == ledger.not_run


def test_a_graph_that_the_export_could_not_judge_is_not_run_here_either(
    tmp_path: Path, monkeypatch
):
    """Some precisions no CPU runs; their engine is judged all the same."""
    engine_that(monkeypatch, exact)
    ledger = verify(publish(tmp_path / "b", precision="int8", status="not_run"))
    assert ["pass", "not_run", "pass"] == [row.status for row in ledger.stages]
    assert "no CPU can" == ledger.stages[1].reason
    # One of the 8 images may be answered otherwise.
    assert {**INT8_GATE, "min_top1_agreement": 7 / 8} == ledger.stages[-1].gate.to_json()


def test_an_engine_that_computes_something_else_fails(tmp_path: Path, monkeypatch):
    """One class too high is a failed gate."""
    engine_that(monkeypatch, lambda batch: {"logits": exact(batch)["logits"] + [9, 0, 0, 0]})
    ledger = verify(publish(tmp_path / "b", precision="int8"))
    row = ledger.stages[-1]
    assert ("fail", "fail") == (row.status, ledger.verdict)
    assert "SQNR is" in str(row.reason)


def test_an_engine_that_refuses_to_run_fails(tmp_path: Path, monkeypatch):
    """What could not be executed on a machine that can is a failure, not a lack."""

    def refuse(_batch: Any) -> Any:
        raise GateFailedError("the engine does not run: out of luck")

    engine_that(monkeypatch, refuse)
    row = verify(publish(tmp_path / "b")).stages[-1]
    assert ("fail", "the engine does not run: out of luck") == (row.status, row.reason)


def test_where_only_the_engine_runs_the_graphs_are_not_run(tmp_path: Path, monkeypatch):
    """A device without onnxruntime still verifies its engine."""
    bundle = publish(tmp_path / "b", precision="int8")
    recorded = {"logits": bundle.reference()[1]}
    engine_that(monkeypatch, lambda _batch: recorded)
    reason = "onnxruntime is not installed; pip install onnxruntime, or 'repvgg-exporter[export]'"

    def missing(*_: Any, **__: Any) -> Any:
        raise EnvironmentLackError(reason)

    monkeypatch.setattr("exporter.verify.OnnxRunner", missing)
    monkeypatch.setattr(runners, "_onnxruntime", missing)
    ledger = verify(bundle)
    assert ["not_run", "not_run", "pass"] == [row.status for row in ledger.stages]
    assert "pass" == ledger.verdict
    monkeypatch.setattr(runners, "_engine", missing)
    with pytest.raises(EnvironmentLackError) as refusal:
        verify(bundle)
    assert (
        f"bundle {bundle.path}: its files are intact, but nothing can be run here: {reason}"
        == str(refusal.value)
    )


def test_a_flipped_byte_is_refused_with_the_file(tmp_path: Path):
    """Verifying and building stop at the hash."""
    bundle = publish(tmp_path / "b")
    data = bytearray((bundle.path / files.REFERENCE).read_bytes())
    data[100] ^= 1
    (bundle.path / files.REFERENCE).write_bytes(data)
    for act in (verify, build_engine):
        with pytest.raises(GateFailedError) as refusal:
            act(bundle)
        assert f"bundle {bundle.path}: reference.npz missing or not what the manifest says" == str(
            refusal.value
        )


@pytest.mark.parametrize("name", [files.ENGINE, files.CALIBRATION_CACHE, "model.int8.onnx"])
def test_a_file_that_the_manifest_does_not_list_is_refused(tmp_path: Path, name: str):
    """A name of the bundle's own makes nothing its own; other strangers nobody reads."""
    bundle = publish(tmp_path / "b", engine=None)
    (bundle.path / "notes.txt").write_text("mine")
    assert "pass" == verify(bundle).verdict
    (bundle.path / name).write_bytes(b"garbage")
    for act in (verify, build_engine):
        with pytest.raises(GateFailedError) as refusal:
            act(bundle)
        assert (
            f"bundle {bundle.path}: {name} not among the files that the manifest lists, and no "
            "part of the bundle; move it elsewhere"
        ) == str(refusal.value)


def test_an_engine_that_the_manifest_does_not_list_is_not_loaded(tmp_path: Path):
    """Whoever runs a bundle without checking its files deserializes nothing that was added."""
    bundle = publish(tmp_path / "b", engine=None)
    (bundle.path / files.ENGINE).write_bytes(b"garbage")
    (bundle.path / files.ENGINE_SUMMARY).write_text('{"backend": "tensorrt-rtx"}')
    with (
        pytest.raises(EnvironmentLackError, match="holds no engine yet"),
        open_runner(bundle, RunBackend.ENGINE),
    ):
        pass


def test_memory_and_engine_are_closed_when_the_runner_is(tmp_path: Path, monkeypatch):
    """The engine lets go before the memory does, also after an error; short batches are filled."""
    log: list[str] = []

    class Held:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Held:
            log.append(f"open {self.name}")
            return self

        def __exit__(self, *_: object) -> None:
            log.append(f"close {self.name}")

    class Engine(Held):
        batch_profile = BatchProfile(4, 4, 8)
        startup = Startup(load_ms=1.0)

        def __init__(
            self, plan: Path, _trt: Any, _memory: Any, *, input_names: Any, runtime_cache: bool
        ) -> None:
            super().__init__("engine")
            assert (files.ENGINE, ("images",), True) == (plan.name, input_names, runtime_cache)

        def run(self, batch: Any) -> dict[str, Any]:
            log.append(f"run {len(batch[0])}")
            return {"logits": batch[0]}

    class Module:
        __version__ = "9"

    monkeypatch.setattr(runners, "runtime_module", lambda _name: Module())
    monkeypatch.setattr(runners, "open_memory", lambda *, graphs: Held(f"memory {graphs}"))
    monkeypatch.setattr(runners, "EngineRunner", Engine)
    bundle = publish(tmp_path / "b")
    images = np.arange(3, dtype=np.float32)

    with open_runner(bundle, RunBackend.AUTO, cuda_graph=True) as runner:
        assert "tensorrt-rtx 9 with memory True" == runner.library
        assert [0, 1, 2] == runner.run((images,))["logits"].tolist()

    assert ["open memory True", "open engine", "run 4", "close engine", "close memory True"] == log


def test_a_bundle_is_run_by_its_engine_where_that_runs(tmp_path: Path, monkeypatch):
    """Asked for nothing or for the engine; asked for ONNX Runtime, the engine is not opened."""
    bundle = publish(tmp_path / "b")
    images, logits = bundle.reference()
    engine_that(monkeypatch, lambda batch: {"logits": np.full((len(batch[0]), 4), 7, np.float32)})
    assert (bundle.run(images) == 7).all()
    assert (bundle.run(images, backend="engine") == 7).all()
    np.testing.assert_allclose(logits, bundle.run(images, backend="onnxruntime"), rtol=1e-5)


@pytest.mark.usefixtures("no_driver")
def test_a_bundle_is_run_by_onnx_runtime_elsewhere(tmp_path: Path):
    """Any number of images; the engine, asked for by name, is a lack."""
    bundle = publish(tmp_path / "b")
    images, logits = bundle.reference()
    many = np.concatenate([images] * 5)
    np.testing.assert_allclose(np.concatenate([logits] * 5), bundle.run(many), rtol=1e-5)
    with pytest.raises(EnvironmentLackError) as refusal:
        bundle.run(images, backend="engine")
    assert NO_DRIVER == str(refusal.value)
    with pytest.raises(InputError) as refusal:
        bundle.run(images, backend="onnx")
    assert "unknown backend 'onnx' (nearest: onnxruntime; known: auto, engine, onnxruntime)" == str(
        refusal.value
    )


def test_an_engine_that_fails_is_not_replaced_in_silence(tmp_path: Path, monkeypatch):
    """Only what this machine lacks makes ONNX Runtime step in."""

    def refuse(_batch: Any) -> Any:
        raise GateFailedError("the engine does not run: out of luck")

    engine_that(monkeypatch, refuse)
    bundle = publish(tmp_path / "b")
    with pytest.raises(GateFailedError, match=r"^the engine does not run: out of luck$"):
        bundle.run(bundle.reference()[0])


class FakeBackend:
    """Builds an engine of one float convolution in no time; stands for a real builder."""

    name = "fake"

    def __init__(self, convolutions: int = 1) -> None:
        self.convolutions = convolutions
        self.requests: list[Any] = []

    def version(self) -> str:
        return "1"

    def supported_targets(self, _precision: Any) -> tuple[str, ...]:
        return ("sm86", "sm87")

    def build(self, request: Any, progress: Any) -> BuiltEngine:
        self.requests.append(request)
        progress("Building", 1.0)
        count = self.convolutions
        figures = TargetFigures(
            convolutions=ConvolutionCounts(total=count, int8=0, half=0, float=count),
            epilogue_fused=0,
            other_kernels=0,
        )
        summary = EngineSummary(
            backend="fake",
            version="1",
            per_target=dict.fromkeys(request.targets, figures),
            plan_bytes=4,
        )
        return BuiltEngine(plan=b"new!", summary=summary, build_log="log")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    fake = FakeBackend()
    monkeypatch.setattr(build, "get_backend", lambda _name, **_: fake)
    return fake


@pytest.mark.parametrize("engine", [None, b"old"])
def test_an_engine_is_built_for_this_gpu_into_the_bundle(
    tmp_path: Path, monkeypatch, backend: FakeBackend, engine: bytes | None
):
    """Deferred or there before: engine, figures and manifest are new, the rest is untouched."""
    monkeypatch.setattr(build, "device_target", lambda: "sm87")
    before = publish(tmp_path / "b", engine=engine)
    model = (before.path / files.MODEL).read_bytes()

    built = build_engine(before)

    (request,) = backend.requests
    assert (("sm87",), "1:2:4") == (request.targets, str(request.batch))
    again = Bundle.load(before.path)
    assert again.manifest == built.manifest
    assert () == again.damaged_files()
    assert b"new!" == (before.path / files.ENGINE).read_bytes()
    assert model == (before.path / files.MODEL).read_bytes()
    assert "fake" == json.loads((before.path / files.ENGINE_SUMMARY).read_text())["backend"]
    assert ["sm87"] == again.manifest["targets"] == again.manifest["engine_build"]["targets"]
    assert ["another"] == again.manifest["notes"]
    kept = {files.MODEL, files.REFERENCE, files.PARITY, files.REPORT}
    for name in kept:
        assert before.manifest["files"][name] == again.manifest["files"][name]
    assert [tmp_path / "b"] == list(tmp_path.iterdir())


def test_a_new_engine_ends_the_signature_and_renews_the_checksums(
    tmp_path: Path, monkeypatch, backend: FakeBackend
):
    """What was signed is no more: no signature stays that a manifest of today would fail."""
    monkeypatch.setattr(build, "device_target", lambda: "sm87")
    bundle = publish(tmp_path / "b", engine=None)
    before = bundle.checksums
    signed = sign_bundle(bundle, lambda name, _content: name.encode())
    assert files.UNLISTED <= {path.name for path in signed.path.iterdir()}

    built = build_engine(signed)

    assert before != built.checksums == (built.path / files.CHECKSUMS).read_text()
    own = {*built.manifest["files"], *files.SIGNED}
    assert own == {path.name for path in built.path.iterdir()}


def test_checksums_that_mislead_fail_the_check(tmp_path: Path):
    """They are not in the manifest, so they are compared with it; older bundles have none."""
    bundle = publish(tmp_path / "b", engine=None)
    path = bundle.path / files.CHECKSUMS
    path.write_text(path.read_text().replace(files.REPORT, "other.html"))
    with pytest.raises(GateFailedError, match=r"SHA256SUMS does not say what manifest\.json and"):
        verify(bundle)
    path.unlink()
    assert "pass" == verify(bundle).verdict


@pytest.mark.usefixtures("no_driver")
def test_without_a_gpu_a_target_must_be_named(tmp_path: Path, backend: FakeBackend):
    """The sentence says both ways out; the bundle is as it was."""
    bundle = publish(tmp_path / "b", engine=None)
    with pytest.raises(EnvironmentLackError, match="there is no GPU to build the engine for: "):
        build_engine(bundle)
    assert [] == backend.requests
    assert ["sm86"] == build_engine(bundle, target="8.6").manifest["targets"]


@pytest.mark.parametrize(
    ("target", "built"), [("orin", ["sm87"]), ("Jetson AGX Orin, RTX 3060", ["sm86", "sm87"])]
)
def test_devices_are_called_by_their_names(
    tmp_path: Path, backend: FakeBackend, target: str, built: list[str]
):
    """As at export."""
    bundle = publish(tmp_path / "b", engine=None)
    assert built == build_engine(bundle, target=target).manifest["targets"]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (
            "thor",
            "target sm110 is not the GPU of this machine (sm86, sm87): full TensorRT builds only "
            "for the GPU it runs on; build there",
        ),
        (
            "orinn",
            "unknown target 'orinn' (nearest: orin-nx, orin, orin-nano; known: compute "
            f"capabilities such as sm86, and {len(DEVICES)} devices such as orin, orin-nano, t4, "
            "l4, rtx3060, rtx5090, thor)",
        ),
        (" ,", "no target in ' ,'; name a device such as orin, or sm86"),
    ],
)
def test_a_target_that_cannot_be_built_here_is_refused(
    tmp_path: Path, backend: FakeBackend, target: str, sentence: str
):
    """Full TensorRT builds for the GPU it runs on; exit code 2, and the bundle is as it was."""
    backend.name = "tensorrt"
    bundle = publish(tmp_path / "b")
    with pytest.raises(InputError) as refusal:
        build_engine(bundle, target=target)
    assert sentence == str(refusal.value)
    assert [] == backend.requests
    assert b"plan" == (bundle.path / files.ENGINE).read_bytes()


def test_files_that_are_not_the_bundles_are_not_lost(tmp_path: Path, backend: FakeBackend):
    """The folder is replaced as a whole, so strangers in it are named before anything is built."""
    bundle = publish(tmp_path / "b")
    (bundle.path / "notes.txt").write_text("mine")
    with pytest.raises(InputError) as refusal:
        build_engine(bundle, target="sm86")
    assert (
        f"bundle {bundle.path} holds what is not its own (notes.txt) and would be lost; move it "
        "elsewhere"
    ) == str(refusal.value)
    assert [] == backend.requests


def test_the_exports_build_options_hold_on_the_device(tmp_path: Path, backend: FakeBackend):
    """As recorded, files of the exporting machine left out; what is given comes on top."""
    bundle = publish(tmp_path / "b")
    bundle.manifest["spec"]["build"] = {
        "typing": "strong", "dla": 1, "gpu_fallback": False, "optimization_level": 2,
        "timing_cache": "/elsewhere/t", "calibration_cache": "/elsewhere/c",
        "version_compatible": True,
    }  # fmt: skip
    found = options_for(bundle)
    assert found == BuildOptions(
        typing=Typing.STRONG,
        # The exporting machine's cache is left out, that it was to be implicit is not.
        quantization=Quantization.IMPLICIT,
        dla=Dla(core=1, gpu_fallback=False),
        optimization_level=2,
        version_compatible=True,
    )
    (bundle.path / files.CALIBRATION_CACHE).write_text("TRT-1-EntropyCalibration2\n")
    given = options_for(bundle, dla=0, optimization_level=5, timing_cache=tmp_path / "t")
    assert (0, 5, tmp_path / "t") == (given.dla.core, given.optimization_level, given.timing_cache)
    (bundle.path / files.CALIBRATION_CACHE).unlink()
    build_engine(bundle, target="sm86")
    assert found == backend.requests[0].options
    assert backend.requests[0].cache_path is None
    with pytest.raises(ValueError, match="optimization level must be 0 to 5, not 9"):
        options_for(bundle, optimization_level=9)


@pytest.mark.parametrize("recorded", [{}, {"dla": 0}, {"quantization": "implicit", "dla": 0}])
def test_implicit_int8_on_the_device_has_the_bundles_own_scales(
    tmp_path: Path, backend: FakeBackend, recorded: dict[str, Any]
):
    """The cache travels with every build; what the export recorded says whether it must be used."""
    bundle = publish(tmp_path / "b")
    cache = bundle.path / files.CALIBRATION_CACHE
    cache.write_text("TRT-1-EntropyCalibration2\n")
    bundle.manifest["files"][cache.name] = {"sha256": files.file_sha256(cache), "bytes": 26}
    bundle.manifest["spec"]["build"] = recorded

    build_engine(bundle, target="sm86")

    (request,) = backend.requests
    assert cache == request.cache_path
    assert recorded.get("quantization", "auto") == request.options.quantization.value
    assert recorded.get("dla") == (request.options.dla.core if request.options.dla else None)


def test_an_engine_that_is_not_what_the_graph_asks_for_is_not_published(
    tmp_path: Path, backend: FakeBackend
):
    """The gate of the export holds on the device too."""
    bundle = publish(tmp_path / "b")
    backend.convolutions = 0
    with pytest.raises(GateFailedError, match="has 0 convolution kernels where the network has 1"):
        build_engine(bundle, target="sm86")
    assert b"plan" == (bundle.path / files.ENGINE).read_bytes()
    assert () == Bundle.load(bundle.path).damaged_files()


@pytest.mark.usefixtures("no_driver")
def test_a_missing_builder_is_a_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Exit code 3, before a GPU is looked for."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.startswith("tensorrt") else real(name, *rest),
    )
    with pytest.raises(EnvironmentLackError, match="not installed") as refusal:
        build_engine(publish(tmp_path / "b"), backend="tensorrt-rtx")
    assert 3 == refusal.value.exit_code


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)
def test_tensorrt_rtx_builds_into_a_bundle(tmp_path: Path):
    """The real builder, for a named target; its own figures pass the gate."""
    built = build_engine(publish(tmp_path / "b", engine=None), target="sm86,sm89")
    assert ["sm86", "sm89"] == built.manifest["targets"]
    assert (built.path / files.ENGINE).read_bytes().startswith(b"vtrt")
    assert () == Bundle.load(built.path).damaged_files()
