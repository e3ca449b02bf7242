"""Which targets may be asked for, the verdict on an engine, and the door of the room."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import exporter.engine
from exporter.engine import (
    BuildRequest,
    BuiltEngine,
    ConvolutionCounts,
    EngineSummary,
    EngineTyping,
    ProgressCallback,
    TargetFigures,
    check_engine,
    count_words,
    engine_not_run_reason,
    get_backend,
    parse_targets,
)
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.spec import Precision

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


class PaperBackend:
    """Knows targets and builds nothing."""

    name = "paper"

    def version(self) -> str:
        return "1"

    def supported_targets(self, precision: Precision) -> tuple[str, ...]:
        return TARGETS if precision is Precision.FP16 else TARGETS[1:]

    def build(self, request: BuildRequest, progress: ProgressCallback) -> BuiltEngine:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sm86", ("sm86",)),
        ("86", ("sm86",)),
        ("8.6", ("sm86",)),
        ("SM_86", ("sm86",)),
        ("compute_86", ("sm86",)),
        ("12.0, 121", ("sm120", "sm121")),
        (" sm86 ,sm80,", ("sm80", "sm86")),
        (None, TARGETS),
    ],
)
def test_targets_are_read_in_every_usual_form(text: str | None, expected: tuple[str, ...]):
    """Names, numbers, dotted numbers, lists, spaces and capitals mean the same target."""
    assert expected == parse_targets(text, PaperBackend(), Precision.FP16)


def dotted(target: str) -> str:
    return f"{target[2:-1]}.{target[-1]}"


FORMS: list[Callable[[str], str]] = [
    str,
    str.upper,
    dotted,
    lambda target: f"  {target[2:]} ",
    lambda target: target.replace("sm", "sm_"),
]


@given(st.lists(st.tuples(st.sampled_from(TARGETS), st.sampled_from(FORMS)), min_size=1))
def test_order_form_and_repetition_do_not_matter(asked: list[tuple[str, Callable[[str], str]]]):
    """Any way of writing a set of targets gives that set, ascending, each once."""
    text = ",".join(form(target) for target, form in asked)

    found = parse_targets(text, PaperBackend(), Precision.FP16)

    assert tuple(target for target in TARGETS if target in dict(asked)) == found


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_by_name(text: str):
    """No text gives anything but known targets or an InputError."""
    try:
        found = parse_targets(text, PaperBackend(), Precision.INT8)
    except InputError:
        return
    assert set(found) <= set(TARGETS[1:])


@pytest.mark.parametrize(
    ("text", "precision", "words"),
    [
        ("sm85", Precision.FP16, ["'sm85'", "nearest: sm86", "known: sm75, sm80"]),
        ("ampere", Precision.FP16, ["'ampere'", "known: sm75"]),
        ("sm86,8.66", Precision.FP16, ["'8.66'"]),
        ("sm87", Precision.INT8, ["sm87 (Ampere: orin, ", "full TensorRT", "on the device itself"]),
        ("9.0", Precision.INT8, ["sm90", "Hopper", "full TensorRT"]),
        ("sm53", Precision.FP16, ["target sm53 is not supported: Jetson Nano and TX1", "JetPack"]),
        ("sm75", Precision.FP32, ["sm75 cannot do fp32", "FP32 matrix products"]),
        ("75,86", Precision.INT8, ["sm75 cannot do int8", "INT8 brings nothing"]),
        (" , ", Precision.FP16, ["no target"]),
        ("", Precision.FP16, ["no target"]),
    ],
)
def test_a_bad_target_is_named_with_the_way_out(text: str, precision: Precision, words: list[str]):
    """The message names the entry, why it is refused and what is known, in two lines at most."""
    with pytest.raises(InputError) as caught:
        parse_targets(text, PaperBackend(), precision)

    assert [word for word in words if word not in str(caught.value)] == []
    assert len(str(caught.value)) < 320


def figures(int8: int, half: int, floats: int, fused: int = 0) -> TargetFigures:
    counts = ConvolutionCounts(total=int8 + half + floats, int8=int8, half=half, float=floats)
    return TargetFigures(convolutions=counts, epilogue_fused=fused, other_kernels=3)


def summary(**per_target: TargetFigures) -> EngineSummary:
    return EngineSummary(backend="paper", version="1", per_target=per_target, plan_bytes=10)


@pytest.mark.parametrize(
    ("precision", "good"),
    [
        (Precision.INT8, figures(22, 0, 0)),
        (Precision.FP16, figures(0, 22, 0)),
        (Precision.FP32, figures(0, 0, 22)),
    ],
)
def test_the_gate_passes_exactly_the_precision_asked_for(precision: Precision, good: TargetFigures):
    """An engine wholly in one data type passes for that precision and for no other."""
    for asked in Precision:
        if asked is precision:
            check_engine(summary(sm86=good), asked, 22)
        else:
            with pytest.raises(GateFailedError, match="on sm86 only 0 of 22"):
                check_engine(summary(sm86=good), asked, 22)


def test_the_gate_names_the_target_that_fails():
    """One convolution in float on one of two targets fails, with target and counts."""
    mixed = summary(sm80=figures(22, 0, 0), sm120=figures(21, 0, 1))

    with pytest.raises(GateFailedError, match=r"on sm120 only 21 of 22 .* 1 float"):
        check_engine(mixed, Precision.INT8, 22)


TIMED = (
    "the builder chose by its own timings: build again on an idle GPU without --timing-cache, or "
    "with --optimization-level 5"
)
GRAPH = (
    "give every activation QuantizeLinear/DequantizeLinear a scale of shape [] (shape [1] silently "
    "costs INT8) and quantize input and weights of every convolution"
)


@pytest.mark.parametrize(
    ("precision", "typing", "advice"),
    [
        (Precision.INT8, EngineTyping.STRONG, GRAPH),
        # Weakly typed builders too run explicit Q/DQ in INT8 where it is.
        (Precision.INT8, EngineTyping.WEAK, GRAPH),
        (
            Precision.INT8,
            EngineTyping.IMPLICIT,
            f"{TIMED}, look in the build log for tensors without a scale, or, unless it is for a "
            "DLA, use --quantization explicit",
        ),
        (
            Precision.FP16,
            EngineTyping.STRONG,
            "make weights, biases and activations of every convolution half",
        ),
        (
            Precision.FP16,
            EngineTyping.WEAK,
            f"{TIMED}; from TensorRT 10 on --typing strong binds it to the graph",
        ),
    ],
)
def test_the_gate_says_what_to_do_by_who_chose_the_data_types(precision, typing, advice):
    """Where the builder chose, nothing about the graph helps."""
    found = replace(summary(sm87=figures(0, 0, 2)), typing=typing)

    with pytest.raises(GateFailedError) as caught:
        check_engine(found, precision, 2)

    kind = "INT8" if precision is Precision.INT8 else "half"
    assert str(caught.value) == (
        f"on sm87 only 0 of 2 convolutions run in {kind} (0 INT8, 0 half, 2 float): {advice}"
    )
    assert str(typing) == found.to_json()["typing"]


@pytest.mark.parametrize("expected", [21, 23])
def test_the_gate_fails_on_another_number_of_convolutions(expected: int):
    """A table with more or fewer kernels than convolutions vouches for nothing."""
    with pytest.raises(GateFailedError, match=f"sm86 has 22 .*{expected} convolutions"):
        check_engine(summary(sm86=figures(22, 0, 0)), Precision.INT8, expected)


def test_engine_json_leads_with_the_worst_target():
    """The keys are those of the contract; the leading figures are the worst target's."""
    worst = figures(20, 2, 0, fused=1)
    content = summary(sm80=figures(22, 0, 0), sm86=worst).to_json()

    assert content == json.loads(json.dumps(content))
    assert content["targets"] == ["sm80", "sm86"]
    assert content["convolutions"] == {
        "total": 22,
        "int8": 20,
        "half": 2,
        "float": 0,
        "bf16": 0,
        "fp8": 0,
    }
    assert worst.to_json() == content["per_target"]["sm86"]  # type: ignore[index]
    assert {
        "backend", "version", "targets", "convolutions", "epilogue_fused", "other_kernels",
        "warnings", "per_target", "plan_bytes", "activation_memory_bytes", "weights_memory_bytes",
        "dla_layers", "status", "typing",
    } == set(content)  # fmt: skip
    assert "built" == content["status"]


