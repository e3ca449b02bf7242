"""The file of compiled kernels, and which calls are made for it; nothing here compiles a kernel."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.device import compiling
from exporter.device.compiling import CompiledKernels
from exporter.device.kernel_cache import CacheState, KernelCache, Startup, cache_folder

FOLDER = Path(__file__).parent / "tensorrt_api"


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"tensorrt_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


surface = _module("surface")
recording_fake = _module("recording_fake")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling.driver, "device_target", lambda: "sm86")
    monkeypatch.setattr(compiling.driver, "device_name", lambda: "RTX 3060")
    return tmp_path


def kept(plan: bytes = b"plan", library: str = "rtx-1", gpu: str = "sm86 A") -> KernelCache:
    return KernelCache(plan, library=library, gpu=gpu)


def written(content: bytes = b"kernels") -> Path:
    """The file after a cold start of 5 and 7 ms."""
    kept().write(content, load_ms=5.0, first_run_ms=7.0)
    (path,) = cache_folder().iterdir()
    return path


def test_what_was_written_is_read(home: Path):
    """Content and times come back; the folder is the user's alone."""
    path = written()
    assert home / "cache" / "repvgg-exporter" / "kernels" == path.parent
    assert 0o700 == path.parent.stat().st_mode & 0o777
    again = kept()
    assert b"kernels" == again.read()
    assert (5.0, 7.0, []) == (again.cold_load_ms, again.cold_first_run_ms, again.notes)


def test_a_warm_start_adds_kernels_and_keeps_the_cold_times():
    """The times in the file are those of the start that made it."""
    path = written()
    warm = kept()
    warm.read()
    warm.write(b"more kernels", load_ms=1.0, first_run_ms=1.0)
    again = kept()
    assert b"more kernels" == again.read()
    assert (5.0, 7.0) == (again.cold_load_ms, again.cold_first_run_ms)
    before = path.stat().st_mtime_ns
    again.write(b"more kernels", load_ms=1.0, first_run_ms=1.0)
    assert before == path.stat().st_mtime_ns


@pytest.mark.parametrize(
    "other", [{"plan": b"plan2"}, {"library": "rtx-2"}, {"gpu": "sm89 A"}, {"gpu": "sm86 B"}]
)
def test_another_engine_library_or_gpu_has_another_cache(other: dict[str, str | bytes]):
    """Each of them is part of the name."""
    written()
    stranger = kept(**other)
    assert (b"", []) == (stranger.read(), stranger.notes)
    stranger.write(b"its own", load_ms=1.0, first_run_ms=1.0)
    assert 2 == len(list(cache_folder().iterdir()))
    assert b"kernels" == kept().read()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _data: b"",
    "cut off": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "a flipped bit": lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    "no JSON": lambda data: b"{" + data,
    "another object": lambda data: b"[]\n" + data.partition(b"\n")[2],
    "no times": lambda data: json.dumps({"sha256": json.loads(data.partition(b"\n")[0])["sha256"]})
    .encode() + b"\n" + data.partition(b"\n")[2],
    "not text": lambda data: b"\xff\xfe\n" + data,
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache_is_ignored_with_a_note_and_made_anew(name: str):
    """No damaged byte reaches the library, and the next start is warm again."""
    path = written()
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    cache = kept()
    assert b"" == cache.read()
    (note,) = cache.notes
    assert note.startswith(f"runtime cache {path} is ignored and made anew: ")
    assert (None, None) == (cache.cold_load_ms, cache.cold_first_run_ms)
    cache.write(b"new", load_ms=2.0, first_run_ms=3.0)
    again = kept()
    assert (b"new", 2.0, 3.0) == (again.read(), again.cold_load_ms, again.cold_first_run_ms)


def test_a_cache_that_cannot_be_read_or_written_is_a_note():
    """A folder stands where the file should; nothing is left beside it."""
    path = written()
    path.unlink()
    path.mkdir()
    cache = kept()
    assert b"" == cache.read()
    cache.write(b"kernels", load_ms=1.0, first_run_ms=1.0)
    assert [
        f"runtime cache {path} is ignored and made anew: Is a directory",
        f"runtime cache {path} cannot be written: Is a directory",
    ] == cache.notes
    assert [path] == list(path.parent.iterdir())


