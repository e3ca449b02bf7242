"""The memory seam: what is chosen, what is refused, and that everything is given back.

The CUDA libraries here are fakes that record calls; they say nothing about a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from exporter.device import cuda_python_memory, memory, pycuda_memory
from exporter.device.cuda_python_memory import CudaPythonMemory
from exporter.device.memory import open_memory
from exporter.device.pycuda_memory import PycudaMemory
from exporter.engine import driver, runtime_modules
from exporter.errors import EnvironmentLackError

NO_DRIVER = "no NVIDIA driver on this machine (libcuda.so.1 does not load)"


class Code(int):
    """A CUDA error code."""


class FakeCudaRuntime:
    """Records calls of cuda-python's runtime; ``failing`` names those that fail."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")  # noqa: N815

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.calls: list[str] = []
        self._next = 100

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append(f"{name}{arguments}")
            if name in self.failing:
                return (Code(2),)
            self._next += 1
            return (Code(0), self._next)

        return call

    def cudaGetErrorString(self, _error):  # noqa: N802
        return Code(0), b"out of memory"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCudaRuntime:
    fake = FakeCudaRuntime()
    monkeypatch.setattr(cuda_python_memory, "_runtime", lambda: fake)
    return fake


class FakePycuda:
    """Records calls of pycuda.driver."""

    class Error(Exception): ...

    class MemoryError(Error): ...  # noqa: A001

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.room = 100

    def init(self) -> None: ...

    def Device(self, _index: int):  # noqa: N802
        context = SimpleNamespace(
            push=lambda: self.calls.append("push"),
            pop=lambda: self.calls.append("pop"),
            detach=lambda: self.calls.append("detach"),
        )
        return SimpleNamespace(retain_primary_context=lambda: context)

    def Stream(self):  # noqa: N802
        return SimpleNamespace(handle=42, synchronize=lambda: self.calls.append("synchronize"))

    def mem_alloc(self, size: int):
        if size > self.room:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        calls = self.calls

        class Allocation:
            def __int__(self) -> int:
                return 1000 + size

            def free(self) -> None:
                calls.append(f"free {size}")

        return Allocation()

    def memcpy_htod_async(self, address, array, stream) -> None:
        self.calls.append(f"in {address} {array.nbytes} {stream.handle}")

    def memcpy_dtoh_async(self, array, address, stream) -> None:
        self.calls.append(f"out {address} {array.nbytes} {stream.handle}")


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> FakePycuda:
    fake = FakePycuda()
    real = importlib.import_module
    monkeypatch.setattr(
        pycuda_memory.importlib,
        "import_module",
        lambda name: fake if name == "pycuda.driver" else real(name),
    )
    return fake


def test_without_a_driver_there_is_no_memory(monkeypatch: pytest.MonkeyPatch):
    """One sentence, before any library is imported."""
    monkeypatch.setattr(driver, "driver_lack", lambda: NO_DRIVER)
    with pytest.raises(EnvironmentLackError) as refusal, open_memory():
        pass
    assert NO_DRIVER == str(refusal.value)
    assert 3 == refusal.value.exit_code


@pytest.mark.parametrize(
    ("installed", "graphs", "chosen"),
    [
        ({"pycuda", "cuda"}, False, "PycudaMemory"),
        ({"pycuda", "cuda"}, True, "CudaPythonMemory"),
        ({"cuda"}, False, "CudaPythonMemory"),
        ({"pycuda"}, False, "PycudaMemory"),
    ],
)
@pytest.mark.usefixtures("cuda", "pycuda")
def test_what_is_installed_decides(monkeypatch, installed, graphs, chosen):
    """pycuda first; CUDA graphs only cuda-python has."""
    monkeypatch.setattr(driver, "driver_lack", lambda: None)
    monkeypatch.setattr(
        memory.importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    with open_memory(graphs=graphs) as found:
        assert chosen == type(found).__name__


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        (
            (),
            "neither pycuda nor cuda-python is installed: pip install 'repvgg-exporter[cuda]' "
            "(binary wheels), or pip install pycuda, which compiles",
        ),
        (
            ("pycuda",),
            "CUDA graphs need cuda-python, pycuda has none: pip install 'repvgg-exporter[cuda]'",
        ),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, installed, sentence):
    """The sentence says what to install."""
    monkeypatch.setattr(driver, "driver_lack", lambda: None)
    monkeypatch.setattr(
        memory.importlib.util, "find_spec", lambda name: object() if name in installed else None
    )
    with pytest.raises(EnvironmentLackError) as refusal, open_memory(graphs=True):
        pass
    assert sentence == str(refusal.value)


def test_cuda_python_gives_everything_back_once(cuda: FakeCudaRuntime):
    """Graphs, then memory, then the stream; a second close does nothing."""
    held = CudaPythonMemory()
    first, second = held.allocate(10), held.allocate(20)
    held.free(first)
    held.capture(lambda: None)
    before = len(cuda.calls)
    held.close()
    held.close()
    ends = [call.split("(")[0] for call in cuda.calls[before:]]
    assert ["cudaGraphExecDestroy", "cudaFree", "cudaStreamDestroy"] == ends
    assert f"cudaFree({second},)" in cuda.calls


def test_cuda_python_closes_on_after_a_failure(cuda: FakeCudaRuntime):
    """What fails to be freed does not keep the rest; the failure is told."""
    held = CudaPythonMemory()
    held.allocate(10)
    held.allocate(20)
    cuda.failing = ("cudaFree",)
    with pytest.raises(EnvironmentLackError) as refusal:
        held.close()
    assert "CUDA: cudaFree failed: out of memory (error 2)" == str(refusal.value)
    assert 2 == sum(call.startswith("cudaFree(") for call in cuda.calls)
    assert cuda.calls[-1].startswith("cudaStreamDestroy")


