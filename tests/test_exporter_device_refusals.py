"""The exact words of what the device half refuses, beside the tests of what it does.

Engines, libraries and memory are fakes here: each says no to one call.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibration.images import Preprocess
from exporter.bundle import ENGINE, ENGINE_SUMMARY, Bundle
from exporter.device import (
    RunBackend,
    accuracy,
    cuda_python_memory,
    open_runner,
    pycuda_memory,
    runners,
)
from exporter.device.engine_runner import EngineRunner
from exporter.device.graph_census import read_census
from exporter.device.kernel_cache import KernelCache, cache_folder
from exporter.engine import driver, runtime_modules
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.evaluation import evaluate
from exporter.profiles import BatchProfile


class Library:
    """A TensorRT of one input and one output, which says no to the calls in ``refusing``."""

    __name__ = "fake"
    __version__ = "1"
    TensorIOMode = SimpleNamespace(INPUT="in")
    num_io_tensors = 2

    class ILogger: ...

    def __init__(self, *refusing: str) -> None:
        self.refusing = refusing

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger
        return self

    def answer(self, name: str, value: Any) -> Any:
        if name not in self.refusing:
            return value
        self.logger.log(SimpleNamespace(name="ERROR"), "because")
        return None

    def deserialize_cuda_engine(self, _plan: bytes) -> Any:
        return self.answer("deserialize", self)

    def create_execution_context(self) -> Any:
        return self.answer("context", self)

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_dtype(self, _name: str) -> Any:
        return SimpleNamespace(name="FLOAT")

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "x" else "out"

    def get_tensor_profile_shape(self, _name: str, _profile: int) -> Any:
        return [(1, 2), (2, 2), (4, 2)]

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return (-1, 2) if "shape known" in self.refusing else (1, 2)

    def set_input_shape(self, _name: str, _shape: Any) -> Any:
        return self.answer("shape", True)

    def set_tensor_address(self, _name: str, _address: int) -> Any:
        return self.answer("address", True)

    def execute_async_v3(self, _stream: int) -> Any:
        return self.answer("execute", True)


class Memory(SimpleNamespace):
    """Accepts everything."""

    stream = 0

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: 1


@pytest.mark.parametrize(
    ("refusing", "error", "sentence"),
    [
        (
            "deserialize",
            EnvironmentLackError,
            "fake 1 does not load {plan} on this GPU: because; `repvgg-export build` makes an "
            "engine for this machine",
        ),
        ("context", EnvironmentLackError, "no execution context for {plan}: because"),
        ("shape", GateFailedError, "the engine refuses shape [1, 2] of x: because"),
        (
            "shape known",
            GateFailedError,
            "the engine's output y has the open shape [-1, 2], which depends on the data; such "
            "outputs are not supported",
        ),
        ("address", GateFailedError, "the engine refuses the memory of x: because"),
        ("execute", GateFailedError, "the engine does not run: because"),
    ],
)
def test_each_call_that_an_engine_refuses_is_said(tmp_path: Path, refusing, error, sentence: str):
    """What it lacks is 3, what it will not do is 1; TensorRT's own words are in it."""
    plan = tmp_path / "model.engine"
    plan.write_bytes(b"plan")
    with pytest.raises(error) as caught:  # noqa: PT012
        runner = EngineRunner(plan, Library(refusing), Memory())
        runner.run((np.zeros((1, 2), np.float32),))
    assert sentence.format(plan=plan) == str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot mmap an empty file"),
        (b"\x08\x07", "it holds no graph"),
        (b"\x3a\xff\x01abc", "it is cut off"),
        (b"\x0b", "byte 1 is no protobuf field"),
        (b"\xff" * 12, "byte 10 is no protobuf number"),
        (b"\x3a", "it is cut off"),
    ],
)
def test_what_is_no_graph_is_refused_with_the_reason(tmp_path: Path, content: bytes, words: str):
    """Exit code 2."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_census(path)
    assert f"{path} cannot be read as ONNX: {words}" == str(caught.value)


def test_a_cache_of_other_bytes_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A note and no error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    KernelCache(b"plan", library="l", gpu="g").write(b"kernels", load_ms=1.0, first_run_ms=1.0)
    (path,) = cache_folder().iterdir()
    path.write_bytes(path.read_bytes() + b"x")
    cache = KernelCache(b"plan", library="l", gpu="g")
    assert b"" == cache.read()
    assert [
        f"runtime cache {path} is ignored and made anew: its content is not what its first line "
        "says"
    ] == cache.notes


def failing_import(error: Exception) -> Any:
    def load(_name: str) -> Any:
        raise error

    return load


@pytest.mark.parametrize(
    ("module", "act", "error", "sentence"),
    [
        (
            cuda_python_memory,
            cuda_python_memory.CudaPythonMemory,
            ImportError("libcudart missing"),
            "cuda-python does not load: libcudart missing",
        ),
        (
            cuda_python_memory,
            cuda_python_memory.CudaPythonMemory,
            ModuleNotFoundError("cuda.bindings"),
            "the package 'cuda' holds no runtime: pip install 'repvgg-exporter[cuda]'",
        ),
        (
            pycuda_memory,
            pycuda_memory.PycudaMemory,
            OSError("libcurand missing"),
            "pycuda does not load: libcurand missing",
        ),
        (
            runtime_modules,
            lambda: runtime_modules.runtime_module("tensorrt"),
            ImportError("libnvinfer missing"),
            "tensorrt does not load: libnvinfer missing",
        ),
    ],
)
def test_a_library_that_does_not_load_is_a_lack(monkeypatch, module, act, error, sentence: str):
    """Exit code 3 with the loader's words."""
    monkeypatch.setattr(driver, "driver_lack", lambda: None)
    monkeypatch.setattr(module.importlib, "import_module", failing_import(error))
    with pytest.raises(EnvironmentLackError) as caught:
        act()
    assert (3, sentence) == (caught.value.exit_code, str(caught.value))


