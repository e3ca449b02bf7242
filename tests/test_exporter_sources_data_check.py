"""Calibration images against the network: what the user is told before INT8 trusts them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from calibration.decoding import PixelMemory
from calibration.images import ImageFolder, Preprocess
from exporter.errors import InputError
from exporter.request import ExportRequest, validate
from exporter.running.image_set import ArrayImages, FolderImages
from exporter.sources.data_check import SAMPLE_IMAGES, DataCheck, check_calibration, require_usable
from exporter.sources.source import Source, load_network
from exporter.spec import RANDOM
from models.fusion import reparameterize
from models.registry import bundled_weights
from models.repvgg import RepVGG
from models.variants import Variant

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Variant(name="T", num_blocks=(1, 1, 1, 1), width_multiplier=(0.25, 0.1, 0.1, 0.02))
SIZE = 32
MEAN, STD = (
    np.array(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
IMAGENET = Preprocess(image_size=(SIZE, SIZE), crop_fraction=1.0)
UNIT = replace(IMAGENET, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def pictures(count: int, seed: int) -> np.ndarray:
    """Colour pictures ``[count, SIZE, SIZE, 3]`` uint8 from black to white, red the brightest."""
    random = np.random.default_rng(seed)
    light = random.normal(0, 0.1, (count, 1, 1, 1)) + random.normal(0, 0.16, (count, SIZE, SIZE, 1))
    tint = random.normal(0, 1, (count, 1, 1, 3)) * [0.03, 0.04, 0.12]
    pixels = np.clip(light + tint + [0.485, 0.456, 0.406], 0, 1)
    pixels[:, 0, 0], pixels[:, 0, 1] = 0, 1
    return np.rint(pixels * 255).astype(np.uint8)


TRAINING, GIVEN = pictures(128, 1), pictures(48, 2)


def unit(images: np.ndarray) -> np.ndarray:
    """``[n, 3, H, W]`` on [0, 1]."""
    return images.transpose(0, 3, 1, 2) / np.float32(255)


def normalized(images: np.ndarray) -> np.ndarray:
    return ((unit(images) - MEAN) / STD).astype(np.float32)


def source_trained_on(images: np.ndarray, preprocess: Preprocess | None = None) -> Source:
    """A network whose BatchNorms have settled on ``images`` ``[n, 3, H, W]``."""
    torch.manual_seed(0)
    network = RepVGG(TINY, num_classes=2)
    for child in network.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = None
    with torch.no_grad():
        network.train()(torch.from_numpy(images.astype(np.float32)))
    return Source(
        module=network.eval(), variant=TINY, form="train", origin={"source": "file"}, notes=(),
        preprocess=preprocess,
    )  # fmt: skip


def folder(root: Path, images: np.ndarray, preprocess: Preprocess) -> FolderImages:
    for index, pixels in enumerate(images):
        label = root / "ab"[index % 2]
        label.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(label / f"{index:03}.png")
    found = ImageFolder.open(root)
    return FolderImages(folder=found, memory=PixelMemory(preprocess), description="folder")


def codes(check: DataCheck) -> list[str]:
    return [finding.code for finding in check.report.findings]


def test_the_bundled_network_and_images_pass_in_silence() -> None:
    """The default export says nothing about its data."""
    bundled = bundled_weights("A0")
    assert bundled is not None
    source = load_network(validate(ExportRequest(model="A0", precision="int8")))
    assert source.preprocess is not None
    images = FolderImages.open(
        bundled.calibration_images, source.preprocess, "bundled", count=128, skip_bad=False
    )
    check = check_calibration(images, source, source.preprocess, bundled.class_names)
    assert ((), ()) == (check.report.findings, check.notes)
    assert check.training is not None
    assert check.training.given < 0.002
    assert check.training.images == SAMPLE_IMAGES
    require_usable(check)
    other = replace(source.preprocess, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    wrong = replace(images, memory=PixelMemory(other))
    (finding,) = [
        finding
        for finding in check_calibration(wrong, source, None, bundled.class_names).report.findings
        if finding.code == "wrong-preprocessing"
    ]
    assert "with the mean and std that came with the network" in finding.message
    assert '"mean" is [0.3, 0.3, 0.3] and "std" [0.35, 0.35, 0.35]' in finding.message


FOLDER_CASES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Preprocess, str | None]] = {
    "right": (normalized, IMAGENET, None),
    "right, on [0, 1]": (unit, UNIT, None),
    "trained without normalization": (
        unit, IMAGENET,
        r"on \[0, 1\], not normalized .*pass --preprocess FILE "
        r'in which "mean" is \[0.0, 0.0, 0.0\] and "std" \[1.0, 1.0, 1.0\]$',
    ),
    "trained with ImageNet's": (
        normalized, UNIT, "with ImageNet's mean and std .*pass --preprocess imagenet$"
    ),
    "trained on bytes": (
        lambda images: unit(images) * 255, IMAGENET,
        r'on 0..255, not normalized .*"std" \[0.00392157, 0.00392157, 0.00392157\]$',
    ),
    "trained in BGR": (
        lambda images: normalized(images[..., ::-1]), IMAGENET,
        r"times better in blue-green-red order \(.*pass arrays .* from Python",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDER_CASES)
def test_a_folder_in_a_preprocessing_that_the_network_was_not_trained_with(
    case: str, tmp_path: Path
) -> None:
    """The right preprocessing is named, and the option that gives it."""
    prepare, preprocess, expected = FOLDER_CASES[case]
    images = folder(tmp_path, GIVEN, preprocess)
    check = check_calibration(images, source_trained_on(prepare(TRAINING)), None)
    assert ["wrong-preprocessing"] * (expected is not None) == codes(check)
    if expected is not None:
        message = check.report.findings[0].message
        assert re.search(expected, message), message
        assert (f"calibration images: {message}",) == check.notes


ARRAY_CASES: dict[str, tuple[np.ndarray, np.ndarray, str | None]] = {
    "right": (normalized(TRAINING), normalized(GIVEN), None),
    "right, bytes": (unit(TRAINING) * 255, unit(GIVEN) * 255, None),
    "bytes for normalized": (normalized(TRAINING), unit(GIVEN) * 255, "with ImageNet's mean"),
    "[0, 1] for normalized": (normalized(TRAINING), unit(GIVEN), "with ImageNet's mean"),
    "[-1, 1] for [0, 1]": (unit(TRAINING), unit(GIVEN) * 2 - 1, "on [0, 1], not normalized"),
    "normalized for [-1, 1]": (unit(TRAINING) * 2 - 1, normalized(GIVEN), "mean 0.5 and std 0.5"),
    "centred bytes for [0, 1]": (
        unit(TRAINING), ((unit(GIVEN) - MEAN) * 255), "on [0, 1], not normalized"
    ),
    "BGR": (normalized(TRAINING), normalized(GIVEN[..., ::-1]), "in blue-green-red order"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAY_CASES)
def test_arrays_of_unknown_making_are_told_by_their_range(case: str) -> None:
    """With no preprocessing the range tells how arrays were made, and the network what it wants."""
    trained, given, expected = ARRAY_CASES[case]
    images = ArrayImages.of(given.astype(np.float32))
    check = check_calibration(images, source_trained_on(trained), None)
    messages = [f.message for f in check.report.findings if f.code == "wrong-preprocessing"]
    assert (expected is not None) == len(messages)
    if expected is not None:
        assert expected in messages[0]
        assert messages[0].endswith("pass arrays that are prepared so")


def test_arrays_that_are_not_what_their_preprocessing_says_are_told_by_their_range() -> None:
    """A stated preprocessing that the values contradict is not believed."""
    source = source_trained_on(normalized(TRAINING))
    check = check_calibration(ArrayImages.of(unit(GIVEN)), source, IMAGENET)
    assert ["unit-values", "wrong-preprocessing"] == codes(check)


def test_images_far_from_training_are_noted() -> None:
    """Where no preprocessing explains the distance, the images may be of another kind."""
    source = source_trained_on(normalized(TRAINING))
    dark = ((unit(GIVEN) * 0.3 - MEAN) / STD).astype(np.float32)
    check = check_calibration(ArrayImages.of(dark), source, IMAGENET)
    assert ["unlike-training"] == codes(check)


def test_arrays_in_no_known_range_are_asked_for_their_order() -> None:
    """Of arrays normalized in a way of one's own, the order and the distance can be told."""
    given, trained = normalized(GIVEN) * 3, normalized(TRAINING) * 3
    right = check_calibration(ArrayImages.of(given), source_trained_on(trained), None)
    assert (["given-bgr"], []) == (
        list(right.to_json()["training_statistics"]["distances"]),
        codes(right),
    )
    swapped = check_calibration(ArrayImages.of(given), source_trained_on(trained[:, ::-1]), None)
    assert ["wrong-preprocessing"] == codes(swapped)
    assert "times better in blue-green-red order (" in swapped.report.findings[0].message
    other = check_calibration(ArrayImages.of(given * 3), source_trained_on(trained), None)
    assert ["unlike-training"] == codes(other)


