"""The data-set linter: each finding fires on its mistake, and not on good images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.data_report import DataReport
from calibration.decoding import PixelMemory, batches
from calibration.images import ImageDataError, ImageFolder, Preprocess
from calibration.lint import Linter
from models.registry import bundled_weights

SIZE = 16
IMAGENET = Preprocess(image_size=(SIZE, SIZE), crop_fraction=1.0)
GREY_IMAGENET = Preprocess(
    image_size=(SIZE, SIZE), crop_fraction=1.0, mean=(0.4, 0.4, 0.4), std=(0.2, 0.2, 0.2)
)
NATURAL = (0.485, 0.456, 0.406)
"""The mean colour of photographs."""


def pictures(
    count: int, mean: tuple[float, float, float] = NATURAL, seed: int = 0, size: int = SIZE
) -> np.ndarray:
    """Pictures ``[count, size, size, 3]`` uint8 of different brightness, their mean near ``mean``.

    Light and colour vary from picture to picture and from pixel to pixel, together in all channels.
    """
    random = np.random.default_rng(seed)
    light = random.normal(0, 0.08, (count, 1, 1, 1)) + random.normal(
        0, 0.15, (count, size, size, 1)
    )
    colour = random.normal(0, 0.03, (count, 1, 1, 3)) + random.normal(
        0, 0.03, (count, size, size, 3)
    )
    return np.rint(np.clip(light + colour + mean, 0, 1) * 255).astype(np.uint8)


def save(root: Path, images: np.ndarray, label: str = ".", first: int = 0) -> None:
    (root / label).mkdir(parents=True, exist_ok=True)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(root / label / f"{first + index:03}.png")


def linted(arrays: Iterable[np.ndarray], preprocess: Preprocess | None = None) -> Linter:
    """One that has seen these batches."""
    linter = Linter(preprocess)
    for batch in arrays:
        linter.add(batch)
    return linter


def lint_arrays(arrays: Iterable[np.ndarray], preprocess: Preprocess | None = None) -> DataReport:
    return linted(arrays, preprocess).report()


def lint(
    root: Path, preprocess: Preprocess = IMAGENET, names: Sequence[str] | None = None
) -> DataReport:
    folder = ImageFolder.open(root)
    return linted(batches(folder, PixelMemory(preprocess), 16), preprocess).report(folder, names)


def saved(root: Path, images: np.ndarray, preprocess: Preprocess = IMAGENET) -> DataReport:
    save(root, images)
    return lint(root, preprocess)


def codes(report: DataReport) -> list[str]:
    return [finding.code for finding in report.findings]


def message(report: DataReport, code: str) -> str:
    return next(finding.message for finding in report.findings if finding.code == code)


def arrays(images: np.ndarray, preprocess: Preprocess = IMAGENET) -> np.ndarray:
    return np.stack([preprocess(Image.fromarray(pixels)) for pixels in images])


def test_the_bundled_images_give_no_finding() -> None:
    """Small grey digits on black are right for the network that was trained on them."""
    bundled = bundled_weights("A0")
    assert bundled is not None
    preprocess = Preprocess.from_json(bundled.preprocess)
    for root in (bundled.calibration_images, bundled.test_images):
        report = lint(root, preprocess, bundled.class_names)
        assert () == report.findings
    assert (10, 0) == (report.figures.classes, report.figures.duplicates)


def test_photographs_give_no_finding(tmp_path: Path) -> None:
    """Forty different colour pictures with ImageNet's mean are as they should be."""
    report = saved(tmp_path, pictures(40))
    figures = report.figures
    assert [] == codes(report)
    assert (40, 40, 0, 0, 0) == (
        figures.images, figures.usable, figures.duplicates, figures.constant, figures.grayscale
    )  # fmt: skip
    assert figures.classes is None


