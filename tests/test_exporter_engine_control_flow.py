"""Which calls our code makes on each TensorRT release, seen by a fake that only records.

The fake has exactly the names that the published bindings of a release have, and builds nothing.
These tests say which flags are set and what is refused; they are no evidence that any engine works.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.engine import (
    BuildOptions,
    BuildRequest,
    Dla,
    HardwareCompatibility,
    Quantization,
    Typing,
)
from exporter.engine.callbacks import make_logger
from exporter.engine.capabilities import Api, Capability, needs, probe
from exporter.engine.refusal import BadInputError, RefusedError
from exporter.engine.worker import ProgressPrinter, build
from exporter.profiles import BatchProfile
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

OLD, MIDDLE, LATE, NEW, RTX = surface.RELEASES
CACHE = "TRT-100300-EntropyCalibration2\ninput: 3c8d13a5\n"


@pytest.fixture
def request_(tmp_path: Path) -> BuildRequest:
    """An fp16 build of a half graph whose float graph is at hand."""
    (tmp_path / "calibration.cache").write_text(CACHE)
    return BuildRequest(
        onnx_path=tmp_path / "typed.onnx",
        float_path=tmp_path / "float.onnx",
        precision=Precision.FP16,
        targets=("sm86",),
        batch=BatchProfile(1, 8, 32),
    )


def record(release: str, request: BuildRequest, **answers) -> tuple[list[str], tuple[str, ...]]:
    """What the build did on the fake of ``release``, and its notes."""
    fake = recording_fake.RecordingTensorRt(surface.Surface.load(release), **answers)
    api = probe(fake)
    library = release.partition("-")[0]
    printer = ProgressPrinter(io.StringIO())
    built = build(api, library, make_logger(api, io.StringIO()), printer, request)
    return fake.record, built.notes


def implicit(request: BuildRequest, *, dla: Dla | None = None) -> BuildRequest:
    """The same network in implicit INT8, with a fixed batch."""
    cache = request.onnx_path.with_name("calibration.cache")
    return replace(
        request,
        precision=Precision.INT8,
        batch=BatchProfile(1, 1, 1),
        options=BuildOptions(calibration_cache=cache, dla=dla),
    )


def graph_and_flags(calls: list[str]) -> tuple[str, str, list[str]]:
    """The network's creation flags, the graph that was parsed, and the builder flags set."""
    words = [call.split() for call in calls]
    network = next(call[1] for call in words if call[0] == "create_network")
    flags = [call[1] for call in words if call[0] == "set_flag"]
    return network, next(c[1] for c in words if c[0] == "parse_from_file"), flags


@pytest.fixture(autouse=True)
def readable_paths(monkeypatch: pytest.MonkeyPatch):
    """The record shows the name of the graph that is parsed."""

    def word(value) -> str:
        return Path(value).name if isinstance(value, str) else original(value)

    original = recording_fake._word
    monkeypatch.setattr(recording_fake, "_word", word)


@pytest.mark.parametrize(
    ("release", "precision", "expected"),
    [
        (OLD, Precision.FP32, ("1", "typed.onnx", [])),
        (OLD, Precision.FP16, ("1", "float.onnx", ["FP16"])),
        (OLD, Precision.INT8, ("1", "typed.onnx", ["INT8"])),
        (MIDDLE, Precision.FP32, ("3", "typed.onnx", [])),
        (MIDDLE, Precision.FP16, ("3", "typed.onnx", [])),
        (MIDDLE, Precision.INT8, ("3", "typed.onnx", [])),
        (LATE, Precision.INT8, ("9", "typed.onnx", [])),
        (NEW, Precision.FP16, ("4", "typed.onnx", [])),
        (NEW, Precision.INT8, ("4", "typed.onnx", [])),
        (RTX, Precision.FP16, ("1", "typed.onnx", [])),
        (RTX, Precision.INT8, ("1", "typed.onnx", [])),
    ],
)
def test_types_come_from_the_graph_where_the_release_is_strongly_typed(
    request_, release: str, precision: Precision, expected: tuple[str, str, list[str]]
):
    """8.6 reads the float graph under flags; from 10 on the typed graph is read, without any.

    The creation flags are the fake's numbering of the names that the release has.
    """
    calls, _ = record(release, replace(request_, precision=precision))

    assert expected == graph_and_flags(calls)
    assert "clear_flag TF32" in calls
    assert "profiling_verbosity = DETAILED" in calls


