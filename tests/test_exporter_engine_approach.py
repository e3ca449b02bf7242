"""Which graph a build reads and what it lets the builder choose, from capabilities alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exporter.engine import (
    BuildOptions,
    BuildRequest,
    Dla,
    EngineTyping,
    Quantization,
    Typing,
)
from exporter.engine.approach import Approach, choose_approach
from exporter.engine.builder_config import write_timing_cache
from exporter.engine.capabilities import Capability
from exporter.engine.legacy_int8 import cache_for
from exporter.engine.refusal import BadInputError
from exporter.profiles import BatchProfile
from exporter.spec import Precision

WEAK = frozenset({Capability.FP16_FLAG, Capability.INT8_FLAG, Capability.CALIBRATOR})
BOTH = WEAK | {Capability.STRONG_TYPING}
STRONG = frozenset({Capability.STRONG_TYPING})
CACHE = Path("calibration.cache")
REQUEST = BuildRequest(
    onnx_path=Path("typed.onnx"),
    float_path=Path("float.onnx"),
    precision=Precision.INT8,
    targets=("sm87",),
    batch=BatchProfile(1, 1, 1),
)
OWN = replace(REQUEST, cache_path=Path("own.cache"))
"""With the calibration cache of the bundle."""

IMPLICIT = replace(REQUEST, options=BuildOptions(calibration_cache=CACHE))


@pytest.mark.parametrize("capabilities", [BOTH, STRONG, frozenset()])
@pytest.mark.parametrize("precision", list(Precision))
def test_the_typed_graph_binds_wherever_weak_typing_is_not_all_there_is(
    capabilities: frozenset[Capability], precision: Precision
):
    """Also on a release that dropped the flag because it knows strongly typed networks only."""
    way = choose_approach(replace(REQUEST, precision=precision), capabilities, "lib 10")

    assert Approach(graph=Path("typed.onnx"), strongly_typed=True) == way


def test_a_weakly_typed_bf16_build_reads_the_float_graph():
    """Where the library has the flag, it is the one that is set."""
    options = BuildOptions(typing=Typing.WEAK)
    request = replace(REQUEST, precision=Precision.BF16, options=options)

    way = choose_approach(request, BOTH | {Capability.BF16_FLAG}, "lib 10")

    assert (Path("float.onnx"), False, frozenset({Precision.BF16})) == (
        way.graph,
        way.strongly_typed,
        way.allowed,
    )


def test_a_weakly_typed_fp8_build_reads_the_qdq_graph():
    """The flag alone does not tell that the library can, for 8.6 has it for plugins."""
    options = BuildOptions(typing=Typing.WEAK)
    request = replace(REQUEST, precision=Precision.FP8, options=options)

    way = choose_approach(request, BOTH | {Capability.FP8_FLAG}, "lib 10")

    assert (Path("typed.onnx"), False, frozenset({Precision.FP8})) == (
        way.graph,
        way.strongly_typed,
        way.allowed,
    )


def test_a_dla_gets_half_beside_implicit_int8():
    """Layers without a scale may run on the DLA in half."""
    options = BuildOptions(calibration_cache=CACHE, dla=Dla())

    way = choose_approach(replace(REQUEST, options=options), BOTH, "lib 10")

    assert frozenset({Precision.INT8, Precision.FP16}) == way.allowed
    assert (Path("float.onnx"), CACHE, False) == (
        way.graph,
        way.calibration_cache,
        way.strongly_typed,
    )


@pytest.mark.parametrize(
    ("options", "capabilities", "cache"),
    [
        (BuildOptions(), BOTH, None),
        (BuildOptions(), STRONG, None),
        (BuildOptions(quantization=Quantization.IMPLICIT), BOTH, Path("own.cache")),
        (BuildOptions(quantization=Quantization.IMPLICIT), WEAK, Path("own.cache")),
        (BuildOptions(calibration_cache=CACHE), BOTH, CACHE),
        (BuildOptions(quantization=Quantization.IMPLICIT, calibration_cache=CACHE), BOTH, CACHE),
        (BuildOptions(dla=Dla()), BOTH, Path("own.cache")),
        (BuildOptions(dla=Dla()), WEAK, Path("own.cache")),
        (BuildOptions(dla=Dla(), calibration_cache=CACHE), BOTH, CACHE),
        # From TensorRT 11.4.1 on a DLA takes Q/DQ nodes.
        (BuildOptions(dla=Dla()), STRONG, None),
    ],
)
def test_the_bundles_own_cache_is_used_where_it_is_asked_for_or_a_dla_needs_it(
    options: BuildOptions, capabilities: frozenset[Capability], cache: Path | None
):
    """A file that was named comes before it; without either the Q/DQ graph is read."""
    way = choose_approach(replace(OWN, options=options), capabilities, "lib 10")

    assert cache == way.calibration_cache
    assert Path("typed.onnx" if cache is None else "float.onnx") == way.graph
    expected = EngineTyping.STRONG if cache is None else EngineTyping.IMPLICIT
    assert expected == way.typing


def test_a_weakly_typed_engine_says_so():
    """Who chose the data types decides what to do about a wrong one."""
    way = choose_approach(replace(REQUEST, precision=Precision.FP16), WEAK, "lib 8")

    assert EngineTyping.WEAK == way.typing


@pytest.mark.parametrize(
    ("request_", "capabilities", "words"),
    [
        (
            replace(IMPLICIT, precision=Precision.FP16),
            BOTH,
            "a calibration cache belongs to int8, not to fp16",
        ),
        (
            replace(IMPLICIT, options=BuildOptions(calibration_cache=CACHE, typing=Typing.STRONG)),
            BOTH,
            "a calibration cache needs a weakly typed network, not a strong one",
        ),
        (
            replace(IMPLICIT, float_path=None),
            BOTH,
            "implicit INT8 is built from the float graph, and none is given",
        ),
        (
            IMPLICIT,
            STRONG,
            "lib 10 takes no calibration cache: implicit INT8 was removed in TensorRT 11; build "
            "the Q/DQ graph without one",
        ),
        (
            replace(REQUEST, options=BuildOptions(dla=Dla())),
            BOTH,
            "the DLA of lib 10 takes INT8 from a calibration cache and not from Q/DQ nodes: pass "
            "one, or leave quantization at auto where the bundle has its own",
        ),
        (
            replace(OWN, options=BuildOptions(dla=Dla(), quantization=Quantization.EXPLICIT)),
            BOTH,
            "the DLA of lib 10 takes INT8 from a calibration cache and not from Q/DQ nodes: pass "
            "one, or leave quantization at auto where the bundle has its own",
        ),
        (
            replace(REQUEST, options=BuildOptions(quantization=Quantization.IMPLICIT)),
            BOTH,
            "implicit INT8 needs a calibration cache, and none is given",
        ),
        (
            replace(REQUEST, precision=Precision.BF16),
            WEAK,
            "lib 10 does not build bf16, which came with TensorRT 10: use fp16",
        ),
        (
            replace(REQUEST, precision=Precision.FP8),
            WEAK | {Capability.FP8_FLAG},
            "lib 10 does not build fp8, which came with TensorRT 10: use fp16",
        ),
        (
            replace(REQUEST, options=BuildOptions(typing=Typing.WEAK)),
            STRONG,
            "lib 10 builds strongly typed networks only: weak typing was removed in TensorRT 11; "
            "leave typing at auto",
        ),
        (
            replace(REQUEST, options=BuildOptions(typing=Typing.STRONG)),
            WEAK,
            "lib 10 has no strongly typed networks: they came with TensorRT 10; leave typing at "
            "auto",
        ),
    ],
)
def test_what_a_release_cannot_do_is_refused(
    request_: BuildRequest, capabilities: frozenset[Capability], words: str
):
    """Each refusal says what to do instead."""
    with pytest.raises(BadInputError) as caught:
        choose_approach(request_, capabilities, "lib 10")

    assert words == str(caught.value)


@pytest.mark.parametrize(
    ("version", "number"),
    [("8.6.1", "8601"), ("10.3.0", "100300"), ("10.16.1.11", "101601")],
)
def test_the_calibration_cache_gets_the_header_of_the_release(
    tmp_path: Path, version: str, number: str
):
    """The scales stay as they are; a cache made for another release would be ignored."""
    path = tmp_path / "calibration.cache"
    path.write_text("TRT-100300-EntropyCalibration2\nimages: 3ca94044\n")

    expected = f"TRT-{number}-EntropyCalibration2\nimages: 3ca94044\n"
    assert expected.encode() == cache_for(path, version)


class Config:
    """A configuration that has timings."""

    def get_timing_cache(self) -> Config:
        return self

    def serialize(self) -> bytes:
        return b"timings"


def test_a_timing_cache_that_cannot_be_written_is_named(tmp_path: Path):
    """The path and the system's reason are in the message."""
    path = tmp_path / "no folder" / "timing.cache"

    with pytest.raises(BadInputError) as caught:
        write_timing_cache(Config(), path)

    assert str(caught.value).startswith(f"timing cache {path} cannot be written: ")