def test_an_unknown_backend_is_refused_with_the_known_ones():
    """The message lists every name that would have worked."""
    with pytest.raises(InputError, match=r"'tensort-rtx' \(nearest: tensorrt-rtx; known: auto"):
        get_backend("tensort-rtx")


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch):
    """Without TensorRT-RTX the message says which extra brings it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    with pytest.raises(EnvironmentLackError, match=r"pip install 'repvgg-exporter\[rtx\]'"):
        get_backend("auto")


def test_an_old_library_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Before 1.5 the builder is another one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "1.4.0.76")

    with pytest.raises(EnvironmentLackError, match=r"1\.4\.0\.76 is too old"):
        get_backend("tensorrt-rtx")


class Driver:
    """Stands for libcuda: ``cuInit`` answers ``code``."""

    def __init__(self, code: int) -> None:
        def initialize(_flags: int) -> int:
            return code

        self.cuInit = initialize


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (100, "finds no GPU"),
        (999, "cuInit error 999"),
        (0, "an export runs no engine: run `repvgg-export verify` on the bundle"),
    ],
)
def test_the_reason_for_not_running_is_the_drivers_answer(
    monkeypatch: pytest.MonkeyPatch, code: int, words: str
):
    """Each answer of cuInit has its sentence."""
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Driver(code))

    assert words in engine_not_run_reason()


def test_without_a_driver_the_reason_says_so(monkeypatch: pytest.MonkeyPatch):
    """A driver library that does not load is the reason."""

    def fail(_name: str) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)

    assert "no NVIDIA driver" in engine_not_run_reason()


@pytest.mark.parametrize(
    ("target", "precision", "sentence"),
    [
        (
            "sm75",
            Precision.BF16,
            "target sm75 cannot do bf16: bfloat16 came with Ampere (sm80); use fp16 (known: sm80, "
            "sm86, sm89, sm120, sm121)",
        ),
        (
            "sm86",
            Precision.FP8,
            "target sm86 cannot do fp8: FP8 came with Ada Lovelace (sm89); use int8, or fp16 "
            "before Ampere (known: sm89, sm120, sm121)",
        ),
    ],
)
def test_a_type_that_the_tensor_cores_lack_is_refused(
    target: str, precision: Precision, sentence: str
):
    """The sentence says since when there is one, and what to use instead."""
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(InputError) as caught:
        parse_targets(target, get_backend("tensorrt-rtx"), precision)

    assert sentence == str(caught.value)


def test_types_that_are_seldom_are_named_where_they_occur():
    """Engines of older versions, which list neither, are told as before."""
    counts = {"total": 5, "int8": 1, "half": 0, "float": 2}

    assert "1 INT8, 0 half, 2 float" == count_words(counts)
    assert "1 INT8, 0 half, 2 float" == count_words({**counts, "bf16": 0, "fp8": 0})
    assert "1 INT8, 0 half, 2 float, 2 bfloat16" == count_words({**counts, "bf16": 2, "fp8": 0})


def test_the_door_lists_what_it_holds():
    """Every name in __all__ exists, sorted, and nothing is listed twice."""
    names = exporter.engine.__all__

    assert sorted(set(names)) == names
    assert [name for name in names if not hasattr(exporter.engine, name)] == []


def test_importing_the_room_loads_only_the_standard_library():
    """No torch, onnx, numpy or TensorRT is loaded before a build."""
    code = (
        "import sys; before = set(sys.modules); import exporter.engine; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - sys.stdlib_module_names - {'exporter', 'models', 'calibration'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "[]"


def test_pointwise_convolutions_outside_the_blocks_may_run_as_matrix_products():
    """A layer table that lacks up to that many convolutions still vouches for the others."""
    seen = summary(sm86=figures(0, 21, 0))
    check_engine(seen, Precision.FP16, 22, pointwise=1)
    with pytest.raises(GateFailedError, match="21 convolution kernels where the network has 22"):
        check_engine(seen, Precision.FP16, 22)
    with pytest.raises(GateFailedError, match="only 20 of 21"):
        check_engine(summary(sm86=figures(0, 20, 1)), Precision.FP16, 22, pointwise=1)
