"""The engine runner's control flow. The runtime and the memory here are fakes: that an engine
computes the right thing is shown on a GPU only, by `verify`."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.device import compiling, engine_ports, engine_runner
from exporter.device.engine_ports import EnginePort, cut, smallest_cuttable
from exporter.device.engine_runner import EngineRunner
from exporter.device.kernel_cache import CacheState
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.profiles import BatchProfile

API = Path(__file__).parent / "tensorrt_api"


class Kind(Enum):
    """Stands for DataType, TensorIOMode and Severity."""

    FLOAT = "float"
    BF16 = "bf16"
    INPUT = "input"
    OUTPUT = "output"
    ERROR = "error"
    INFO = "info"


class FakeMemory:
    """Device memory made of host bytes; remembers every call."""

    name = "fake memory"
    stream = 7

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.bytes: dict[int, bytearray] = {}
        self._next = 1000

    def allocate(self, size_bytes: int) -> int:
        self.calls.append(f"allocate {size_bytes}")
        self._next += 1000
        self.bytes[self._next] = bytearray(size_bytes)
        return self._next

    def free(self, address: int) -> None:
        self.calls.append("free")
        del self.bytes[address]

    def copy_in(self, address: int, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.bytes[address][: array.nbytes] = array.tobytes()

    def copy_out(self, array: np.ndarray, address: int) -> None:
        array[...] = np.frombuffer(self.bytes[address], array.dtype, array.size).reshape(
            array.shape
        )

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def capture(self, work):
        self.calls.append("capture")
        work()
        return lambda: self.calls.append("launch")

    def close(self) -> None:
        self.bytes.clear()


class FakeTensorRt:
    """The calls of a TensorRT module that running an engine makes, on a made-up network.

    The network adds its two inputs' rows: ``scores[n] = sum(images[n]) + sum(extra[n])``.
    """

    __name__ = "fake_tensorrt"
    __version__ = "0.0"
    TensorIOMode = Kind

    class ILogger:
        def __init__(self) -> None: ...

    def __init__(self, memory: FakeMemory, *, low=1, high=4, loads=True, runs=True) -> None:
        self.memory = memory
        self.low, self.high, self.loads, self.runs = low, high, loads, runs
        self.output_kind = Kind.FLOAT
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.executed: list[int] = []
        self.num_io_tensors = 3

    def Runtime(self, logger):  # noqa: N802
        self.logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, plan: bytes):
        assert plan == b"plan"
        if not self.loads:
            self.logger.log(Kind.INFO, "reading")
            self.logger.log(Kind.ERROR, "compute capability\n 9.0 is not in the plan")
            return None
        return self

    # ICudaEngine
    def create_execution_context(self):
        return self

    def get_tensor_name(self, index: int) -> str:
        return ("scores", "extra", "images")[index]

    def get_tensor_mode(self, name: str) -> Kind:
        return Kind.OUTPUT if name == "scores" else Kind.INPUT

    def get_tensor_dtype(self, name: str) -> Kind:
        return self.output_kind if name == "scores" else Kind.FLOAT

    def get_tensor_profile_shape(self, name: str, _profile: int):
        rest = (2, 3) if name == "images" else (2,)
        return [(size, *rest) for size in (self.low, self.low, self.high)]

    # IExecutionContext
    def set_input_shape(self, name: str, shape) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, _name: str):
        return (self.shapes["images"][0],)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not self.runs:
            self.logger.log(Kind.ERROR, "out of luck")
            return False
        assert stream == FakeMemory.stream
        total = 0
        for name in ("images", "extra"):
            shape = self.shapes[name]
            data = np.frombuffer(
                self.memory.bytes[self.addresses[name]], np.float32, int(np.prod(shape))
            )
            total = total + data.reshape(shape[0], -1).sum(axis=1)
        values = np.asarray(total, np.float32).tobytes()
        self.memory.bytes[self.addresses["scores"]][: len(values)] = values
        self.executed.append(self.shapes["images"][0])
        return True


def test_an_engine_of_pixels_takes_uint8_only():
    """Of the layout's shape; floats are refused before the GPU sees them."""
    shape = (1, 4, 4, 3)
    port = EnginePort(name="images", dtype=np.dtype(np.uint8), smallest=shape, largest=shape)
    assert port.complaint(np.zeros((1, 4, 4, 3), np.uint8)) is None
    assert "input images is float32, the engine takes uint8" == port.complaint(
        np.zeros((1, 4, 4, 3), np.float32)
    )
    assert ("input images is [1, 3, 4, 4]: axis 1 is 3, the engine takes 4") == port.complaint(
        np.zeros((1, 3, 4, 4), np.uint8)
    )


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"plan")
    return path


