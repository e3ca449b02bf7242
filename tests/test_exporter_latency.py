"""`benchmark` and `compare` on a bundle of one small graph; times are the fake clock's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from exporter.bundle import MODEL, REFERENCE, Bundle, file_sha256
from exporter.device import RunBackend, runners
from exporter.device.timing import ROUNDS, Effort
from exporter.engine import driver
from exporter.errors import EnvironmentLackError, InputError
from exporter.latency import benchmark, compare
from exporter.profiles import BatchProfile

ONCE = Effort(seconds=0, warmup=1)
NO_DRIVER = "no NVIDIA driver on this machine (libcuda.so.1 does not load)"


def small_bundle(path: Path, batch: str = "1:2:20") -> Bundle:
    """A bundle whose network is a ReLU."""
    path.mkdir()
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4, 4])
        for name in ("images", "logits")
    ]
    nodes = [helper.make_node("Relu", ["images"], ["logits"])]
    graph = helper.make_graph(nodes, "relu", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path / MODEL)
    images = np.arange(5 * 3 * 16, dtype=np.float32).reshape(5, 3, 4, 4)
    np.savez(path / REFERENCE, images=images, logits=images)
    files = {name: {"sha256": file_sha256(path / name)} for name in (MODEL, REFERENCE)}
    manifest = {"spec": {"precision": "fp32", "batch": batch}, "files": files}
    return Bundle(path=path, manifest=manifest, parity={"stages": []})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return small_bundle(tmp_path / "one")


class Engines:
    """Stands for the engines of bundles; each run moves the clock by the bundle's milliseconds."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.now = 0.0
        self.prepared: list[tuple[int, ...]] = []
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def open(
        self, bundle: Bundle, _stack: Any, *, cuda_graph: bool, runtime_cache: bool
    ) -> runners.BundleRunner:
        def prepare(batch):
            self.prepared.append(batch[0].shape)

            def step() -> None:
                self.log.append(bundle.path.name)
                self.now += self.milliseconds[bundle.path.name] / 1e3 * len(batch[0])

            return step

        return runners.BundleRunner(
            backend=RunBackend.ENGINE,
            library=f"fake engine, graph {cuda_graph}, cache {runtime_cache}",
            run=lambda _batch: {},
            batch=BatchProfile.parse(bundle.manifest["spec"]["batch"]),
            prepare=prepare,
        )


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Engines:
    fake = Engines(one=4.0, other=1.0)
    monkeypatch.setattr(runners, "_engine", fake.open)
    return fake


def test_the_profiles_three_sizes_are_timed(bundle: Bundle, engines: Engines):
    """Without a choice: smallest, usual, largest; the reference inputs are repeated."""
    found = benchmark(bundle, effort=ONCE, clock=engines.clock, cuda_graph=True)

    assert [1, 2, 20] == [row.batch for row in found.rows]
    assert [(1, 3, 4, 4), (2, 3, 4, 4), (20, 3, 4, 4)] == engines.prepared
    assert [4.0, 8.0, 80.0] == [pytest.approx(row.p50_ms) for row in found.rows]
    assert all(row.images_per_second == pytest.approx(250) for row in found.rows)
    assert ("engine", "fake engine, graph True, cache True", None) == (
        found.backend, found.library, found.threads,
    )  # fmt: skip


def test_warm_up_runs_come_first_and_do_not_count(bundle: Bundle, engines: Engines):
    """Three of warm-up and ten that count."""
    effort = Effort(seconds=0, warmup=3)
    found = benchmark(bundle, batches=[2], effort=effort, clock=engines.clock)
    assert (13, 10, 3) == (len(engines.log), found.rows[0].runs, found.warmup)


def test_onnx_runtime_runs_a_batch_in_one_step(bundle: Bundle):
    """Twenty images are one run, though OnnxRunner would cut them; the figures are all there."""
    with runners.open_runner(bundle, RunBackend.ONNXRUNTIME, threads=1) as runner:
        assert (20, 3, 4, 4) == runner.run((np.ones((20, 3, 4, 4), np.float32),))["logits"].shape
    found = benchmark(
        bundle, RunBackend.ONNXRUNTIME, batches=[20, 1, 20], effort=ONCE, threads=1
    ).to_json()
    assert ("onnxruntime", 1, False) == (found["backend"], found["threads"], found["cuda_graph"])
    assert [1, 20] == [row["batch"] for row in found["rows"]]
    assert {"batch", "runs", "p50_ms", "p90_ms", "p99_ms", "images_per_second"} == set(
        found["rows"][0]
    )


@pytest.mark.parametrize("size", [0, 21])
def test_a_batch_outside_the_profile_is_refused(bundle: Bundle, engines: Engines, size: int):
    """Both are named."""
    with pytest.raises(InputError) as refusal:
        benchmark(bundle, batches=[1, size], effort=ONCE, clock=engines.clock)
    assert f"batch {size} is outside the bundle's profile 1:2:20" == str(refusal.value)


def test_two_bundles_are_timed_in_turns(bundle: Bundle, tmp_path: Path, engines: Engines):
    """The ratio is the second's time over the first's, at sizes that both have."""
    other = small_bundle(tmp_path / "other", "2:4:8")

    found = compare(bundle, other, effort=ONCE, clock=engines.clock)

    assert [2, 4, 8] == [ratio.batch for ratio in found.ratios]
    for ratio in found.ratios:
        assert (ROUNDS, "faster") == (ratio.rounds, ratio.verdict)
        assert [pytest.approx(0.25)] * 3 == [ratio.low, ratio.median, ratio.high]
    assert [ROUNDS] * 3 == [row.runs for row in found.second.rows]
    measured = engines.log[2 + 2 : 2 + 2 + 4]
    assert ["one", "other", "other", "one"] == measured
    assert {"first", "second", "ratios"} == set(found.to_json())


def test_a_cuda_graph_is_the_engines(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    """ONNX Runtime has none, and AUTO does not turn to it where a graph was asked for."""
    monkeypatch.setattr(driver, "driver_lack", lambda: NO_DRIVER)
    with pytest.raises(InputError) as refusal:
        benchmark(bundle, RunBackend.ONNXRUNTIME, effort=ONCE, cuda_graph=True)
    assert "CUDA graphs belong to the engine, not to ONNX Runtime" == str(refusal.value)
    with pytest.raises(EnvironmentLackError, match="holds no engine yet"):
        benchmark(bundle, effort=ONCE, cuda_graph=True)


def test_an_engine_is_not_compared_with_onnx_runtime(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: Engines
):
    """Where only one of two engines runs, AUTO would mix GPU and CPU times."""
    other = small_bundle(tmp_path / "other")

    def only_the_first(bundle: Bundle, stack: Any, **options: bool) -> runners.BundleRunner:
        if bundle is other:
            raise EnvironmentLackError("no engine")
        return engines.open(bundle, stack, **options)

    monkeypatch.setattr(runners, "_engine", only_the_first)
    with pytest.raises(InputError) as refusal:
        compare(bundle, other, effort=ONCE)
    assert (
        f"{bundle.path} runs by engine and {other.path} by onnxruntime: such times cannot be "
        "compared; name one with --backend"
    ) == str(refusal.value)


def test_profiles_without_a_common_size_are_refused(
    bundle: Bundle, tmp_path: Path, engines: Engines
):
    """There is nothing to compare."""
    other = small_bundle(tmp_path / "other", "30")
    with pytest.raises(InputError) as refusal:
        compare(bundle, other, effort=ONCE, clock=engines.clock)
    assert "no batch size is in both profiles 1:2:20 and 30:30:30" == str(refusal.value)