def test_cuda_python_copies_on_its_stream(cuda: FakeCudaRuntime):
    """Both directions are asynchronous, on the stream that executions use."""
    held = CudaPythonMemory()
    address, array = held.allocate(16), np.zeros(4, np.float32)
    held.copy_in(address, array)
    held.copy_out(array, address)
    host, stream = array.ctypes.data, held.stream
    assert f"cudaMemcpyAsync({address}, {host}, 16, 'in', {stream})" in cuda.calls
    assert f"cudaMemcpyAsync({host}, {address}, 16, 'out', {stream})" in cuda.calls


def test_a_failed_capture_is_ended(cuda: FakeCudaRuntime):
    """The stream captures no longer, nothing is kept, and the reason is the work's own."""

    def fail() -> None:
        raise EnvironmentLackError("the work failed")

    held = CudaPythonMemory()
    with pytest.raises(EnvironmentLackError, match=r"^the work failed$"):
        held.capture(fail)
    ends = [call.split("(")[0] for call in cuda.calls[-2:]]
    assert ["cudaStreamEndCapture", "cudaGraphDestroy"] == ends


def test_pycuda_frees_before_it_leaves_the_context(pycuda: FakePycuda):
    """Memory first, then the context is popped and let go, once."""
    held = PycudaMemory()
    held.allocate(10)
    held.allocate(20)
    held.close()
    held.close()
    assert ["push", "free 20", "free 10", "pop", "detach"] == pycuda.calls


def test_pycuda_copies_on_its_stream(pycuda: FakePycuda):
    """Both directions are asynchronous, on the stream that executions use."""
    held = PycudaMemory()
    array = np.zeros(4, np.float32)
    held.copy_in(5, array)
    held.copy_out(array, 5)
    held.synchronize()
    assert ["in 5 16 42", "out 5 16 42", "synchronize"] == pycuda.calls[1:]
    assert 42 == held.stream


def test_pycudas_errors_are_lacks_of_the_machine(pycuda: FakePycuda):
    """The library's words arrive in one sentence."""
    held = PycudaMemory()
    with pytest.raises(EnvironmentLackError) as refusal:
        held.allocate(1000)
    assert "CUDA: allocating 1000 bytes failed: cuMemAlloc failed: out of memory" == str(
        refusal.value
    )
    with pytest.raises(EnvironmentLackError, match="CUDA graphs need cuda-python"):
        held.capture(lambda: None)


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-python not installed")
def test_the_real_cuda_python_says_what_a_machine_without_driver_lacks():
    """Its functions exist under the names used here and fail with a sentence."""
    runtime = cuda_python_memory._runtime()
    names = (
        "cudaMalloc", "cudaFree", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaStreamDestroy",
        "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiateWithFlags",
        "cudaGraphDestroy", "cudaGraphLaunch", "cudaGraphExecDestroy",
    )  # fmt: skip
    assert [] == [name for name in names if not hasattr(runtime, name)]
    if driver.driver_lack():
        with pytest.raises(EnvironmentLackError, match=r"^CUDA: cudaStreamCreate failed: "):
            CudaPythonMemory()


def test_an_unknown_maker_of_an_engine_is_named(monkeypatch: pytest.MonkeyPatch):
    """An engine of a library that this version does not know is not handed to another."""
    monkeypatch.setattr(driver, "driver_lack", lambda: None)
    with pytest.raises(EnvironmentLackError) as refusal:
        runtime_modules.runtime_module("openvino")
    assert (
        "the engine was made by 'openvino', which this version does not run (known: tensorrt-rtx, "
        "tensorrt)"
    ) == str(refusal.value)


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        (
            "tensorrt-rtx",
            "tensorrt_rtx is not installed, so the engine cannot run: "
            "pip install 'repvgg-exporter[rtx]'",
        ),
        (
            "tensorrt",
            "tensorrt is not installed, so the engine cannot run: JetPack brings it; elsewhere "
            "pip install tensorrt",
        ),
    ],
)
def test_a_missing_runtime_is_named(monkeypatch: pytest.MonkeyPatch, backend, sentence):
    """The sentence says which library and where it comes from."""

    def missing(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(driver, "driver_lack", lambda: None)
    monkeypatch.setattr(runtime_modules.importlib, "import_module", missing)
    with pytest.raises(EnvironmentLackError) as refusal:
        runtime_modules.runtime_module(backend)
    assert sentence == str(refusal.value)


def test_no_runtime_is_imported_without_a_driver(monkeypatch: pytest.MonkeyPatch):
    """A runtime crashes the process where there is no driver, so it is not touched."""
    monkeypatch.setattr(driver, "driver_lack", lambda: NO_DRIVER)
    monkeypatch.setattr(runtime_modules.importlib, "import_module", lambda _name: 1 / 0)
    with pytest.raises(EnvironmentLackError, match="no NVIDIA driver"):
        runtime_modules.runtime_module("tensorrt-rtx")


def test_the_gpu_to_build_for_is_the_drivers(monkeypatch: pytest.MonkeyPatch):
    """Without one the sentence says how to go on."""
    monkeypatch.setattr(driver, "driver_lack", lambda: None)
    monkeypatch.setattr(driver, "device_target", lambda: "sm87")
    assert "sm87" == runtime_modules.this_gpu()
    monkeypatch.setattr(driver, "driver_lack", lambda: NO_DRIVER)
    with pytest.raises(EnvironmentLackError) as refusal:
        runtime_modules.this_gpu()
    assert (
        f"there is no GPU to build the engine for: {NO_DRIVER}; run this on the device, or name "
        "one with --target, such as sm86"
    ) == str(refusal.value)
