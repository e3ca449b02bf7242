"""What may be asked for, and what is said about a request that makes no sense."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.build_options import BuildOptions, Dla, HardwareCompatibility, Quantization, Typing
from exporter.errors import InputError
from exporter.profiles import BatchProfile, SizeProfile, parse_image_size
from exporter.request import ExportRequest, validate
from exporter.spec import ExportSpec, Precision, Recipe, choice, weights_advice
from models.variants import VARIANTS

SIZES = st.integers(1, 10**6)


def complaint(**request: Any) -> str:
    with pytest.raises(InputError) as caught:
        validate(ExportRequest(**{"model": "A0", **request}))
    return str(caught.value)


def test_pixels_have_one_of_two_layouts() -> None:
    """Neither is the default: floats are."""
    assert validate(ExportRequest(model="A0")).with_preprocess is None
    for text in ("nhwc", "NCHW"):
        spec = validate(ExportRequest(model="A0", with_preprocess=text))
        assert text.lower() == str(spec.with_preprocess) == spec.to_json()["with_preprocess"]
    assert "unknown layout 'nwhc' (nearest: nhwc; known: nhwc, nchw)" == complaint(
        with_preprocess="nwhc"
    )


def test_a_dla_alone_cannot_normalize_pixels() -> None:
    """The GPU does, where it may."""
    assert (
        "--with-preprocess normalizes in float32, which no DLA does: leave --no-gpu-fallback away"
    ) == complaint(with_preprocess="nhwc", dla=0, gpu_fallback=False)
    spec = validate(ExportRequest(model="A0", with_preprocess="nhwc", dla=0))
    assert Dla(core=0) == spec.build.dla


@given(st.tuples(SIZES, SIZES, SIZES).map(sorted))
def test_batch_text_reads_back(sizes: list[int]) -> None:
    """parse(str(profile)) == profile."""
    profile = BatchProfile(*sizes)
    assert profile == BatchProfile.parse(str(profile))


@given(SIZES)
def test_one_number_is_a_fixed_batch(size: int) -> None:
    """``8`` means 8:8:8."""
    assert BatchProfile(size, size, size) == BatchProfile.parse(f" {size} ")


@given(st.tuples(st.integers(-2, 9), st.integers(-2, 9), st.integers(-2, 9)))
def test_batch_sizes_are_ordered(sizes: tuple[int, int, int]) -> None:
    """A profile exists exactly for 1 <= min <= opt <= max."""
    if 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        assert sizes == tuple(map(int, str(BatchProfile(*sizes)).split(":")))
    else:
        with pytest.raises(ValueError, match="must be min:opt:max with 1 <= min <= opt <= max"):
            BatchProfile(*sizes)


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "a", "-1", "1.5", "1:8:x", "8,16", "1 8"])
def test_other_batch_texts_are_refused(text: str) -> None:
    """The error repeats the text and gives an example."""
    with pytest.raises(ValueError, match="must be one number or min:opt:max, such as 1:8:32"):
        BatchProfile.parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("224", (224, 224)), ("192x320", (192, 320)), (" 64X32 ", (64, 32)), ("32", (32, 32))],
)
def test_image_size_is_one_number_or_height_x_width(text: str, expected: tuple[int, int]) -> None:
    """One number is a square; two are height x width."""
    assert expected == parse_image_size(text)


@given(st.tuples(st.integers(32, 99999), st.integers(32, 99999)))
def test_image_size_reads_back(size: tuple[int, int]) -> None:
    """parse(HxW) == (H, W)."""
    assert size == parse_image_size(f"{size[0]}x{size[1]}")


@pytest.mark.parametrize(
    "text", ["", "x", "224x", "x224", "2x2x2", "-64", "64.5", "1000000", "big"]
)
def test_other_image_sizes_are_refused(text: str) -> None:
    """The error repeats the text and gives examples."""
    with pytest.raises(ValueError, match=r"must be pixels such as 224, or 192x320 \(HxW\)"):
        parse_image_size(text)


@pytest.mark.parametrize("text", ["31", "0", "64x16", "16x64"])
def test_an_image_smaller_than_the_stride_is_refused(text: str) -> None:
    """Below 32 pixels nothing is left in the last stage."""
    with pytest.raises(ValueError, match=f"image size {text} is below 32"):
        parse_image_size(text)


@pytest.mark.parametrize("text", ["int8", "INT8", " Int8 "])
def test_a_choice_ignores_case_and_space(text: str) -> None:
    """Precision and recipe are read leniently."""
    assert Precision.INT8 is choice(Precision, "precision", text)


@pytest.mark.parametrize(
    ("request_fields", "expected"),
    [
        (
            {"precision": "int6"},
            "unknown precision 'int6' (nearest: int8; known: fp32, fp16, bf16, int8, fp8)",
        ),
        (
            {"recipe": "entropie"},
            "unknown recipe 'entropie' (nearest: entropy; "
            "known: minmax, percentile, mse, entropy, equalize, full, wide, auto)",
        ),
        ({"precision": "@@"}, "unknown precision '@@' (known: fp32, fp16, bf16, int8, fp8)"),
    ],
)
def test_an_unknown_choice_names_the_nearest(request_fields: dict[str, Any], expected: str) -> None:
    """The error has the nearest value, if any is near, and all known ones."""
    assert expected == complaint(**request_fields)


def test_an_unknown_model_names_the_nearest() -> None:
    """B1g8 is near B1g4 and B1g2, and all 13 names are listed."""
    found = complaint(model="B1g8")
    assert found.startswith("unknown model 'B1g8' (nearest: B1g")
    assert all(name in found for name in VARIANTS)


def test_all_complaints_come_together() -> None:
    """One sentence lists everything that is wrong with a request."""
    found = complaint(
        model="Z9",
        precision="int6",
        recipe="guess",
        batch="0",
        image_size="7",
        calibration_images=0,
        evaluation_images=-1,
        workspace_mib=0,
        min_sqnr_db=math.inf,
        min_agreement=98.0,
    )
    parts = found.split("; ")
    for expected in (
        "unknown model 'Z9'",
        "unknown precision 'int6'",
        "unknown recipe 'guess'",
        "batch 0:0:0 must be min:opt:max",
        "image size 7 is below 32",
        "calibration images must be at least 1, not 0",
        "evaluation images must be at least 1, not -1",
        "workspace mib must be at least 1, not 0",
        "min sqnr must be a finite number of dB, not inf",
        "min agreement must be in [0, 1], not 98",
    ):
        assert any(part.startswith(expected) for part in parts), expected
    assert "\n" not in found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_gates_are_finite_numbers(value: float) -> None:
    """A gate of NaN or infinity could never fail or never pass, and is no JSON."""
    assert "min sqnr must be a finite" in complaint(min_sqnr_db=value)
    assert "min agreement must be in [0, 1]" in complaint(min_agreement=value)


def test_defaults() -> None:
    """A0 alone means int8, the bundled weights and build/A0-int8."""
    spec = validate(ExportRequest(model="repvgg-a0"))
    expected = ExportSpec(
        variant=VARIANTS["A0"], precision=Precision.INT8, out=Path("build/A0-int8")
    )
    assert expected == spec
    assert (None, None, BatchProfile(1, 8, 32)) == (spec.weights, spec.recipe, spec.batch)


def test_request_and_spec_have_the_same_defaults() -> None:
    """The defaults of what is typed are those of the spec."""
    spec = validate(ExportRequest(model="A0"))
    direct = ExportSpec(variant=spec.variant, precision=spec.precision, out=spec.out)
    for item in fields(ExportSpec):
        assert getattr(direct, item.name) == getattr(spec, item.name), item.name
    names = {item.name for item in fields(ExportSpec)} - {"name", "build", "variant"} | {"model"}
    names |= {item.name for item in fields(BuildOptions)} | {"gpu_fallback"}
    assert {item.name for item in fields(ExportRequest)} == names


def test_everything_that_is_typed_arrives(tmp_path: Path) -> None:
    """No field of a request is dropped on the way to the spec."""
    checkpoint = tmp_path / "w.safetensors"
    checkpoint.touch()
    spec = validate(
        ExportRequest(
            model="B1g4", precision="int8", weights=str(checkpoint), calibration="c",
            calibration_images=5, evaluation="e", evaluation_images=6, recipe="entropy",
            keep_float="a, b,,a",
            target="sm86", backend="rtx", batch="2:4:8", image_size="64x96", preprocess="imagenet",
            dynamic_size="32:64:96x64:96:128", out="here", skip_bad_images=True, min_sqnr_db=33.5,
            min_agreement=0.5, max_drop=0.2, per_tensor_weights=True, power_of_two=True,
            calibration_table="t.json", workspace_mib=256,
            typing="weak", quantization="implicit", dla=1, gpu_fallback=False,
            calibration_cache="c", timing_cache="t",
            optimization_level=5, hardware_compatibility="ampere+", version_compatible=True,
            allow_emulated=True,
        )
    )  # fmt: skip
    expected = ExportSpec(
        variant=VARIANTS["B1g4"], precision=Precision.INT8, out=Path("here"),
        weights=str(checkpoint), calibration=Path("c"), calibration_images=5, evaluation=Path("e"),
        evaluation_images=6, recipe=Recipe.ENTROPY, keep_float=("a", "b"),
        target="sm86", backend="rtx",
        batch=BatchProfile(2, 4, 8), image_size=(64, 96), preprocess="imagenet",
        dynamic_size=SizeProfile((32, 64, 96), (64, 96, 128)),
        skip_bad_images=True, min_sqnr_db=33.5, min_agreement=0.5, max_drop=0.2,
        per_tensor_weights=True, power_of_two=True, calibration_table=Path("t.json"),
        build=BuildOptions(
            typing=Typing.WEAK, quantization=Quantization.IMPLICIT,
            dla=Dla(core=1, gpu_fallback=False), calibration_cache=Path("c"),
            timing_cache=Path("t"), optimization_level=5, version_compatible=True,
            hardware_compatibility=HardwareCompatibility.AMPERE_PLUS, allow_emulated=True,
        ),
        workspace_mib=256,
    )  # fmt: skip
    assert expected == spec


def test_what_only_int8_can_obey_is_refused_at_other_precisions() -> None:
    """Options that would change nothing are named."""
    found = complaint(precision="fp16", recipe="full", per_tensor_weights=True)
    assert (
        "--recipe belongs to int8, not to fp16; --per-tensor-weights belongs to int8 and fp8, not "
        "to fp16"
    ) == found
    assert "--power-of-two belongs to int8" in complaint(precision="fp32", power_of_two=True)
    assert "--quantization, --calibration-cache belong to int8, not to fp16" == complaint(
        precision="fp16", quantization="implicit", calibration_cache="c"
    )


def test_permissions_that_nothing_can_use_are_refused() -> None:
    """No DLA, no fallback from it; and only INT8 is computed in half."""
    assert "--no-gpu-fallback belongs to --dla" == complaint(gpu_fallback=False)
    assert "--allow-emulated belongs to int8, not to fp16" == complaint(
        precision="fp16", allow_emulated=True
    )
    # Which target is built for may only be known on the device.
    assert validate(ExportRequest(model="A0", allow_emulated=True)).build.allow_emulated


def test_the_scales_of_int8_come_from_one_place() -> None:
    """A calibration cache beside explicit quantization would be dropped in silence."""
    assert "a calibration cache belongs to implicit quantization, not explicit" == complaint(
        quantization="explicit", calibration_cache="c"
    )
    assert complaint(quantization="implicitly").startswith(
        "unknown quantization 'implicitly' (nearest: implicit; known: auto, explicit, implicit)"
    )


def test_fp8_takes_what_it_can_obey_and_refuses_the_rest_of_int8s_options() -> None:
    """Nodes may stay float and weights may have one scale; there is one recipe and no replay."""
    spec = validate(
        ExportRequest(
            model="A0", precision="fp8", keep_float="stage0.conv", per_tensor_weights=True
        )
    )
    assert (Precision.FP8, ("stage0.conv",), True) == (
        spec.precision,
        spec.keep_float,
        spec.per_tensor_weights,
    )
    found = complaint(precision="fp8", recipe="full", power_of_two=True, calibration_table="t.json")
    assert "--recipe, --power-of-two, --calibration-table belong to int8, not to fp8" == found


def test_two_precisions_need_calibration_images() -> None:
    """int8 and fp8 have scales; the others are types of numbers."""
    assert ["int8", "fp8"] == [str(p) for p in Precision if p.is_quantized]


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "typing",
            "storng",
            "unknown typing 'storng' (nearest: strong; known: auto, strong, weak)",
        ),
        ("dla", -1, "DLA core must be 0 or more, not -1"),
        ("optimization_level", 6, "optimization level must be 0 to 5, not 6"),
        ("hardware_compatibility", "turing", "unknown hardware compatibility 'turing'"),
    ],
)
def test_wrong_build_options_are_refused(field: str, value: Any, sentence: str) -> None:
    """One sentence with what is known."""
    assert sentence in complaint(**{field: value})


@pytest.mark.parametrize("drop", [-0.1, 100.5, float("nan")])
def test_a_drop_is_a_number_of_points(drop: float) -> None:
    """0 to 100."""
    assert "max drop must be 0 to 100 points of top-1" in complaint(max_drop=drop)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "A0"])
def test_only_a0_has_bundled_weights(name: str) -> None:
    """Every other variant asks for weights and says which forms there are."""
    found = complaint(model=name)
    assert f"no weights are bundled for {name}: pass --weights path/to/checkpoint" in found
    assert found.endswith("--weights random exports an untrained network")


def test_advice_names_the_public_repository_where_there_is_one() -> None:
    """The hub is offered only for variants that it has."""
    assert "--weights path/to/checkpoint or --weights hub (timm/repvgg_b1g4.rvgg_in1k)" == (
        weights_advice(VARIANTS["B1g4"])
    )
    assert "--weights path/to/checkpoint" == weights_advice(VARIANTS["B1g2"])


@pytest.mark.parametrize("weights", ["random", "hub", f"hub@{'0a' * 20}"])
def test_names_of_weights(weights: str) -> None:
    """random, hub and hub@<commit> are accepted without a file of that name."""
    assert weights == validate(ExportRequest(model="B3", weights=weights)).weights


@pytest.mark.parametrize("revision", ["", "main", "0a" * 19, "0A" * 20])
def test_a_hub_revision_is_a_full_commit(revision: str) -> None:
    """Branches and short hashes are refused: they name different weights tomorrow."""
    expected = f"weights hub@{revision}: {revision!r} is no full 40-digit commit hash"
    assert expected == complaint(weights=f"hub@{revision}")


def test_the_hub_is_refused_for_variants_that_it_lacks() -> None:
    """B1g2 was never published there."""
    expected = "no public weights are known for B1g2: pass --weights path/to/checkpoint"
    assert expected == complaint(model="B1g2", weights="hub")


def test_a_checkpoint_must_be_a_file(tmp_path: Path) -> None:
    """A missing path and a folder are refused with the path."""
    for path in (tmp_path / "absent.pth", tmp_path):
        assert f"checkpoint {path} does not exist or is no file" == complaint(weights=str(path))


def test_a_spec_is_frozen() -> None:
    """A spec cannot be edited on its way through the stages."""
    spec = validate(ExportRequest(model="A0"))
    with pytest.raises(AttributeError):
        spec.out = Path("elsewhere")  # type: ignore[misc]


def test_json_has_every_field_and_is_strict() -> None:
    """to_json round-trips through strict JSON and names every field of the spec."""
    spec = validate(
        ExportRequest(model="A0", image_size="64x96", calibration="c", min_sqnr_db=30.0)
    )
    data = spec.to_json()
    assert [item.name for item in fields(ExportSpec)] == list(data)
    assert data == json.loads(json.dumps(data, allow_nan=False))
    assert ("A0", "int8", None, "1:8:32") == tuple(
        data[key] for key in ("variant", "precision", "recipe", "batch")
    )
    assert ([64, 96], "c", None) == (data["image_size"], data["calibration"], data["evaluation"])


@pytest.mark.parametrize("text", ["64:96:128", "64:96:128x32:64:320", "8:8:8"])
def test_dynamic_size_text_reads_back(text: str) -> None:
    """str(parse(text)) == text; one profile stands for height and width."""
    assert text == str(SizeProfile.parse(f" {text.upper()} "))
    assert SizeProfile.parse("1:2:3") == SizeProfile((1, 2, 3), (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("64", "must be min:opt:max pixels"),
        ("64:96", "must be min:opt:max pixels"),
        ("64:96:128x64", "must be min:opt:max pixels"),
        ("96:64:128", "must be min <= opt <= max"),
        ("0:64:128", "must be min <= opt <= max"),
        ("16:64:128", "begins below 32, the network's total stride"),
    ],
)
def test_a_dynamic_size_that_makes_no_sense_is_named(text: str, said: str) -> None:
    """Form, order and the smallest size are checked."""
    assert said in complaint(dynamic_size=text)


def test_the_image_size_lies_within_the_dynamic_size() -> None:
    """A size at which the engine would refuse the calibration images is refused first."""
    said = "image size 64x200 is outside dynamic size 32:64:128"
    assert said == complaint(dynamic_size="32:64:128", image_size="64x200")


def test_a_network_of_the_callers_own_has_a_name_and_no_variant() -> None:
    """The name takes the variant's place in the default folder and for people."""
    spec = validate(ExportRequest(model="", dynamic_size="8:16:24"), "UNet")
    assert (None, "UNet", Path("build/UNet-int8")) == (spec.variant, spec.title, spec.out)
    assert "RepVGG-A0" == validate(ExportRequest(model="A0")).title
