"""Every TensorRT name that our source uses exists in each release on whose path it is used.

The API lists under ``tests/tensorrt_api`` were read out of the published bindings; which names our
source uses is derived from the source. Nothing of TensorRT is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import exporter.engine
from exporter.engine import capabilities
from exporter.engine.capabilities import Capability

HOME = Path(exporter.engine.__file__).resolve().parents[1]
SURFACE = Path(__file__).parent / "tensorrt_api" / "surface.py"
ROOMS = ("engine", "device")

_spec = importlib.util.spec_from_file_location("tensorrt_surface", SURFACE)
surface = importlib.util.module_from_spec(_spec)
sys.modules["tensorrt_surface"] = surface
_spec.loader.exec_module(surface)


@functools.cache
def sources() -> dict[str, str]:
    """The modules that may hold TensorRT values, by path."""
    paths = sorted(path for room in ROOMS for path in (HOME / room).glob("*.py"))
    return {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8") for path in paths}


@functools.cache
def returns():
    return surface.return_annotations(sources())


load = functools.cache(surface.Surface.load)


def check(name: str, release: str, source: str | None = None):
    return surface.check(source or sources()[name], load(release), returns())


def uses(release: str) -> set[str]:
    return {use.path for name in sources() for use in check(name, release).uses}


@pytest.mark.parametrize("release", surface.RELEASES)
def test_every_name_we_use_exists_in_the_release(release: str):
    """No attribute, argument list or override of ours is missing from this release's bindings."""
    problems = [f"{name}: {p}" for name in sources() for p in check(name, release).problems]

    assert [] == problems


def table() -> dict[str, set[str]]:
    """Release -> capabilities, as the docstring of `capabilities` states them."""
    lines = capabilities.__doc__.splitlines()
    rows = [
        line.split() for line in lines[lines.index("") :] if re.match(r"[A-Z_0-9]+ +(yes|-)", line)
    ]
    return {
        release: {row[0] for row in rows if row[1 + column] == "yes"}
        for column, release in enumerate(surface.RELEASES)
    }


@pytest.mark.parametrize("release", surface.RELEASES)
def test_each_release_has_the_capabilities_of_the_table(release: str):
    """The table in the docstring of `capabilities` is what the API lists say."""
    assert table()[release] == {c.name for c in load(release).capabilities}


def test_every_capability_is_had_by_some_release_and_lacked_by_another():
    """None is always true, so each guards something, and none is never true, so all is checked."""
    for capability in Capability:
        have = [release for release in surface.RELEASES if capability.name in table()[release]]
        assert 0 < len(have) < len(surface.RELEASES), capability


@pytest.mark.parametrize(
    ("path", "releases"),
    [
        ("BuilderFlag.TF32", surface.RELEASES),
        ("BuilderFlag.FP16", surface.RELEASES[:3]),
        ("BuilderFlag.INT8", surface.RELEASES[:3]),
        ("BuilderFlag.BF16", surface.RELEASES[1:3]),
        ("BuilderFlag.FP8", surface.RELEASES[:3]),
        ("IInt8EntropyCalibrator2.read_calibration_cache", surface.RELEASES[:3]),
        ("NetworkDefinitionCreationFlag.EXPLICIT_BATCH", surface.RELEASES[:3]),
        ("NetworkDefinitionCreationFlag.STRONGLY_TYPED", surface.RELEASES[1:]),
        ("IBuilderConfig.progress_monitor", surface.RELEASES[1:]),
        ("ParserError.node_name", surface.RELEASES[1:]),
        ("IBuilderConfig.set_compute_capability", surface.RELEASES[4:]),
        ("IRuntimeConfig.set_runtime_cache", surface.RELEASES[4:]),
        ("IRuntimeCache.deserialize", surface.RELEASES[4:]),
        ("ICudaEngine.create_runtime_config", surface.RELEASES[4:]),
        ("IExecutionContext.execute_async_v3", surface.RELEASES),
        ("IBuilderConfig.can_run_on_DLA", surface.RELEASES),
        ("IBuilderConfig.set_timing_cache", surface.RELEASES),
        ("EngineInspector.get_engine_information", surface.RELEASES),
    ],
)
def test_a_name_is_used_on_the_path_of_exactly_these_releases(path: str, releases: tuple[str, ...]):
    """What the walk finds is what the releases differ in."""
    assert list(releases) == [r for r in surface.RELEASES if path in uses(r)]


def test_the_walk_follows_every_object_of_a_build():
    """Members of all classes that a build and a verdict touch are among the uses."""
    classes = {path.partition(".")[0] for path in uses("tensorrt-10.16")}

    assert {
        "Builder", "INetworkDefinition", "IBuilderConfig", "OnnxParser", "ParserError", "ITensor",
        "ILayer", "IOptimizationProfile", "ITimingCache", "IProgressMonitor", "ILogger", "Runtime",
        "IInt8EntropyCalibrator2", "ICudaEngine", "EngineInspector", "IExecutionContext",
    } <= classes  # fmt: skip
    only_rtx = {path.partition(".")[0] for path in uses("tensorrt_rtx-1.7.1")} - classes
    assert {
        "ComputeCapability", "DynamicShapesKernelSpecializationStrategy", "IRuntimeConfig",
        "IRuntimeCache",
    } == only_rtx  # fmt: skip