@pytest.mark.parametrize("cast", [(0.3, 0.45, 0.6), (0.75, 0.75, 0.74), (0.2, 0.25, 0.2)])
def test_pictures_of_another_kind_give_no_finding(
    cast: tuple[float, float, float], tmp_path: Path
) -> None:
    """The sea, snow and a forest at dusk have other means than ImageNet, and are no mistake."""
    assert [] == codes(saved(tmp_path, pictures(40, cast)))


def test_the_figures_are_those_of_the_pixels(tmp_path: Path) -> None:
    """Mean and standard deviation, on [0, 1] and as the network receives them, are exact."""
    images = pictures(12)
    figures = saved(tmp_path, images).figures
    pixels = images.reshape(-1, 3) / 255.0
    mean, std = np.array(IMAGENET.mean), np.array(IMAGENET.std)
    expected = {
        "mean": pixels.mean(0),
        "std": pixels.std(0),
        "input_mean": (pixels.mean(0) - mean) / std,
        "input_std": pixels.std(0) / std,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(figures, name), value, atol=1e-6, err_msg=name)
    low, high = ((pixels - mean) / std).min(), ((pixels - mean) / std).max()
    np.testing.assert_allclose([figures.low, figures.high], [low, high], atol=1e-5)
    white, black = (images == 255).mean(), (images == 0).mean()
    np.testing.assert_allclose([figures.white, figures.black], [white, black], atol=1e-9)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, "error"), (7, "error"), (8, "warning"), (31, "warning"), (32, None)],
)
def test_few_images_are_an_error_then_a_warning(
    count: int, expected: str | None, tmp_path: Path
) -> None:
    """Fewer than 8 usable images are refused, fewer than 32 are noted."""
    report = saved(tmp_path, pictures(count))
    levels = [finding.level for finding in report.findings if finding.code == "few-images"]
    assert [expected] * (expected is not None) == levels
    assert len(report.findings) == len(levels)


def test_blank_and_copied_images_are_not_usable(tmp_path: Path) -> None:
    """Of ten different pictures and many copies and blanks only ten count."""
    images = pictures(10)
    blank = np.zeros((30, SIZE, SIZE, 3), np.uint8) + np.arange(30, dtype=np.uint8).reshape(
        -1, 1, 1, 1
    )
    report = saved(tmp_path, np.concatenate([images, images, images, blank]))
    assert ["few-images", "duplicates", "blank-images"] == codes(report)
    assert (60, 10, 20, 30) == (
        report.figures.images, report.figures.usable, report.figures.duplicates,
        report.figures.constant,
    )  # fmt: skip
    assert "only 10 of 60" in message(report, "few-images")


def test_identical_images_are_an_error(tmp_path: Path) -> None:
    """Forty copies of one picture are one picture, and that is said instead of a count."""
    report = saved(tmp_path, np.repeat(pictures(1), 40, 0))
    assert ["identical-images"] == codes(report)
    assert report.errors == report.findings


def test_a_copy_in_another_format_is_a_copy(tmp_path: Path) -> None:
    """What counts are the decoded pixels, not the bytes of the file."""
    images = pictures(36)
    save(tmp_path, images)
    for index in range(6):
        Image.fromarray(images[index]).save(tmp_path / f"{index}.bmp")
    report = lint(tmp_path)
    assert (6, ["duplicates"]) == (report.figures.duplicates, codes(report))


@pytest.mark.parametrize(("copies", "expected"), [(4, []), (5, ["duplicates"])])
def test_a_tenth_of_copies_is_tolerated(copies: int, expected: list[str], tmp_path: Path) -> None:
    """Up to 10 % of copies do no harm."""
    images = pictures(40 - copies)
    report = saved(tmp_path, np.concatenate([images, images[:copies]]))
    assert expected == codes(report)
    assert copies == report.figures.duplicates


@pytest.mark.parametrize(("blanks", "expected"), [(4, []), (5, ["blank-images"])])
def test_a_tenth_of_blank_images_is_tolerated(
    blanks: int, expected: list[str], tmp_path: Path
) -> None:
    """Up to 10 % of pictures of one colour do no harm; that colour need not be grey."""
    images = np.concatenate([pictures(40 - blanks), np.zeros((blanks, SIZE, SIZE, 3), np.uint8)])
    images[40 - blanks :] += np.arange(blanks, dtype=np.uint8)[:, None, None, None]
    images[40 - blanks :, :, :, 0] = 100
    assert expected == codes(saved(tmp_path, images))