@pytest.mark.parametrize("release", [OLD, MIDDLE])
def test_implicit_int8_reads_the_float_graph_and_a_calibrator(request_, release: str):
    """Up to 10 a calibration cache means float graph, INT8 flag and our calibrator."""
    calls, notes = record(release, implicit(request_))

    assert ("float.onnx", ["INT8"]) == graph_and_flags(calls)[1:]
    assert "int8_calibrator = CacheOnly" in calls
    assert notes == (
        "implicit INT8: scales come from the calibration cache, weights are rounded by the "
        "builder, which itself chooses among fp32 and int8",
    )


@pytest.mark.parametrize("release", [OLD, MIDDLE])
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (BuildOptions(quantization=Quantization.IMPLICIT), ["INT8"]),
        (BuildOptions(dla=Dla()), ["FP16", "INT8", "GPU_FALLBACK"]),
    ],
)
def test_the_bundles_own_cache_needs_no_file_to_be_named(request_, release, options, flags):
    """Asked for by name, or by a DLA: the cache beside the graphs goes to the calibrator."""
    cache = request_.onnx_path.with_name("calibration.cache")
    request = replace(implicit(request_), options=options, cache_path=cache)

    calls, _ = record(release, request)

    assert ("float.onnx", flags) == graph_and_flags(calls)[1:]
    assert "int8_calibrator = CacheOnly" in calls


@pytest.mark.parametrize("release", [LATE, NEW, RTX])
def test_the_bundles_own_cache_changes_nothing_where_it_is_not_asked_for(request_, release):
    """Q/DQ nodes bind; the cache is there for those who need it."""
    cache = request_.onnx_path.with_name("calibration.cache")
    request = replace(implicit(request_), options=BuildOptions(), cache_path=cache)

    calls, _ = record(release, request)

    assert ("typed.onnx", []) == graph_and_flags(calls)[1:]


@pytest.mark.parametrize("release", [NEW, RTX])
def test_implicit_int8_is_refused_where_it_was_removed(request_, release: str):
    """11 and TensorRT-RTX take INT8 from Q/DQ nodes only."""
    with pytest.raises(BadInputError) as caught:
        record(release, implicit(request_))

    library, version = release.split("-", maxsplit=1)[0], surface.Surface.load(release).version
    assert str(caught.value) == (
        f"{library} {version} takes no calibration cache: implicit INT8 was removed in TensorRT "
        "11; build the Q/DQ graph without one"
    )


def test_typing_can_be_weak_on_10_and_is_refused_where_there_is_none(request_):
    """weak on 10.3 sets the flag; weak on 11 and strong on 8.6 are bad input."""
    weak = replace(request_, options=BuildOptions(typing=Typing.WEAK))
    strong = replace(request_, options=BuildOptions(typing=Typing.STRONG))

    calls, notes = record(MIDDLE, weak)
    assert ("1", "float.onnx", ["FP16"]) == graph_and_flags(calls)
    assert ("weakly typed: the builder itself chooses among fp32 and fp16",) == notes
    with pytest.raises(BadInputError, match=r"11\.4\.0\.106 builds strongly typed networks only"):
        record(NEW, weak)
    with pytest.raises(BadInputError, match=r"8\.6\.1 has no strongly typed networks"):
        record(OLD, strong)
    assert "3" == graph_and_flags(record(MIDDLE, strong)[0])[0]


