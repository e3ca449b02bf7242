"""The weights that ship: what the model card says is measured here; the public ones, offline."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from calibration.images import ImageFolder, Preprocess, load_image
from models.checkpoint import LoadedCheckpoint, load_checkpoint
from models.fusion import reparameterize
from models.registry import (
    PUBLIC_FILE,
    WEIGHTS_FOLDER,
    BundledWeights,
    PublicWeights,
    PublicWeightsError,
    bundled_weights,
    fetch_public,
    public_repository,
)
from models.variants import VARIANTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = (WEIGHTS_FOLDER / "a0_digits.md").read_text("utf-8")
EXAMPLE = Path(__file__).parents[1] / "examples" / "train_digits_a0.py"


@functools.cache
def bundled() -> BundledWeights:
    found = bundled_weights("A0")
    assert found is not None
    return found


def folder(name: str) -> ImageFolder:
    return ImageFolder.open({"test": bundled().test_images}.get(name, bundled().calibration_images))


def indices(name: str) -> list[int]:
    """Positions in scikit-learn's array, from the file names."""
    return [int(path.stem) for path in folder(name).files]


def contents(name: str) -> list[bytes]:
    """The decoded pixels of every picture."""
    pixels = []
    for path in folder(name).files:
        with Image.open(path) as image:
            pixels.append(image.tobytes())
    return pixels


@pytest.fixture(scope="module")
def loaded() -> LoadedCheckpoint:
    return load_checkpoint(bundled().checkpoint)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    datasets = pytest.importorskip("sklearn.datasets")
    pictures, labels = datasets.load_digits(return_X_y=True)
    return pictures.reshape(-1, 8, 8), labels