class Pycuda:
    """A pycuda whose allocations cannot be freed."""

    class Error(Exception): ...

    class MemoryError(Error): ...  # noqa: A001

    def __init__(self) -> None:
        self.left: list[str] = []

    def init(self) -> None: ...

    def Stream(self) -> Any:  # noqa: N802
        return SimpleNamespace(handle=1)

    def Device(self, _index: int) -> Any:  # noqa: N802
        context = SimpleNamespace(
            push=lambda: None, pop=lambda: self.left.append("pop"),
            detach=lambda: self.left.append("detach"),
        )  # fmt: skip
        return SimpleNamespace(retain_primary_context=lambda: context)

    def mem_alloc(self, size: int) -> Any:
        error = self.Error

        class Allocation:
            def __int__(self) -> int:
                return size

            def free(self) -> None:
                raise error(f"{size} is held")

        return Allocation()


def test_pycuda_closes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch):
    """The first failure is raised in the end, and the context is left. It has no CUDA graphs."""
    fake = Pycuda()
    monkeypatch.setattr(pycuda_memory.importlib, "import_module", lambda _name: fake)
    held = pycuda_memory.PycudaMemory()
    for size in (1, 2):
        held.allocate(size)
    with pytest.raises(EnvironmentLackError) as caught:
        held.capture(lambda: None)
    assert (
        "CUDA graphs need cuda-python, pycuda has none: pip install 'repvgg-exporter[cuda]'"
        == str(caught.value)
    )
    with pytest.raises(EnvironmentLackError) as caught:
        held.close()
    assert "CUDA: freeing memory failed: 2 is held" == str(caught.value)
    assert ["pop", "detach"] == fake.left


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "KeyError('backend')"),
        ("[]", "TypeError('list indices must be integers or slices, not str')"),
    ],
)
def test_an_engine_of_nobody_is_refused(tmp_path: Path, content: str, words: str):
    """engine.json must say who made it; exit code 2, also where ONNX Runtime could step in."""
    (tmp_path / ENGINE).write_bytes(b"plan")
    (tmp_path / ENGINE_SUMMARY).write_text(content)
    bundle = Bundle(path=tmp_path, manifest={"files": {ENGINE: {}}}, parity={})
    with pytest.raises(InputError) as caught, open_runner(bundle, RunBackend.AUTO):
        pass
    assert f"bundle {tmp_path}: engine.json does not say who made the engine ({words})" == str(
        caught.value
    )


def test_nothing_is_merged_to_nothing():
    """Exit code 2."""
    with pytest.raises(InputError) as caught:
        accuracy.merge([])
    assert "there is no evaluation to merge" == str(caught.value)


def classifier(path: Path, **preprocess: Any) -> Bundle:
    """A bundle of two classes with nothing in it to run."""
    path.mkdir()
    own = Preprocess(image_size=(8, 8), crop_fraction=1.0, mean=(0, 0, 0), std=(1, 1, 1)).to_json()
    manifest = {
        "model": {"num_classes": 2},
        "class_names": ["a", "b"],
        "preprocess": {**own, **preprocess},
        "spec": {"precision": "fp32", "batch": "1:2:4"},
        "files": {},
    }
    return Bundle(path=path, manifest=manifest, parity={})


def test_what_cannot_be_evaluated_is_refused_before_it_runs(tmp_path: Path):
    """A folder that is none, and preprocessing that makes no sense; exit code 2."""
    with pytest.raises(InputError) as caught:
        evaluate(classifier(tmp_path / "one"), tmp_path / "absent")
    assert f"image folder {tmp_path / 'absent'} does not exist" == str(caught.value)
    odd = classifier(tmp_path / "two", interpolation="guess")
    with pytest.raises(InputError) as caught:
        evaluate(odd, tmp_path)
    assert str(caught.value) == (
        f"bundle {tmp_path / 'two'}: interpolation must be one of nearest, bilinear, bicubic, not "
        "'guess'"
    )


def test_outputs_of_another_shape_are_a_failed_gate(tmp_path: Path, monkeypatch):
    """Three logits for two classes; exit code 1."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "a" / "a.png")
    bundle = classifier(tmp_path / "one")
    fake = runners.BundleRunner(
        backend=RunBackend.ENGINE,
        library="fake engine",
        run=lambda batch: {"logits": np.zeros((len(batch[0]), 3), np.float32)},
        batch=BatchProfile(1, 2, 4),
        prepare=lambda _batch: lambda: None,
    )
    monkeypatch.setattr(runners, "_engine", lambda *_, **__: fake)
    with pytest.raises(GateFailedError) as caught:
        evaluate(bundle, tmp_path / "data")
    assert "fake engine returns shape [1, 3], expected [1, 2]" == str(caught.value)
    assert 1 == caught.value.exit_code