def test_a_folder_that_cannot_be_made_is_a_note(home: Path):
    """A file stands in the way."""
    (home / "cache").write_text("in the way")
    cache = kept()
    cache.write(b"kernels", load_ms=1.0, first_run_ms=1.0)
    (note,) = cache.notes
    assert note.endswith("cannot be written: Not a directory")


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch):
    """A relative path in the variable does not count; without a home there is no folder."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    assert Path("/home/somebody/.cache/repvgg-exporter/kernels") == cache_folder()
    monkeypatch.setattr(Path, "home", homeless)
    cache = kept()
    assert b"" == cache.read()
    cache.write(b"kernels", load_ms=1.0, first_run_ms=1.0)
    assert ["no runtime cache is kept: Could not determine home directory."] == cache.notes


def started(release: str, *, caching: bool = True, **answers) -> tuple[list[str], Startup]:
    """The calls of one start on the fake of ``release``, from the engine on, and what it took."""
    fake = recording_fake.RecordingTensorRt(surface.Surface.load(release), **answers)
    fake.__name__ = "tensorrt_rtx"
    kernels = CompiledKernels(fake, b"plan", caching=caching)
    assert isinstance(kernels.create_context(fake.ICudaEngine()), fake.IExecutionContext)
    startup = Startup(load_ms=5.0, first_run_ms=7.0)
    kernels.describe(startup)
    kernels.keep(startup)
    kernels.release()
    kernels.keep(startup)
    return fake.record, startup


BEGIN = ["create_runtime_config", "dynamic_shapes_kernel_specialization_strategy = EAGER"]


def test_a_cold_and_a_warm_start_of_tensorrt_rtx():
    """The cache is filled before it is set, and set before the context is made."""
    calls, cold = started("tensorrt_rtx-1.7.1")
    assert [
        *BEGIN, "create_runtime_cache", "set_runtime_cache", "create_execution_context",
        "serialize",
    ] == calls  # fmt: skip
    assert (CacheState.COLD, []) == (cold.cache, cold.notes)
    calls, warm = started("tensorrt_rtx-1.7.1")
    assert [
        *BEGIN, "create_runtime_cache", "deserialize b'kernels'", "set_runtime_cache",
        "create_execution_context", "serialize",
    ] == calls  # fmt: skip
    assert (CacheState.WARM, 5.0, 7.0) == (warm.cache, warm.cold_load_ms, warm.cold_first_run_ms)
    calls, off = started("tensorrt_rtx-1.7.1", caching=False)
    assert [*BEGIN, "create_execution_context"] == calls
    assert CacheState.OFF is off.cache


def test_a_cache_that_the_library_rejects_is_made_anew():
    """Another driver, say: the start is cold and the note says why."""
    started("tensorrt_rtx-1.7.1")
    (path,) = cache_folder().iterdir()
    answers = {"IRuntimeCache.deserialize": False, "IRuntimeCache.serialize": b"newer"}
    _, found = started("tensorrt_rtx-1.7.1", **answers)
    assert (CacheState.COLD, None) == (found.cache, found.cold_load_ms)
    assert [
        f"runtime cache {path} is ignored and made anew: the library does not accept it here"
    ] == found.notes
    assert path.read_bytes().endswith(b"\nnewer")
    assert re.fullmatch(r"[0-9a-f]{32}-tensorrt_rtx_1\.7\.1[.\d]*-sm86_RTX_3060\.bin", path.name)


def test_a_library_that_takes_no_cache_runs_without_one():
    """Nothing is serialized."""
    calls, found = started("tensorrt_rtx-1.7.1", **{"IRuntimeConfig.set_runtime_cache": False})
    assert "serialize" not in calls
    assert (CacheState.OFF, ["no runtime cache is kept: the library does not take one"]) == (
        found.cache, found.notes,
    )  # fmt: skip


@pytest.mark.parametrize("release", [r for r in surface.RELEASES if "rtx" not in r])
def test_full_tensorrt_makes_a_plain_context(release: str):
    """None of the calls that it lacks is made."""
    calls, found = started(release)
    assert ["create_execution_context"] == calls
    assert found.cache is None