@pytest.fixture(scope="module")
def example(digits) -> ModuleType:
    """The training script, imported from its path."""
    spec = importlib.util.spec_from_file_location("train_digits_a0", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the bundled checkpoint -------------------------------------------------------------------


def test_the_bundled_checkpoint_is_a0_in_train_form(loaded):
    """It holds the three branches of a full-size A0 for ten classes."""
    found = (loaded.variant, loaded.form, loaded.format, loaded.num_classes)
    assert (VARIANTS["A0"], "train", "official", 10) == found
    assert tuple("0123456789") == bundled().class_names


def test_the_bundled_checkpoint_is_small():
    """It stays under 17 MB: kernels and classifier in half, the rest in float32."""
    assert bundled().checkpoint.stat().st_size < 17_000_000
    with safe_open(bundled().checkpoint, "pt") as file:
        kinds = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    for kind in kinds.values():
        assert ("F16" if len(kind.get_shape()) > 1 else "F32") == kind.get_dtype()


def test_its_accuracy_is_what_the_model_card_says(loaded):
    """Measured on all bundled test images it is at least 98 %, and the card states it."""
    preprocess = Preprocess.from_json(bundled().preprocess)
    images = folder("test")
    names = images.label_names()
    assert names is not None
    targets = torch.tensor([bundled().class_names.index(name) for name in names])
    batch = torch.from_numpy(np.stack([load_image(path, preprocess) for path in images.files]))
    fused = reparameterize(loaded.module)
    with torch.no_grad():
        hits = sum(
            int((fused(x).argmax(1) == y).sum())
            for x, y in zip(batch.split(60), targets.split(60), strict=True)
        )
    top1 = 100 * hits / len(targets)
    assert top1 >= 98
    assert f"{top1:.2f} % ({hits} of {len(targets)}) in float32 and {top1:.2f} % as stored" in CARD


def test_the_card_describes_the_files_that_ship():
    """File, sizes of the sets and seed in the card are those of the files."""
    assert f"`{bundled().checkpoint.name}`" in CARD
    test, calibration = len(indices("test")), len(indices("calibration"))
    assert f"seed 2021: {1797 - test} training, {test} test images; {calibration} of" in CARD
    mean, std = bundled().preprocess["mean"][0], bundled().preprocess["std"][0]
    assert f"mean {mean}, standard deviation {std} per channel" in CARD
    script = re.search(r"python (\S+)", CARD)
    assert script is not None
    assert EXAMPLE.relative_to(EXAMPLE.parents[1]).as_posix() == script[1]


def test_the_registry_names_files_that_exist():
    """Every path of registry.json is there, and nothing lies beside them unlisted."""
    entry = json.loads((WEIGHTS_FOLDER / "registry.json").read_text("utf-8"))["bundled"]["A0"]
    assert {entry["file"], entry["card"], "registry.json", "digits"} == {
        path.name for path in WEIGHTS_FOLDER.iterdir()
    }
    pictures = {path for path in (WEIGHTS_FOLDER / "digits").rglob("*") if path.is_file()}
    assert pictures == {*folder("test").files, *folder("calibration").files}


def test_variants_without_bundled_weights_give_none():
    """Only A0 ships."""
    assert ["A0"] == [name for name in VARIANTS if bundled_weights(name) is not None]


# --- the bundled images -----------------------------------------------------------------------


def test_test_and_calibration_images_are_disjoint():
    """No index and no picture is in both sets, nor twice in one."""
    by_index = indices("test") + indices("calibration")
    assert len(by_index) == len(set(by_index))
    hashes = [hashlib.sha256(p).digest() for p in contents("test") + contents("calibration")]
    assert len(hashes) == len(set(hashes))


@pytest.mark.parametrize(("name", "at_least"), [("test", 360), ("calibration", 64)])
def test_the_sets_are_large_enough_and_hold_every_class(name, at_least):
    """At least 64 images serve for calibration, and every class is in both sets."""
    labels = folder(name).label_names()
    assert labels is not None
    assert len(labels) >= at_least
    assert set(bundled().class_names) == set(labels)


@pytest.mark.parametrize("name", ["test", "calibration"])
def test_images_are_scikit_learns_digits_enlarged(name, digits, example):
    """Every picture is, pixel for pixel, what the training script makes of the digit it names."""
    pictures, labels = digits
    for path in folder(name).files:
        index = int(path.stem)
        assert str(labels[index]) == path.parent.name
        with Image.open(path) as image:
            assert ("L", (64, 64)) == (image.mode, image.size)
            assert example.enlarged(pictures[index]).tobytes() == image.tobytes()


def test_no_test_image_is_in_the_training_split(digits, example):
    """The script's split, made again, has exactly these test and calibration images."""
    selection = pytest.importorskip("sklearn.model_selection")
    _, labels = digits
    train, test = selection.train_test_split(
        np.arange(len(labels)),
        test_size=example.TEST_IMAGES,
        random_state=example.SEED,
        stratify=labels,
    )
    assert set(test) == set(indices("test"))
    assert set(indices("calibration")) <= set(train)
    pixels = {example.enlarged(digits[0][index]).tobytes() for index in train}
    assert not pixels & set(contents("test"))


def test_the_script_trains_with_the_registrys_preprocess(example):
    """The preprocessing that ships is the one the network was trained with."""
    assert Preprocess.from_json(bundled().preprocess) == example.PREPROCESS


# --- public checkpoints -----------------------------------------------------------------------


class FakeHub:
    """Stands for huggingface_hub: answers one commit and writes down what was asked."""

    def __init__(self, sha: str | None = COMMIT, error: Exception | None = None) -> None:
        self.sha, self.error = sha, error
        self.asked: list[tuple[Any, ...]] = []

    def model_info(self, repository: str, **_: object) -> SimpleNamespace:
        self.asked.append(("info", repository))
        if self.error is not None:
            raise self.error
        return SimpleNamespace(sha=self.sha)

    def download(self, repository: str, file: str, *, revision: str, **_: object) -> str:
        self.asked.append(("download", repository, file, revision))
        if self.error is not None:
            raise self.error
        return f"/cache/{revision}/{file}"

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        return self


def test_the_current_commit_is_resolved_and_exactly_it_is_downloaded(monkeypatch):
    """Without a revision the hub is asked for one, and the result can be repeated."""
    hub = FakeHub().install(monkeypatch)
    repository = "timm/repvgg_b1g4.rvgg_in1k"
    expected = PublicWeights(
        checkpoint=Path(f"/cache/{COMMIT}/model.safetensors"),
        repository=repository,
        revision=COMMIT,
    )
    assert expected == fetch_public("B1g4")
    assert [("info", repository), ("download", repository, PUBLIC_FILE, COMMIT)] == hub.asked


def test_a_given_revision_is_downloaded_without_asking(monkeypatch):
    """A full hash goes straight to the download."""
    hub = FakeHub().install(monkeypatch)
    other = COMMIT[::-1]
    assert other == fetch_public("A0", other).revision
    assert [("download", "timm/repvgg_a0.rvgg_in1k", PUBLIC_FILE, other)] == hub.asked


@pytest.mark.parametrize("revision", [None, COMMIT])
@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), OSError(28, "disk full"), ValueError()]
)
def test_a_hub_that_fails_names_repository_and_file(monkeypatch, error, revision):
    """The message says what to fetch by hand, where, at which commit, and how to pass it."""
    FakeHub(error=error).install(monkeypatch)
    with pytest.raises(PublicWeightsError) as caught:
        fetch_public("A2", revision)
    at = f" at commit {COMMIT}" if revision else ""
    assert str(caught.value) == (
        f"timm/repvgg_a2.rvgg_in1k cannot be downloaded here ({type(error).__name__}); fetch "
        f"model.safetensors from timm/repvgg_a2.rvgg_in1k on the Hugging Face hub{at} by hand and "
        "pass --weights path/to/model.safetensors"
    )
    assert caught.value.__cause__ is error