@pytest.mark.parametrize(("side", "expected"), [(7, ["tiny-images"]), (8, []), (16, [])])
def test_tiny_images_are_found(side: int, expected: list[str], tmp_path: Path) -> None:
    """Pictures that must be enlarged more than twice both ways are found by their size."""
    assert expected == codes(saved(tmp_path, pictures(40, size=side)))


def test_one_long_side_makes_no_tiny_image(tmp_path: Path) -> None:
    """A picture that is small one way only is not tiny."""
    images = pictures(40, size=20)[:, :7]
    assert [] == codes(saved(tmp_path, images))


@pytest.mark.parametrize(("height", "expected"), [(12, ["cropped-away"]), (14, [])])
def test_slivers_are_found(height: int, expected: list[str], tmp_path: Path) -> None:
    """Pictures more than three times as long as the network's input are mostly cut off."""
    images = pictures(40, size=42)[:, :height]
    assert expected == codes(saved(tmp_path, images))


def test_the_networks_own_shape_is_no_sliver(tmp_path: Path) -> None:
    """A panorama is right for a network of panoramas."""
    preprocess = Preprocess(image_size=(8, 32), crop_fraction=1.0)
    assert [] == codes(saved(tmp_path, pictures(40, size=32)[:, :8], preprocess))


def classes(root: Path, counts: dict[str, int]) -> Path:
    images, first = pictures(sum(counts.values())), 0
    for label, count in counts.items():
        save(root, images[first : first + count], label, first)
        first += count
    return root


CLASS_CASES: dict[str, tuple[dict[str, int], list[str] | None, list[str]]] = {
    "even": ({"a": 10, "b": 10, "c": 10, "d": 10}, None, []),
    "one of four above half": ({"a": 25, "b": 5, "c": 5, "d": 5}, None, ["uneven-classes"]),
    "one of four at half": ({"a": 20, "b": 8, "c": 6, "d": 6}, None, []),
    "one of three above half": ({"a": 30, "b": 5, "c": 5}, None, []),
    "a class is missing": ({"a": 20, "b": 20}, ["a", "b", "c"], ["missing-classes"]),
    "more classes than images": ({"a": 20, "b": 20}, [*"abc", *map(str, range(50))], []),
    "folders that are no classes": ({"x": 20, "y": 20}, ["a", "b", "c"], []),
    "one folder": ({"a": 40}, None, ["single-class"]),
    "one class": ({"a": 40}, ["a", "b"], ["single-class"]),
    "one folder that is no class": ({"images": 40}, ["a", "b"], []),
}


@pytest.mark.parametrize("case", CLASS_CASES)
def test_classes_must_be_spread(case: str, tmp_path: Path) -> None:
    """Missing, single and dominating classes are found where folders are labels."""
    counts, names, expected = CLASS_CASES[case]
    report = lint(classes(tmp_path, counts), names=names)
    assert expected == codes(report)
    assert (len(counts), max(counts.values())) == (
        report.figures.classes, report.figures.largest_class
    )  # fmt: skip


def test_missing_classes_are_named(tmp_path: Path) -> None:
    """The message names the missing classes, the first five of many."""
    names = ["a", *(f"z{index}" for index in range(8))]
    report = lint(classes(tmp_path, {"a": 20, "z0": 20}), names=names)
    assert "7 of 9 classes have no calibration image (z1, z2, z3, z4, z5, ...)" in message(
        report, "missing-classes"
    )


def test_swapped_channels_are_recognized(tmp_path: Path) -> None:
    """Files written in blue-green-red order are named as such."""
    report = saved(tmp_path, pictures(40)[..., ::-1])
    assert ["swapped-channels"] == codes(report)
    assert "reverse order" in message(report, "swapped-channels")


