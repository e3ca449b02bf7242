"""The backend of full TensorRT: where it can be had, what it refuses, what it asks of its worker.

No full TensorRT is at hand, so a stand-in worker answers; the calls to the library are held against
its bindings in test_exporter_engine_conformance.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.engine import (
    BuildOptions,
    BuildRequest,
    Dla,
    TensorRt,
    TensorRtRtx,
    device_target,
    dla_complaints,
    get_backend,
    parse_targets,
)
from exporter.engine.driver import device_name
from exporter.errors import EnvironmentLackError, InputError
from exporter.profiles import BatchProfile, SizeProfile
from exporter.spec import Precision

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


class Driver:
    """Stands for libcuda of a machine with an Orin: compute capability 8.7."""

    def __init__(self, code: int = 0) -> None:
        def initialize(_flags: int) -> int:
            return code

        self.cuInit = initialize

    @staticmethod
    def cuDeviceGet(_handle, _device: int) -> int:  # noqa: N802
        return 0

    @staticmethod
    def cuDeviceGetAttribute(value, attribute: int, _handle) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0

    @staticmethod
    def cuDeviceGetName(text, _length: int, _handle) -> int:  # noqa: N802
        text.value = b"Orin"
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Installs libraries (name to version) and a driver, or None for no driver."""

    def install(driver: Driver | None, **versions: str) -> None:
        def load(_name: str) -> Driver:
            if driver is None:
                raise OSError("no such file")
            return driver

        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.setattr(importlib.util, "find_spec", versions.get)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: versions[name])

    return install


def test_a_missing_library_is_told_with_the_way_to_it(machine):
    """`tensorrt` asked for and not installed is a lack of the environment, exit code 3."""
    machine(Driver())

    with pytest.raises(EnvironmentLackError) as caught:
        get_backend("tensorrt")

    assert 3 == caught.value.exit_code
    assert str(caught.value) == (
        "TensorRT is not installed here: on Jetson it comes with JetPack, elsewhere pip install "
        "'repvgg-exporter[tensorrt]'"
    )


def test_an_old_library_is_refused(machine):
    """Before 8.6 the API is another one."""
    machine(Driver(), tensorrt="8.5.3.1")

    with pytest.raises(
        EnvironmentLackError, match=r"TensorRT 8\.5\.3\.1 is too old, 8\.6 or later"
    ):
        get_backend("tensorrt")


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (None, "no NVIDIA driver on this machine (libcuda.so.1 does not load)"),
        (Driver(100), "the NVIDIA driver is installed but finds no GPU (cuInit error 100)"),
    ],
)
def test_the_library_is_not_touched_without_a_gpu(machine, driver, words: str):
    """Its builder would crash, so the driver is asked first."""
    machine(driver, tensorrt="10.3.0")

    with pytest.raises(EnvironmentLackError) as caught:
        get_backend("tensorrt")

    assert f"TensorRT builds on the device itself, and here is {words}" == str(caught.value)


def test_the_target_is_the_gpu_of_the_machine(machine):
    """Without a target it is taken, by its own name it is accepted, any other is refused."""
    machine(Driver(), tensorrt="10.3.0")
    backend = get_backend("tensorrt")

    assert ("sm87", "Orin") == (device_target(), device_name())
    for text in (None, "sm87", "8.7"):
        assert ("sm87",) == parse_targets(text, backend, Precision.INT8)
    with pytest.raises(InputError) as caught:
        parse_targets("sm86", backend, Precision.INT8)
    assert str(caught.value) == (
        "target sm86 is not the GPU of this machine (sm87): full TensorRT builds only for the GPU "
        "it runs on; build there"
    )


class SilentDriver(Driver):
    """Starts, and does not tell its device's compute capability."""

    @staticmethod
    def cuDeviceGetAttribute(_value, _attribute: int, _handle) -> int:  # noqa: N802
        return 1

    @staticmethod
    def cuDeviceGetName(_text, _length: int, _handle) -> int:  # noqa: N802
        return 1


def test_without_a_driver_or_its_answer_no_gpu_is_named(machine):
    """The question is safe anywhere; a backend without an answer is a lack of the environment."""
    machine(None)
    assert device_target() is device_name() is None

    machine(SilentDriver(), tensorrt="10.3.0")
    assert device_target() is device_name() is None
    with pytest.raises(EnvironmentLackError) as caught:
        parse_targets(None, get_backend("tensorrt"), Precision.INT8)
    assert "the NVIDIA driver does not tell which GPU is in here" == str(caught.value)


BOTH = {"tensorrt": "10.3.0", "tensorrt_rtx": "1.7.1"}


@pytest.mark.parametrize(
    ("installed", "target", "options", "expected"),
    [
        ((None, BOTH), None, BuildOptions(), TensorRtRtx),
        ((Driver(), BOTH), None, BuildOptions(), TensorRtRtx),
        ((Driver(), BOTH), "sm86,sm89", BuildOptions(), TensorRtRtx),
        ((Driver(), BOTH), "sm87", BuildOptions(), TensorRt),
        ((Driver(), BOTH), None, BuildOptions(dla=Dla()), TensorRt),
        ((None, BOTH), "sm87", BuildOptions(), TensorRtRtx),
        ((Driver(), {"tensorrt": "10.3.0"}), None, BuildOptions(), TensorRt),
        ((None, {"tensorrt_rtx": "1.7.1"}), "sm87", BuildOptions(dla=Dla()), TensorRtRtx),
    ],
)
def test_auto_takes_what_is_installed_and_can_build(
    machine, installed: tuple, target: str | None, options, expected: type
):
    """TensorRT-RTX, unless only full TensorRT can do it and is able to run here."""
    driver, versions = installed
    machine(driver, **versions)

    assert expected is type(get_backend("auto", target=target, options=options))


