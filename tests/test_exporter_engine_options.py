"""What the options of a build mean, who refuses which, and how they reach the worker."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.engine import (
    BuildOptions,
    BuildRequest,
    Dla,
    HardwareCompatibility,
    Quantization,
    TensorRtRtx,
    Typing,
    dla_lack,
    get_backend,
    parse_targets,
    protocol,
)
from exporter.errors import InputError
from exporter.profiles import BatchProfile
from exporter.spec import Precision

RTX_TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.fixture(autouse=True)
def only_rtx(monkeypatch: pytest.MonkeyPatch):
    """TensorRT-RTX 1.7.1 counts as installed."""
    monkeypatch.setattr(importlib.util, "find_spec", {"tensorrt_rtx": object()}.get)
    monkeypatch.setattr(importlib.metadata, "version", {"tensorrt_rtx": "1.7.1"}.get)


ALL = BuildOptions(
    typing=Typing.WEAK,
    quantization=Quantization.IMPLICIT,
    calibration_cache=Path("/c/calibration.cache"),
    dla=Dla(core=1, gpu_fallback=False),
    timing_cache=Path("/c/timing.cache"),
    optimization_level=4,
    hardware_compatibility=HardwareCompatibility.AMPERE_PLUS,
    version_compatible=True,
    allow_emulated=True,
)
REQUEST = BuildRequest(
    onnx_path=Path("/m/typed.onnx"),
    float_path=Path("/m/float.onnx"),
    cache_path=Path("/m/calibration.cache"),
    precision=Precision.INT8,
    targets=("sm87",),
    batch=BatchProfile(1, 1, 1),
    options=ALL,
)


@pytest.mark.parametrize("request_", [REQUEST, replace(REQUEST, options=BuildOptions())])
def test_every_option_travels_to_the_worker(request_: BuildRequest):
    """A request with all options, and one with none, reads back as written."""
    text = json.dumps(protocol.request_to_json(request_))

    assert request_ == protocol.request_from_json(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BuildOptions(optimization_level=6), "optimization level must be 0 to 5, not 6"),
        (lambda: BuildOptions(optimization_level=-1), "optimization level must be 0 to 5, not -1"),
        (lambda: Dla(core=-1), "DLA core must be 0 or more, not -1"),
        (
            lambda: BuildOptions(
                quantization=Quantization.EXPLICIT, calibration_cache=Path("/c/cache")
            ),
            "a calibration cache belongs to implicit quantization, not explicit",
        ),
    ],
)
def test_options_that_make_no_sense_cannot_be_made(make, words: str):
    """The value says so itself."""
    with pytest.raises(ValueError, match=words):
        make()


def test_tensorrt_rtx_refuses_what_it_would_ignore():
    """All options of full TensorRT are refused before building, each with its reason."""
    backend = TensorRtRtx(worker_command=["/nonexistent"])

    with pytest.raises(InputError) as caught:
        backend.build(replace(REQUEST, options=ALL), lambda *_: None)

    assert str(caught.value) == (
        "TensorRT-RTX cannot do this (typing weak: it builds strongly typed networks only; "
        "quantization implicit: it takes INT8 from Q/DQ nodes only; calibration cache: it takes "
        "INT8 from Q/DQ nodes only; dla: it builds for no DLA; timing cache: it ignores one; "
        "optimization level: its plans are the same at every level; hardware compatibility: it "
        "ignores one; name several targets instead; version compatible: it fails to build such "
        "plans): use the backend tensorrt on the device, or leave it out"
    )


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("8.6.1", None),
        ("10.3.0.26", None),
        ("10.7.0", None),
        ("11.4.1.32", None),
        ("12.0.0", None),
        (
            "10.8.0",
            "TensorRT 10.8.0 has no DLA support: 10.7 is the last before 11.4.1 (Jetson AGX Orin "
            "with JetPack 7.2.2)",
        ),
        (
            "11.3.1",
            "TensorRT 11.3.1 has no DLA support: 10.7 is the last before 11.4.1 (Jetson AGX Orin "
            "with JetPack 7.2.2)",
        ),
        (
            "11.4.0.106",
            "TensorRT 11.4.0.106 supports DLA on Windows on ARM only; use 11.4.1 or later",
        ),
    ],
)
def test_which_releases_have_a_dla(version: str, expected: str | None):
    """What the documentation of each release says."""
    assert expected == dla_lack(version)


def test_turing_int8_needs_a_word_more():
    """sm75 at int8 is refused with its reason, and accepted where emulation is allowed."""
    backend = get_backend("tensorrt-rtx")

    with pytest.raises(InputError) as caught:
        parse_targets("sm75,sm86", backend, Precision.INT8)
    assert str(caught.value) == (
        "target sm75 cannot do int8: on Turing (sm75) the builder runs quantized convolutions in "
        "half and dequantizes the weights at run time, so INT8 brings nothing there; use fp16, "
        "--backend tensorrt for INT8 built on the device, or --allow-emulated to build it here all "
        "the same (known: sm80, sm86, sm89, sm120, sm121)"
    )
    assert ("sm75",) == parse_targets("sm75", backend, Precision.INT8, allow_emulated=True)
    with pytest.raises(InputError) as caught:
        parse_targets("sm86,sm75", backend, Precision.INT8, allow_emulated=True)
    assert str(caught.value) == (
        "sm75 computes int8 in half and needs a graph and a plan of its own, without sm86: export "
        "sm75 to another bundle (--out)"
    )
    assert RTX_TARGETS[1:] == parse_targets(None, backend, Precision.INT8, allow_emulated=True)
    with pytest.raises(InputError) as caught:
        parse_targets("sm75", backend, Precision.FP32, allow_emulated=True)
    assert str(caught.value) == (
        "target sm75 cannot do fp32: FP32 matrix products do not compile for Turing (sm75); use "
        "fp16 (known: sm80, sm86, sm89, sm120, sm121)"
    )