def test_a_mean_in_reverse_order_is_recognized(tmp_path: Path) -> None:
    """The images may be right and the preprocessing's mean in blue-green-red order."""
    preprocess = Preprocess(
        image_size=(SIZE, SIZE), crop_fraction=1.0, mean=(0.406, 0.456, 0.485),
        std=(0.225, 0.224, 0.229),
    )  # fmt: skip
    assert ["swapped-channels"] == codes(saved(tmp_path, pictures(40), preprocess))


def test_a_swap_is_not_read_from_few_images(tmp_path: Path) -> None:
    """Below 32 images the means may be an accident."""
    assert ["few-images"] == codes(saved(tmp_path, pictures(30)[..., ::-1]))


def test_images_whose_colours_differ_widely_show_no_swap(tmp_path: Path) -> None:
    """Where red minus blue varies more between images than its mean, nothing is concluded."""
    images = pictures(40)[..., ::-1].astype(int)
    images[..., 0] += np.tile([90, -90], 20)[:, None, None]
    report = saved(tmp_path, np.clip(images, 0, 255).astype(np.uint8))
    assert [] == codes(report)


def test_the_order_of_equal_means_is_not_judged(tmp_path: Path) -> None:
    """A preprocessing with one mean for all channels says nothing about their order."""
    images = pictures(40, (0.45, 0.4, 0.36))[..., ::-1]
    assert [] == codes(saved(tmp_path, images, GREY_IMAGENET))


def test_grey_images_under_colour_means_are_found(tmp_path: Path) -> None:
    """Grey pictures are no calibration for a network of colour pictures."""
    images = np.repeat(pictures(40)[..., :1], 3, -1)
    report = saved(tmp_path, images)
    assert (["grayscale-images"], 40) == (codes(report), report.figures.grayscale)


def test_grey_images_under_a_grey_mean_are_right(tmp_path: Path) -> None:
    """Where the preprocessing treats all channels alike, grey pictures may be what it is for."""
    images = np.repeat(pictures(40)[..., :1], 3, -1)
    assert [] == codes(saved(tmp_path, images, GREY_IMAGENET))


def test_a_few_grey_images_are_tolerated(tmp_path: Path) -> None:
    """Among photographs some are grey."""
    images = pictures(40)
    images[:15] = images[:15, ..., :1]
    assert [] == codes(saved(tmp_path, images))


def test_negatives_are_recognized(tmp_path: Path) -> None:
    """Dark on light instead of light on dark is named, where the two can be told apart."""
    dark = Preprocess(
        image_size=(SIZE, SIZE), crop_fraction=1.0, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35)
    )
    assert ["negative-images"] == codes(
        saved(tmp_path / "negative", pictures(40, (0.7,) * 3), dark)
    )
    assert [] == codes(saved(tmp_path / "bright", pictures(40, (0.5,) * 3), dark))
    assert [] == codes(saved(tmp_path / "right", pictures(40, (0.3,) * 3), dark))


def test_overexposed_images_are_found(tmp_path: Path) -> None:
    """Pictures that are mostly at 255 were overexposed, or scaled twice."""
    images = np.clip(pictures(40).astype(int) * 3, 0, 255).astype(np.uint8)
    assert ["saturated-images"] == codes(saved(tmp_path, images))


def test_black_backgrounds_and_some_white_ones_are_right(tmp_path: Path) -> None:
    """Black at 0 is no overexposure, nor are a few white backgrounds."""
    images = pictures(40)
    images[:, 3:] = 0
    images[:15, 3:] = 255
    report = saved(tmp_path, images)
    assert [] == codes(report)
    assert report.figures.black is not None
    assert report.figures.black > 0.4