def test_without_a_float_graph_a_weak_build_reads_the_half_graph(request_):
    """It is worse for the builder's choice of types and still the network asked for."""
    calls, _ = record(OLD, replace(request_, float_path=None))

    assert ("typed.onnx", ["FP16"]) == graph_and_flags(calls)[1:]


def test_dla_before_11_is_weakly_typed_and_implicit(request_):
    """fp16 sets FP16; int8 needs the cache and sets FP16 beside INT8; both may fall back."""
    dla = Dla(core=1)
    half = replace(request_, batch=BatchProfile(1, 1, 1), options=BuildOptions(dla=dla))

    for request, flags in ((half, ["FP16"]), (implicit(request_, dla=dla), ["FP16", "INT8"])):
        calls, _ = record(MIDDLE, request)
        assert ("1", "float.onnx", [*flags, "GPU_FALLBACK"]) == graph_and_flags(calls)
        assert "default_device_type = DLA" in calls
        assert 2 == calls.count("DLA_core = 1")  # of the builder, then of the runtime

    with pytest.raises(
        BadInputError, match="takes INT8 from a calibration cache and not from Q/DQ"
    ):
        record(MIDDLE, replace(half, precision=Precision.INT8))
    calls, _ = record(NEW, replace(half, precision=Precision.INT8))
    assert ("typed.onnx", ["GPU_FALLBACK"]) == graph_and_flags(calls)[1:]


def test_layers_that_the_dla_does_not_take_are_listed_or_refused(request_):
    """With fallback they are a note, without it the build is refused."""
    answers = {"IBuilderConfig.can_run_on_DLA": False}

    def on_dla(dla: Dla) -> BuildRequest:
        return replace(request_, options=BuildOptions(dla=dla))

    _, notes = record(OLD, on_dla(Dla()), **answers)

    sentence = "the DLA does not take 2 of 2 layers: layer (SHUFFLE), layer (SHUFFLE)"
    assert f"{sentence}; the GPU runs them" == notes[-1]
    with pytest.raises(RefusedError) as caught:
        record(OLD, on_dla(Dla(gpu_fallback=False)), **answers)
    assert f"{sentence}; allow the GPU fallback to run them on the GPU" == str(caught.value)
    with pytest.raises(BadInputError, match="no DLA core 2 on this machine, it has 2"):
        record(OLD, on_dla(Dla(core=2)))


def test_every_option_is_set_and_none_by_default(request_, tmp_path: Path):
    """Workspace, level, compatibility and timing cache reach the builder; the cache is kept."""
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"before")
    options = BuildOptions(
        timing_cache=cache,
        optimization_level=5,
        hardware_compatibility=HardwareCompatibility.AMPERE_PLUS,
        version_compatible=True,
    )

    calls, _ = record(OLD, replace(request_, workspace_mib=64, options=options))

    assert {
        "set_memory_pool_limit WORKSPACE 67108864",
        "builder_optimization_level = 5",
        "hardware_compatibility_level = AMPERE_PLUS",
        "set_flag VERSION_COMPATIBLE",
        "engine_host_code_allowed = True",
        "create_timing_cache b'before'",
        "set_timing_cache False",
    } <= set(calls)
    assert (b"timings", ["calibration.cache", "timing.cache"]) == (
        cache.read_bytes(),
        sorted(path.name for path in tmp_path.iterdir()),
    )
    plain, _ = record(OLD, request_)
    assert [] == [c for c in plain if c.split()[0] in ("set_memory_pool_limit", "set_timing_cache")]


def test_a_timing_cache_of_another_device_is_refused(request_, tmp_path: Path):
    """The builder's refusal is passed on with the file's name, and the file stays."""
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"other")
    request = replace(request_, options=BuildOptions(timing_cache=cache))

    with pytest.raises(BadInputError) as caught:
        record(OLD, request, **{"IBuilderConfig.set_timing_cache": False})

    assert str(caught.value) == (
        f"timing cache {cache} comes from another TensorRT or GPU: name another file"
    )
    assert b"other" == cache.read_bytes()