@pytest.mark.parametrize("release", ["tensorrt-10.16", "tensorrt_rtx-1.7.1"])
def test_misspelling_any_name_we_use_is_found(release: str):
    """One letter too many, in any one use of any name, gives a problem that names it."""
    missed = []
    mutants = 0
    for name, source in sources().items():
        for use in check(name, release).uses:
            if use.end_column < 0:
                continue
            lines = source.splitlines(keepends=True)
            line = lines[use.line - 1].encode()
            changed = line[: use.end_column] + b"x" + line[use.end_column :]
            lines[use.line - 1] = changed.decode()
            mutants += 1
            if use.attribute + "x" not in "\n".join(check(name, release, "".join(lines)).problems):
                missed.append(f"{name}:{use.line} {use.path}")

    assert [] == missed
    assert mutants > 60


@pytest.mark.parametrize(
    ("name", "old", "new", "release", "problem"),
    [
        (
            "engine/builder_config.py",
            "ignore_mismatch=False",
            "ignore_mismatches=False",
            "tensorrt-8.6.1",
            "IBuilderConfig.set_timing_cache takes ['cache', 'ignore_mismatch'], "
            "not ['ignore_mismatches']",
        ),
        (
            "engine/builder_config.py",
            "set_memory_pool_limit(pool, ",
            "set_memory_pool_limit(",
            "tensorrt-11.4",
            "IBuilderConfig.set_memory_pool_limit takes ['pool', 'pool_size'], given 1",
        ),
        (
            "engine/builder_config.py",
            "@needs(Capability.FP16_FLAG)\n",
            "",
            "tensorrt-11.4",
            "BuilderFlag has no FP16",
        ),
        (
            "engine/builder_config.py",
            "@needs(Capability.BF16_FLAG)\n",
            "",
            "tensorrt-8.6.1",
            "BuilderFlag has no BF16",
        ),
        (
            "engine/builder_config.py",
            "@needs(Capability.FP8_FLAG)\n",
            "",
            "tensorrt-11.4",
            "BuilderFlag has no FP8",
        ),
        (
            "engine/network_parser.py",
            "@needs(Capability.PARSER_NODES)\n",
            "",
            "tensorrt-8.6.1",
            "ParserError has no node_name",
        ),
        (
            "engine/legacy_int8.py",
            "@needs(Capability.CALIBRATOR)\n",
            "",
            "tensorrt-11.4",
            "the module has no IInt8EntropyCalibrator2",
        ),
        (
            "engine/legacy_int8.py",
            "def read_calibration_cache(",
            "def read_cache(",
            "tensorrt-10.3.0",
            "IInt8EntropyCalibrator2 has no method read_cache to override",
        ),
        (
            "engine/callbacks.py",
            "def log(self, severity: Severity, msg: str)",
            "def log(self, severity: Severity)",
            "tensorrt-10.3.0",
            "ILogger.log takes ['severity', 'msg']",
        ),
        (
            "engine/layer_inspection.py",
            "runtime.DLA_core = ",
            "runtime.deserialize_cuda_engine = ",
            "tensorrt-10.3.0",
            "Runtime.deserialize_cuda_engine is a method and cannot be set",
        ),
        (
            "engine/runtime_cache.py",
            "@needs(Capability.RUNTIME_CACHE)\ndef create_compiling_context(",
            "def create_compiling_context(",
            "tensorrt-11.4",
            "the module has no DynamicShapesKernelSpecializationStrategy",
        ),
        (
            "engine/runtime_cache.py",
            "cache.deserialize(content)",
            "cache.deserialize()",
            "tensorrt_rtx-1.7.1",
            "IRuntimeCache.deserialize takes ['blob'], given 0",
        ),
        (
            "engine/builder_config.py",
            "kind: LayerType = layer.type",
            "kind = layer.type",
            "tensorrt-10.3.0",
            "kind.name: annotate the value before name",
        ),
    ],
)
def test_other_mistakes_are_found_too(name: str, old: str, new: str, release: str, problem: str):
    """Arguments, lacking marks, overrides and values that cannot be followed give a problem."""
    source = sources()[name]
    assert source.count(old) == 1
    assert [] == check(name, release).problems

    problems = check(name, release, source.replace(old, new)).problems

    assert [problem] == [p.partition(": ")[2] for p in problems if problem in p]


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed"
)
def test_the_list_of_the_installed_library_is_true():
    """Every name that we use on TensorRT-RTX is one of the installed bindings."""
    import tensorrt_rtx

    from exporter.engine.capabilities import probe

    lacking = []
    for path in sorted(uses("tensorrt_rtx-1.7.1")):
        value = tensorrt_rtx
        for part in path.split("."):
            value = getattr(value, part, None)
        if value is None and not path.endswith((".name", ".value")):
            lacking.append(path)

    assert [] == lacking
    assert load("tensorrt_rtx-1.7.1").capabilities == probe(tensorrt_rtx).capabilities