def test_a_preprocessing_on_the_byte_scale_is_recognized(tmp_path: Path) -> None:
    """Mean and std of 0..255 are named; of all that is wrong then, only that."""
    preprocess = Preprocess(
        image_size=(SIZE, SIZE), crop_fraction=1.0, mean=(123.7, 116.3, 103.5),
        std=(58.4, 57.1, 57.4),
    )  # fmt: skip
    report = saved(tmp_path, pictures(40), preprocess)
    assert ["preprocess-scale"] == codes(report)
    assert "divide both by 255" in message(report, "preprocess-scale")


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,) * 3, (1.0,) * 3), ((0.0,) * 3, (1 / 255,) * 3), ((0.5,) * 3, (0.5,) * 3)],
)
def test_other_scales_are_right(
    mean: tuple[float, float, float], std: tuple[float, float, float], tmp_path: Path
) -> None:
    """Networks of [0, 1], of 0..255 and of [-1, 1] have a preprocessing that is no mistake."""
    preprocess = Preprocess(image_size=(SIZE, SIZE), crop_fraction=1.0, mean=mean, std=std)
    report = saved(tmp_path, pictures(40), preprocess)
    assert [] == codes(report)


def test_images_far_from_the_preprocessings_mean_are_found(tmp_path: Path) -> None:
    """A mean that is three of its standard deviations away is not that of these images."""
    preprocess = Preprocess(
        image_size=(SIZE, SIZE), crop_fraction=1.0, mean=(0.1,) * 3, std=(0.08,) * 3
    )
    assert ["far-from-preprocess"] == codes(saved(tmp_path / "far", pictures(40), preprocess))
    assert [] == codes(saved(tmp_path / "near", pictures(40, (0.35,) * 3), preprocess))