def test_same_compute_capability_exists_from_10_16_on(request_):
    """Older releases refuse it by name."""
    level = HardwareCompatibility.SAME_COMPUTE_CAPABILITY
    request = replace(request_, options=BuildOptions(hardware_compatibility=level))

    assert "hardware_compatibility_level = SAME_COMPUTE_CAPABILITY" in record(LATE, request)[0]
    with pytest.raises(BadInputError) as caught:
        record(MIDDLE, request)
    assert str(caught.value) == (
        "TensorRT 10.3.0 has no hardware compatibility same-compute-capability; it has none and "
        "ampere+"
    )


@pytest.mark.parametrize("release", surface.RELEASES)
def test_progress_targets_and_inspection_follow_the_library(request_, release: str):
    """A monitor from 10 on, named targets on TensorRT-RTX only, an inspected plan on full ones."""
    calls, _ = record(release, request_)

    assert (release != OLD) == ("progress_monitor = Monitor" in calls)
    assert (release == RTX) == ("set_compute_capability SM86 0" in calls)
    assert (release != RTX) == ("get_engine_information JSON" in calls)


def ask_for_images(fake):
    """A builder that wants data: it calls the calibrator that it was given."""
    config_calls = [call for call in fake.record if call.startswith("int8_calibrator")]
    assert config_calls == ["int8_calibrator = CacheOnly"]
    for calibrator in CALIBRATORS:
        assert calibrator.read_calibration_cache().startswith(b"TRT-8601-EntropyCalibration2\n")
        assert 1 == calibrator.get_batch_size()
        assert calibrator.get_batch(["input"]) is None
    return b"plan"


CALIBRATORS: list = []


def test_a_builder_that_asks_for_images_fails_the_build(request_, monkeypatch):
    """The calibrator has the cache under the release's own header, no images, and remembers."""
    from exporter.engine import worker

    def remembering(api, config, cache):
        CALIBRATORS.append(original(api, config, cache))
        return CALIBRATORS[-1]

    original = worker.set_calibrator
    CALIBRATORS.clear()
    monkeypatch.setattr(worker, "set_calibrator", remembering)

    with pytest.raises(RefusedError) as caught:
        record(OLD, implicit(request_), **{"Builder.build_serialized_network": ask_for_images})

    assert str(caught.value) == (
        "the builder does not accept the calibration cache and asks for calibration images"
    )


def test_a_damaged_calibration_cache_is_named(request_):
    """The file and its first bad line are in the message."""
    request = implicit(request_)
    request.options.calibration_cache.write_text("nonsense")

    with pytest.raises(BadInputError) as caught:
        record(OLD, request)

    assert str(caught.value) == (
        f"calibration cache {request.options.calibration_cache} cannot be used: calibration cache "
        "starts with 'nonsense', not with TRT-<version>-<calibrator>"
    )


def test_a_marked_function_refuses_a_release_without_its_capability():
    """Calling one where its names do not exist is a mistake of ours, found at once."""

    @needs(Capability.FP16_FLAG)
    def allow(_api: Api) -> None:
        """Never reached."""

    with pytest.raises(RuntimeError, match="allow called on a TensorRT without FP16_FLAG"):
        allow(Api(trt=None, capabilities=frozenset()))


def test_the_fake_has_no_names_but_the_release_s_own():
    """Reading, calling or setting anything else fails, so the fake cannot hide a mistake."""
    fake = recording_fake.RecordingTensorRt(surface.Surface.load(NEW))
    config = fake.IBuilderConfig()

    assert not hasattr(fake.BuilderFlag, "FP16")
    assert not hasattr(fake, "IInt8EntropyCalibrator2")
    with pytest.raises(AttributeError, match=r"IBuilderConfig\.int8_calibrator cannot be set"):
        config.int8_calibrator = None
    with pytest.raises(AttributeError, match="IBuilderConfig has no set_flags"):
        config.set_flags()