def test_auto_without_any_library_says_what_to_install(machine):
    """The one that builds anywhere is recommended."""
    machine(None)

    with pytest.raises(EnvironmentLackError) as caught:
        get_backend("auto")

    assert str(caught.value) == (
        "TensorRT-RTX is not installed, so no engine can be built: pip install "
        "'repvgg-exporter[rtx]'"
    )


REQUEST = BuildRequest(
    onnx_path=Path("/m/typed.onnx"),
    float_path=Path("/m/float.onnx"),
    precision=Precision.INT8,
    targets=("sm87",),
    batch=BatchProfile(1, 1, 1),
)


def test_a_dla_needs_fixed_shapes_and_no_fp32(machine, tmp_path: Path):
    """All that a DLA cannot do is told at once, before building."""
    machine(Driver(), tensorrt="10.9.0")
    model = tmp_path / "m.onnx"
    model.touch()
    request = replace(
        REQUEST,
        onnx_path=model,
        float_path=None,
        precision=Precision.FP32,
        batch=BatchProfile(1, 8, 32),
        size=SizeProfile((64, 64, 96), (64, 64, 96)),
        options=BuildOptions(dla=Dla()),
    )

    with pytest.raises(InputError) as caught:
        TensorRt(worker_command=["/nonexistent"]).build(request, lambda *_: None)

    assert str(caught.value) == (
        "a DLA computes in half or INT8, not in fp32; a DLA needs a fixed batch, not 1:8:32; a DLA "
        "needs a fixed image size, not 64:64:96; TensorRT 10.9.0 has no DLA support: 10.7 is the "
        "last before 11.4.1 (Jetson AGX Orin with JetPack 7.2.2)"
    )
    assert () == dla_complaints(BuildOptions(), request.precision, request.batch, request.size)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"onnx_path": "gone.onnx"}, "no ONNX file to build an engine from: {folder}/gone.onnx"),
        ({"float_path": "gone.onnx"}, "no ONNX file to build an engine from: {folder}/gone.onnx"),
        ({"cache_path": "gone"}, "no calibration cache to build an engine with: {folder}/gone"),
        ({"cache": "gone"}, "no calibration cache to build an engine with: {folder}/gone"),
        ({"timings": "gone/t.cache"}, "no folder to keep the timing cache in: {folder}/gone"),
    ],
)
def test_missing_files_are_named_before_building(machine, tmp_path: Path, change, words: str):
    """Graphs, calibration cache and the folder of the timing cache alike."""
    machine(Driver(), tensorrt="10.3.0")
    names = dict.fromkeys(("onnx_path", "float_path", "cache", "timings"), "m.onnx") | change
    (tmp_path / "m.onnx").touch()
    paths = {key: tmp_path / name for key, name in names.items()}
    request = replace(
        REQUEST,
        onnx_path=paths["onnx_path"],
        float_path=paths["float_path"],
        cache_path=paths.get("cache_path"),
        options=BuildOptions(calibration_cache=paths["cache"], timing_cache=paths["timings"]),
    )

    with pytest.raises(InputError) as caught:
        TensorRt(worker_command=["/nonexistent"]).build(request, lambda *_: None)

    assert words.format(folder=tmp_path) == str(caught.value)


def test_the_verdict_comes_from_what_the_worker_leaves(machine, tmp_path: Path):
    """Layer information, log and notes of the worker are in the summary."""
    machine(Driver(), tensorrt="10.3.0")
    model = tmp_path / "m.onnx"
    model.touch()
    layers = {
        "Layers": [
            {
                "Name": "c0 + r0",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "x", "Format/Datatype": "Row major Int8"}],
                "Outputs": [{"Name": "y", "Format/Datatype": "Row major Int8"}],
                "Weights": {"Type": "Int8", "Count": 9},
            }
        ]
    }
    node = "[VERBOSE] c0 [Conv] "
    log = f"{node}inputs: [x -> (1)[FLOAT]], \n{node}outputs: [t -> (1)[FLOAT]], \n"
    result = {"status": "built", "version": "10.3.0", "errors": [], "notes": ["weakly typed"]}
    code = (
        "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); "
        f"(folder / 'plan').write_bytes(b'plan'); (folder / 'build.log').write_text({log!r}); "
        f"(folder / 'layers.json').write_text({json.dumps(layers)!r}); "
        f"(folder / 'result.json').write_text({json.dumps(result)!r})"
    )
    backend = TensorRt(worker_command=[sys.executable, "-c", code])
    request = replace(REQUEST, onnx_path=model, float_path=None, options=BuildOptions())

    built = backend.build(request, lambda *_: None)

    assert (b"plan", log) == (built.plan, built.build_log)
    assert 1 == built.summary.convolutions.int8
    assert "weakly typed" in built.summary.warnings
    assert ("tensorrt", "10.3.0") == (built.summary.backend, built.summary.version)