SCALES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], list[str]]] = {
    "right": (lambda pixels: (pixels - IMAGENET.mean) / IMAGENET.std, []),
    "0..255": (lambda pixels: pixels * 255, ["raw-values"]),
    "0..1": (lambda pixels: pixels, ["unit-values"]),
    "-1..1": (lambda pixels: 2 * pixels - 1, ["symmetric-values"]),
    "mean alone": (lambda pixels: pixels - IMAGENET.mean, []),
    "0..255 normalized": (
        lambda pixels: (pixels * 255 - IMAGENET.mean) / IMAGENET.std, ["values-out-of-range"]
    ),
    "0..255 less the mean": (
        lambda pixels: (pixels - IMAGENET.mean) * 255, ["values-out-of-range"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_of_arrays_is_recognized(case: str) -> None:
    """Arrays that were not normalized as the preprocessing says are named by their range."""
    scale, expected = SCALES[case]
    images = pictures(40)
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    values = scale(images / 255.0).transpose(0, 3, 1, 2).astype(np.float32)
    assert expected == codes(lint_arrays([values], IMAGENET))


def test_unknown_preprocessing_leaves_only_raw_pixels_to_find() -> None:
    """Without a preprocessing normalized arrays of any kind are accepted, and 0..255 is noted."""
    pixels = pictures(40).transpose(0, 3, 1, 2).astype(np.float32)
    for values in (pixels / 255, pixels / 127.5 - 1, (pixels - 120) / 57):
        report = lint_arrays([values])
        assert ([], None, None) == (codes(report), report.figures.mean, report.figures.grayscale)
    assert ["raw-values"] == codes(lint_arrays([pixels]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_an_error(value: float) -> None:
    """One NaN or Inf makes an image unusable and calibration impossible."""
    values = arrays(pictures(40))
    values[3, 1, 2, 2] = value
    report = lint_arrays([values], IMAGENET)
    assert ["not-finite"] == codes(report)
    assert (1, 39) == (report.figures.not_finite, report.figures.usable)
    assert report.errors


def test_inputs_of_other_kinds_are_counted_and_compared() -> None:
    """Vectors and pairs of inputs have no colours, but may be few, copies or constant."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40, 5)).astype(np.float32)
    numbers = random.normal(size=(40, 1)).astype(np.float32)
    assert [] == codes(lint_arrays([vectors]))
    assert [] == codes(lint_arrays([numbers]))
    vectors[:10] = vectors[0]
    vectors[10:20] = np.arange(10)[:, None]
    assert ["few-images", "duplicates", "blank-images"] == codes(lint_arrays([vectors]))
    linter = Linter()
    linter.add(vectors, numbers)
    report = linter.report()
    assert (40, 0, 0) == (report.figures.usable, report.figures.duplicates, report.figures.constant)


def test_grey_pictures_of_one_channel_are_looked_at() -> None:
    """``[n, 1, H, W]`` is no RGB picture: only counts are made, and nothing fails."""
    values = arrays(pictures(40))[:, :1]
    report = lint_arrays([values], IMAGENET)
    assert ([], None) == (codes(report), report.figures.mean)


def test_nothing_at_all_is_too_few() -> None:
    """Without any image there is a report, and it is an error."""
    report = lint_arrays([], IMAGENET)
    assert (["few-images"], 0) == (codes(report), report.figures.images)


def test_files_that_vanish_are_named(tmp_path: Path) -> None:
    """A file that is no more there when its size is asked for is named."""
    save(tmp_path, pictures(3))
    folder = ImageFolder.open(tmp_path)
    (tmp_path / "001.png").unlink()
    with pytest.raises(ImageDataError, match=r"001\.png cannot be read"):
        Linter(IMAGENET).report(folder)


def test_errors_come_first_and_json_tells_everything(tmp_path: Path) -> None:
    """The JSON form has all findings, the errors first, and all figures as plain values."""
    images = pictures(6)
    report = saved(tmp_path, np.concatenate([images, images])[..., [0, 0, 0]])
    assert ["error", "warning", "warning"] == [finding.level for finding in report.findings]
    assert report.findings == report.errors + report.warnings
    document = json.loads(json.dumps(report.to_json()))
    assert document["findings"][0] == {
        "code": "few-images",
        "level": "error",
        "message": report.findings[0].message,
    }
    assert (12, 6, 6) == tuple(
        document["figures"][key] for key in ("images", "usable", "duplicates")
    )
    assert 3 == len(document["figures"]["mean"])


MIXED = np.concatenate(
    [
        pictures(9),
        pictures(3),
        pictures(4, seed=5)[..., [0, 0, 0]],
        np.zeros((2, SIZE, SIZE, 3), np.uint8),
    ]
)
"""Pictures, copies of some, grey and black ones."""


@given(st.permutations(range(len(MIXED))), st.integers(1, len(MIXED) + 1))
@settings(max_examples=25, deadline=None)
def test_neither_order_nor_batches_matter(order: list[int], batch_size: int) -> None:
    """The report is the same, to the last bit, in any order and any grouping."""
    values = arrays(MIXED)
    shuffled = values[order]
    groups = [shuffled[i : i + batch_size] for i in range(0, len(MIXED), batch_size)]
    assert lint_arrays([values], IMAGENET) == lint_arrays(groups, IMAGENET)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_copies_are_what_is_left_of_the_distinct(picks: list[int]) -> None:
    """Whatever is repeated how often: images are the distinct ones and their copies."""
    figures = lint_arrays([arrays(pictures(6))[picks]], IMAGENET).figures
    assert (len(set(picks)), len(picks) - len(set(picks))) == (figures.usable, figures.duplicates)


def test_a_folder_is_what_its_batches_are(tmp_path: Path) -> None:
    """A folder and its preprocessed arrays have the same figures, but for files and labels."""
    save(tmp_path, pictures(20))
    folder = ImageFolder.open(tmp_path)
    of_arrays = lint_arrays(batches(folder, PixelMemory(IMAGENET), 7), IMAGENET).figures
    of_folder = lint(tmp_path).figures
    assert (0, 0, None, None) == (
        of_folder.tiny, of_folder.cropped, of_arrays.tiny, of_arrays.cropped
    )  # fmt: skip
    assert (of_folder.mean, of_folder.white, of_folder.usable) == (
        of_arrays.mean, of_arrays.white, of_arrays.usable
    )  # fmt: skip