def test_a_network_in_deploy_form_is_not_asked() -> None:
    """Without BatchNorms there is no second witness; the images are still looked at."""
    source = source_trained_on(normalized(TRAINING))
    fused = replace(source, module=reparameterize(source.module), form="deploy")
    check = check_calibration(ArrayImages.of(unit(GIVEN)), fused, IMAGENET)
    assert check.training is None
    assert ["unit-values"] == codes(check)


def test_random_weights_are_not_asked(tmp_path: Path) -> None:
    """Statistics drawn at random are no memory of anything."""
    spec = validate(ExportRequest(model="A0", precision="int8", weights=RANDOM, calibration="x"))
    check = check_calibration(folder(tmp_path, GIVEN, IMAGENET), load_network(spec), None)
    assert (None, []) == (check.training, codes(check))


def test_other_inputs_than_one_image_are_counted() -> None:
    """Two inputs, or vectors, are no pictures, so that the network is not asked."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40, 5)).astype(np.float32)
    source = source_trained_on(normalized(TRAINING))
    for images in (ArrayImages.of(vectors), ArrayImages.of(normalized(GIVEN)[:40], vectors)):
        check = check_calibration(images, source, None)
        assert (None, [], 40) == (check.training, codes(check), check.report.figures.images)


def test_arrays_of_different_sizes_are_one_set() -> None:
    """Where height and width are free, chunks of several sizes are looked at together."""
    source = source_trained_on(normalized(TRAINING))
    values = normalized(GIVEN)
    images = ArrayImages(chunks=((values[:20],), (values[20:, :, :24],)))
    check = check_calibration(images, source, IMAGENET)
    assert check.training is not None
    assert (48, []) == (check.training.images, codes(check))


def test_unusable_images_are_refused(tmp_path: Path) -> None:
    """Errors become one refusal with exit code 2, and the network is not asked."""
    images = folder(tmp_path, GIVEN[:4], IMAGENET)
    check = check_calibration(images, source_trained_on(normalized(TRAINING)), None)
    assert check.training is None
    with pytest.raises(InputError, match="only 4 of 4 calibration images are usable") as caught:
        require_usable(check)
    assert 2 == caught.value.exit_code


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    """A file that cannot be decoded ends the check as it would end calibration."""
    images = folder(tmp_path, GIVEN, IMAGENET)
    (tmp_path / "a" / "004.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"004\.png cannot be decoded"):
        check_calibration(images, source_trained_on(normalized(TRAINING)), None)


def test_the_sample_is_spread_over_all_images() -> None:
    """Of many images 64 at most are shown to the network, from the first to the last."""
    source = source_trained_on(normalized(TRAINING))
    many = normalized(np.concatenate([TRAINING, pictures(142, 5)]))
    first = check_calibration(ArrayImages.of(many), source, IMAGENET)
    picks = [-(-index * len(many) // SAMPLE_IMAGES) for index in range(SAMPLE_IMAGES)]
    picked = check_calibration(ArrayImages.of(many[picks]), source, IMAGENET)
    others = check_calibration(ArrayImages.of(many[:SAMPLE_IMAGES]), source, IMAGENET)
    assert first.training is not None
    assert SAMPLE_IMAGES == first.training.images
    assert first.training == picked.training != others.training


def test_class_names_reach_the_linter(tmp_path: Path) -> None:
    """A class of the network without any image is found."""
    images = folder(tmp_path, GIVEN, IMAGENET)
    source = source_trained_on(normalized(TRAINING))
    assert ["missing-classes"] == codes(check_calibration(images, source, None, ["a", "b", "c"]))


def test_the_manifest_form_is_json() -> None:
    """Findings, figures and the distance of every preprocessing tried are plain values."""
    source = source_trained_on(normalized(TRAINING))
    check = check_calibration(ArrayImages.of(unit(GIVEN)), source, None)
    document = json.loads(json.dumps(check.to_json()))
    assert "wrong-preprocessing" == document["findings"][0]["code"]
    assert 48 == document["figures"]["images"]
    training = document["training_statistics"]
    assert ("imagenet", 48) == (training["best"], training["images"])
    assert training["distances"]["imagenet"] < 0.02 < training["given"]
    silent = check_calibration(ArrayImages.of(np.zeros((9, 4), np.float32)), source, None)
    assert json.loads(json.dumps(silent.to_json()))["training_statistics"] is None