def arrays(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs in the network's order: images, extra."""
    generator = np.random.default_rng(count)
    return (
        generator.normal(size=(count, 2, 3)).astype(np.float32),
        generator.normal(size=(count, 2)).astype(np.float32),
    )


def opened(plan: Path, **options) -> tuple[EngineRunner, FakeTensorRt, FakeMemory]:
    memory = FakeMemory()
    trt = FakeTensorRt(memory, **options)
    return EngineRunner(plan, trt, memory, input_names=("images", "extra")), trt, memory


def test_outputs_come_back_for_inputs_in_the_networks_order(plan: Path):
    """Inputs are passed by the names given, whatever order the engine lists them in."""
    runner, trt, _ = opened(plan)
    images, extra = arrays(3)

    outputs = runner.run((images, extra))

    assert list(outputs) == ["scores"]
    expected = images.sum(axis=(1, 2)) + extra.sum(axis=1)
    np.testing.assert_allclose(outputs["scores"], expected, rtol=1e-5)
    assert [3] == trt.executed


def test_a_batch_beyond_the_profile_is_cut(plan: Path):
    """Nine images through an engine of at most four run as three threes, in order."""
    runner, trt, _ = opened(plan)
    images, extra = arrays(9)

    scores = runner.run((images, extra))["scores"]

    assert [3, 3, 3] == trt.executed
    np.testing.assert_allclose(scores, images.sum(axis=(1, 2)) + extra.sum(axis=1), rtol=1e-5)


def test_an_array_that_is_not_contiguous_is_copied_first(plan: Path):
    """A view with strides computes the same as its copy."""
    runner, _, _ = opened(plan)
    wide = np.ascontiguousarray(np.arange(36, dtype=np.float32).reshape(3, 4, 3))
    extra = np.zeros((3, 2), np.float32)

    scores = runner.run((wide[:, ::2], extra))["scores"]

    np.testing.assert_allclose(scores, wide[:, ::2].sum(axis=(1, 2)))


def test_buffers_are_kept_and_grow_only(plan: Path):
    """A second run of the same or a smaller size allocates nothing."""
    runner, _, memory = opened(plan)
    runner.run(arrays(2))
    before = len(memory.calls)
    runner.run(arrays(2))
    runner.run(arrays(1))
    assert not [call for call in memory.calls[before:] if call.startswith(("allocate", "free"))]

    runner.run(arrays(4))

    assert 3 == memory.calls[before:].count("free")
    assert 3 == len(memory.bytes)


def test_closing_gives_all_memory_back(plan: Path):
    """After the with statement no allocation is left."""
    runner, _, memory = opened(plan)
    with runner:
        runner.run(arrays(2))
        assert 3 == len(memory.bytes)
        with pytest.raises(InputError):
            runner.run(())
    assert {} == memory.bytes


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        (arrays(2)[:1], "1 arrays were passed, the engine takes 2: images, extra"),
        (
            (arrays(2)[0].astype(np.float64), arrays(2)[1]),
            "input images is float64, the engine takes float32",
        ),
        (
            (arrays(2)[0][:, 0], arrays(2)[1]),
            "input images has 2 axes [2, 3], the engine takes 3",
        ),
        (
            (np.zeros((2, 2, 5), np.float32), arrays(2)[1]),
            "input images is [2, 2, 5]: axis 2 is 5, the engine takes 3",
        ),
        (
            (arrays(2)[0], arrays(3)[1]),
            "the inputs hold different numbers of images: [2, 3]",
        ),
        (arrays(1), "batch 1 is below the engine's profile 2:2:4"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_is_copied(plan: Path, batch, sentence: str):
    """Each kind of misfit has its sentence."""
    runner, trt, memory = opened(plan, low=2)
    with pytest.raises(InputError) as refusal:
        runner.run(batch)
    assert sentence == str(refusal.value)
    assert [] == trt.executed == memory.calls


def test_five_images_do_not_fit_an_engine_of_three_to_four(plan: Path):
    """A count that no cut fits is refused."""
    runner, _, _ = opened(plan, low=3)
    with pytest.raises(InputError) as refusal:
        runner.run(arrays(5))
    assert "5 images cannot be cut into batches within the engine's profile 3:3:4" == str(
        refusal.value
    )


def test_an_engine_for_another_gpu_is_a_lack_with_the_librarys_words(plan: Path):
    """What the logger heard is the reason; information is no reason."""
    with pytest.raises(EnvironmentLackError) as refusal:
        opened(plan, loads=False)
    assert (
        f"fake_tensorrt 0.0 does not load {plan} on this GPU: compute capability 9.0 is not in the "
        "plan; `repvgg-export build` makes an engine for this machine"
    ) == str(refusal.value)


def test_a_refused_execution_is_a_failed_gate(plan: Path):
    """TensorRT's own words are in the message."""
    runner, _, _ = opened(plan, runs=False)
    with pytest.raises(GateFailedError, match=r"^the engine does not run: out of luck$"):
        runner.run(arrays(1))


def test_a_type_that_numpy_lacks_is_refused():
    """BF16 inputs and outputs are named."""
    trt = FakeTensorRt(FakeMemory())
    trt.output_kind = Kind.BF16
    with pytest.raises(InputError) as refusal:
        engine_ports.read_port(trt, trt, 0)
    assert "the engine's scores is of type BF16, which numpy does not have" == str(refusal.value)


def test_other_inputs_than_the_bundles_are_refused(plan: Path):
    """The engine of another network is not fed."""
    memory = FakeMemory()
    with pytest.raises(InputError) as refusal:
        EngineRunner(plan, FakeTensorRt(memory), memory, input_names=("images",))
    assert "the engine's inputs are extra, images, not images" == str(refusal.value)


def test_a_prepared_batch_executes_without_copies(plan: Path):
    """Preparing copies in and warms up; each step then executes and waits."""
    runner, trt, memory = opened(plan)
    step = runner.prepare(arrays(2))
    before = len(memory.calls)
    step()
    step()
    assert [2, 2, 2] == trt.executed
    assert ["synchronize", "synchronize"] == memory.calls[before:]


def test_a_cuda_graph_is_captured_after_the_first_execution_and_replayed(plan: Path):
    """Capturing follows one plain execution; the steps only launch the graph."""
    runner, trt, memory = opened(plan)
    step = runner.prepare(arrays(2), cuda_graph=True)
    assert ["synchronize", "capture"] == memory.calls[-2:]
    step()
    assert ["launch", "synchronize"] == memory.calls[-2:]
    assert [2, 2] == trt.executed


def test_a_batch_to_time_is_not_cut(plan: Path):
    """A stopwatch must not measure two executions as one."""
    runner, _, _ = opened(plan)
    with pytest.raises(InputError, match=r"^batch 5 is above the engine's profile 1:1:4$"):
        runner.prepare(arrays(5))


class FakeRtx(FakeTensorRt):
    """The same network on a library that compiles at the start and takes a cache of that."""

    IRuntimeCache = object
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, memory: FakeMemory) -> None:
        super().__init__(memory)
        self.loaded: list[bytes] = []
        self.compiled = b"kernels"

    def create_runtime_config(self):
        return SimpleNamespace(
            create_runtime_cache=lambda: SimpleNamespace(
                deserialize=lambda content: self.loaded.append(content) or True,
                serialize=lambda: self.compiled,
            ),
            set_runtime_cache=lambda _cache: True,
        )

    def create_execution_context(self, config):
        assert "eager" == config.dynamic_shapes_kernel_specialization_strategy
        return self


@pytest.fixture
def cache_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[bytes]]:
    """What lies in the user's cache, without the first line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling.driver, "device_target", lambda: "sm86")
    monkeypatch.setattr(compiling.driver, "device_name", lambda: "RTX")
    return lambda: [
        path.read_bytes().partition(b"\n")[2] for path in (tmp_path / "cache").rglob("*.bin")
    ]


def test_what_was_compiled_is_kept_for_the_next_start(plan: Path, cache_files):
    """The first start is cold; the second one hands the library what the first one left."""
    memory = FakeMemory()
    trt = FakeRtx(memory)
    with EngineRunner(plan, trt, memory) as cold:
        assert [] == cache_files()
        cold.run(arrays(2)[::-1])
    assert [b"kernels"] == cache_files()
    assert (CacheState.COLD, None) == (cold.startup.cache, cold.startup.cold_load_ms)

    trt.compiled = b"kernels and more"
    with EngineRunner(plan, trt, memory) as warm:
        warm.prepare(arrays(3)[::-1])

    assert [b"kernels"] == trt.loaded
    assert [b"kernels and more"] == cache_files()
    found = warm.startup
    assert (CacheState.WARM, cold.startup.load_ms) == (found.cache, found.cold_load_ms)
    assert cold.startup.first_run_ms == found.cold_first_run_ms
    assert [] == cold.startup.notes == found.notes


def test_nothing_is_kept_of_a_start_that_failed_or_did_not_run(plan: Path, cache_files):
    """An error may have left the GPU unusable; an engine that never ran compiled little."""
    memory = FakeMemory()
    trt = FakeRtx(memory)
    runner = EngineRunner(plan, trt, memory)
    runner.run(arrays(2)[::-1])
    with pytest.raises(InputError), runner:
        runner.run(())
    with EngineRunner(plan, trt, memory):
        pass
    assert [] == cache_files()
    assert {} == memory.bytes


def test_without_a_runtime_cache_nothing_is_read_or_kept(plan: Path, cache_files):
    """Kernels are compiled before their first use all the same."""
    memory = FakeMemory()
    trt = FakeRtx(memory)
    for caching in (True, False):
        with EngineRunner(plan, trt, memory, runtime_cache=caching) as runner:
            runner.run(arrays(2)[::-1])
        trt.compiled = b"other"
    assert (CacheState.OFF, None) == (runner.startup.cache, runner.startup.cold_load_ms)
    assert [] == trt.loaded
    assert [b"kernels"] == cache_files()


def test_full_tensorrt_has_no_runtime_cache(plan: Path, cache_files):
    """Its engines are compiled when they are built."""
    runner, _, _ = opened(plan)
    with runner:
        runner.run(arrays(2))
    assert runner.startup.cache is None
    assert runner.startup.first_run_ms > 0 < runner.startup.load_ms
    assert [] == cache_files()


@given(
    count=st.integers(1, 500),
    low=st.integers(1, 20),
    more=st.tuples(st.integers(0, 20), st.integers(0, 20)),
)
def test_a_cut_keeps_every_image_and_the_profile(count: int, low: int, more: tuple[int, int]):
    """Pieces add up, lie in the profile and are the fewest; filled up, every count can be cut."""
    profile = BatchProfile(low, low + more[0], low + sum(more))
    filled = smallest_cuttable(count, profile)
    pieces = cut(filled, profile)
    assert filled == sum(pieces) >= count
    assert all(profile.min <= piece <= profile.max for piece in pieces)
    assert len(pieces) == -(-count // profile.max)
    assert filled == count or filled == len(pieces) * profile.min


def used_names() -> dict[str, set[str]]:
    """Attribute names that our source takes from engine, context, runtime and module."""
    owners = {
        "_engine": "ICudaEngine",
        "engine": "ICudaEngine",
        "_context": "IExecutionContext",
        "_runtime": "Runtime",
    }
    found: dict[str, set[str]] = {}
    for module in (engine_runner, engine_ports, compiling):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(node, ast.Attribute):
                continue
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            if owner in owners:
                found.setdefault(owners[owner], set()).add(node.attr)
            elif owner == "trt" and not node.attr.startswith("__"):
                found.setdefault("module", set()).add(node.attr)
    return found


@pytest.mark.parametrize("path", sorted(API.glob("*.json")), ids=lambda path: path.stem)
def test_every_call_exists_in_every_release(path: Path):
    """What the runner uses is in the published bindings of each release."""
    api = json.loads(path.read_text())
    used = used_names()
    assert {"ICudaEngine", "IExecutionContext", "Runtime", "module"} == set(used)
    for owner in used.keys() - {"module"}:
        assert set() == used[owner] - set(api["classes"][owner]), owner
    assert set() == used["module"] - {*api["classes"], *api["enums"]}
    assert {"INPUT", "OUTPUT"} <= set(api["enums"]["TensorIOMode"])
