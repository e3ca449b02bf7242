"""The TOML of `parity`: what it may say, and how all that is wrong is told at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from exporter.cases.request_keys import KEYS, path_keys
from exporter.errors import InputError
from exporter.parity_run import Margins, read_config
from exporter.request import ExportRequest, validate
from models.registry import bundled_weights

ROOT = Path(__file__).parent.parent


@pytest.fixture
def written(tmp_path):
    """``written(text)`` -> the path of that configuration."""

    def write(text: str) -> Path:
        path = tmp_path / "parity.toml"
        path.write_text(text)
        return path

    return write


def test_a_case_is_the_request_of_the_command_line(written):
    """Its own keys count before the defaults; lists and numbers become their text."""
    path = written("""
        [defaults]
        model = "A0"
        target = ["sm86", "orin"]
        image_size = 64
        [[case]]
        precision = "fp16"
        min_sqnr_db = 60
        [[case]]
        name = "other"
        image_size = "96x64"
        keep_float = ["stage0.conv", "linear"]
        skip_bad_images = true
    """)
    first, second = read_config(path).cases
    assert ("A0-fp16", "other") == (first.name, second.name)
    expected = ExportRequest(
        model="A0", precision="fp16", target="sm86,orin", image_size="64", min_sqnr_db=60.0
    )
    assert expected == first.request
    expected = ExportRequest(
        model="A0",
        target="sm86,orin",
        image_size="96x64",
        keep_float="stage0.conv,linear",
        skip_bad_images=True,
    )
    assert expected == second.request


def test_paths_are_relative_to_the_file_and_words_stay_words(written, tmp_path):
    """hub, random and imagenet are no paths."""
    (tmp_path / "images").mkdir()
    (tmp_path / "a0.pth").touch()
    path = written("""
        [[case]]
        model = "A0"
        weights = "a0.pth"
        calibration = "images"
        preprocess = "imagenet"
        timing_cache = "later/kernels.cache"
        [[case]]
        name = "hub"
        model = "A0"
        weights = "hub"
    """)
    first, second = read_config(path).cases
    assert str(tmp_path / "a0.pth") == first.request.weights
    assert str(tmp_path / "images") == first.request.calibration
    assert str(tmp_path / "later/kernels.cache") == first.request.timing_cache
    assert ("imagenet", "hub") == (first.request.preprocess, second.request.weights)


def test_everything_wrong_is_told_together_each_with_its_table_and_key(written):
    """The keys a rule depends on are all named, in the table where each stands."""
    path = written("""
        [default]
        model = "A0"
        [defaults]
        recipe = "full"
        imagesize = 64
        [margins]
        sqnr = 1
        top1 = -1
        [[case]]
        model = "A0"
        precision = "fp16"
        [[case]]
        name = "second"
        model = "A9"
        precision = "int9"
        calibration = "absent"
        max_drop = "a little"
        evaluation_images = 0
        target = "sm86,orim"
        margins = { top = 1 }
    """)
    with pytest.raises(InputError) as refusal:
        read_config(path)
    message = str(refusal.value)
    for part in (
        f"{path}: the file, default: unknown (nearest: defaults; known: defaults, margins, case); ",
        "[defaults], imagesize: unknown (nearest: image_size)",
        "[margins], sqnr: unknown (nearest: sqnr_db; known: sqnr_db, half_sqnr_db, ",
        "[margins], top1: must be a number of at least 0, not -1",
        "[[case]] 1, precision and [defaults], recipe: --recipe belongs to int8, not to fp16",
        "[[case]] 2 (second), model: unknown model 'A9'",
        "[[case]] 2 (second), precision: unknown precision 'int9' (nearest: int8; known:",
        f"[[case]] 2 (second), calibration: {path.parent / 'absent'} does not exist",
        "[[case]] 2 (second), max_drop: must be a number, not 'a little'",
        "[[case]] 2 (second), evaluation_images: evaluation images must be at least 1, not 0",
        "[[case]] 2 (second), target: unknown target 'orim' (nearest: orin",
        "[[case]] 2 (second), margins, top: unknown (nearest: top1; known:",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file, case: there is none; head each with [[case]]"),
        ("case = 3", "the file, case: must be tables, each headed [[case]]"),
        ("defaults = 3\n[[case]]\nmodel = 'A0'", "the file, defaults: must be a table, headed"),
        ("[[case]]\nprecision = 'int8'", "[[case]] 1, model: is missing"),
        ("[[case]]\nmodel = 'B1'", "[[case]] 1, model: no weights are bundled for B1"),
        ("[[case]]\nmodel = 'A0'\nweights = 'x'", "[[case]] 1, weights: checkpoint "),
        ("[[case]]\nmodel = 'A0'\nname = '../x'", "[[case]] 1 (../x), name: must be letters,"),
        (
            "[[case]]\nmodel = 'A0'\n[[case]]\nmodel = 'A0'",
            "[[case]] 2, name: 'A0-int8' is taken already",
        ),
        (
            "[[case]]\nmodel = 'A0'\nout = 'x'",
            "[[case]] 1, out: unknown (known: model, precision",
        ),
        (
            "[[case]]\nmodel = 'A0'\nmargins = 3",
            "[[case]] 1, margins: must be a table, such as { sqnr_db = 0.5 }",
        ),
        (
            "[[case]]\nmodel = 'A0'\nskip_bad_images = 1",
            "[[case]] 1, skip_bad_images: must be true or false, not 1",
        ),
        ("[[case]]\nmodel 3", "is no TOML: Expected '=' after a key"),
        (
            "[[case]]\nmodel" + ".a" * 3000 + " = 1",
            "is no TOML: it is nested deeper than 10 levels",
        ),
        (
            "[margins]\nsqnr_db = 1" + "0" * 400,
            "[margins], sqnr_db: must be a number of at least 0",
        ),
        ("a = " + "[" * 100_000, "is no TOML: maximum recursion depth exceeded"),
    ],
)
def test_what_is_refused_says_where(written, text, sentence):
    """Each refusal alone."""
    with pytest.raises(InputError) as refusal:
        read_config(written(text))
    assert sentence in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path):
    """With its name."""
    with pytest.raises(InputError, match=r"configuration .*absent.toml cannot be read: No such"):
        read_config(tmp_path / "absent.toml")


def test_margins_of_a_case_count_before_those_of_the_file(written):
    """What neither names has its default."""
    path = written("""
        [margins]
        sqnr_db = 2
        top1 = 0.05
        [[case]]
        model = "A0"
        margins = { sqnr_db = 0.5 }
    """)
    (case,) = read_config(path).cases
    assert dataclasses.replace(Margins(), sqnr_db=0.5, top1=0.05) == case.margins


def test_the_keys_are_all_fields_of_a_request_and_paths_are_known_by_their_type():
    """A field that is added to the request is a key; one that becomes a path is a path here."""
    names = {item.name for item in dataclasses.fields(ExportRequest)}
    assert names - {"out"} == set(KEYS)
    assert {
        "weights", "preprocess", "calibration", "evaluation", "calibration_table",
        "calibration_cache", "timing_cache",
    } <= path_keys()  # fmt: skip
    assert not path_keys() & {"model", "target", "recipe"}


def test_the_projects_own_configuration_is_valid():
    """Of bundled weights only, so that it runs offline."""
    config = read_config(ROOT / "parity.toml")
    assert ["A0-int8", "A0-fp16"] == [case.name for case in config.cases]
    for case in config.cases:
        validate(case.request)
        assert case.request.weights is None
    assert bundled_weights("A0") is not None