def test_a_repository_without_a_commit_is_refused(monkeypatch):
    """Nothing is downloaded that could not be recorded."""
    hub = FakeHub(sha=None).install(monkeypatch)
    with pytest.raises(PublicWeightsError, match=r"cannot be downloaded here \(LookupError\)"):
        fetch_public("A0")
    assert ["info"] == [asked[0] for asked in hub.asked]


def test_the_real_client_offline_names_repository_and_file(monkeypatch, tmp_path):
    """With the hub's own offline switch the real library's error is translated."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision in (None, COMMIT):
        with pytest.raises(PublicWeightsError, match=r"timm/repvgg_a0\.rvgg_in1k") as caught:
            fetch_public("A0", revision)
        assert PUBLIC_FILE in str(caught.value)


def test_without_the_library_the_file_is_named(monkeypatch):
    """A missing huggingface_hub is said, with the way around it."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PublicWeightsError, match=r"^huggingface_hub is not installed; fetch model"):
        fetch_public("A0")


@pytest.mark.parametrize(
    "revision", ["", "main", COMMIT[:-1], COMMIT + "0", COMMIT.upper(), f"{COMMIT}\n", "g" * 40]
)
def test_a_revision_that_is_no_full_hash_is_refused(monkeypatch, revision):
    """Branches, short hashes and others could mean another file tomorrow; none is asked for."""
    hub = FakeHub().install(monkeypatch)
    message = f"^revision {re.escape(repr(revision))} is not a full 40-digit commit hash$"
    with pytest.raises(PublicWeightsError, match=message):
        fetch_public("A0", revision)
    assert [] == hub.asked


@pytest.mark.parametrize("name", ["B1g2", "B2g2", "B3g2", "Z9"])
def test_a_variant_without_a_public_checkpoint_is_refused(monkeypatch, name):
    """The variants that have one are listed."""
    hub = FakeHub().install(monkeypatch)
    assert public_repository(name) is None
    with pytest.raises(
        PublicWeightsError, match=f"^no public checkpoint is known for {name} "
    ) as e:
        fetch_public(name)
    assert str(e.value).endswith("(known: A0, A1, A2, B0, B1, B1g4, B2, B2g4, B3, B3g4, D2se)")
    assert [] == hub.asked


def test_public_repositories_follow_their_variants_name():
    """Each is timm's ImageNet-1k repository of that variant."""
    known = {name: public_repository(name) for name in VARIANTS}
    expected = {
        name: None
        if name.endswith("g2") or name == "L2pse"
        else f"timm/repvgg_{name.lower()}.rvgg_in1k"
        for name in VARIANTS
    }
    assert expected == known
