"""Images for calibration and parity: labels, counts, hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.images import Preprocess
from exporter.errors import InputError
from exporter.running.image_set import ArrayImages, FolderImages, outputs_of
from exporter.running.onnx_runner import BATCH_SIZE

PREPROCESS = Preprocess(image_size=(8, 8), crop_fraction=1.0)


def save(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def opened(root: Path, count: int = 100, *, skip_bad: bool = False) -> FolderImages:
    return FolderImages.open(root, PREPROCESS, "my images", count=count, skip_bad=skip_bad)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Two cats and a dog."""
    for index, name in enumerate(["cat/a.png", "cat/b.png", "dog/a.png"]):
        save(tmp_path / name, 50 * index)
    return tmp_path


def test_labels_follow_the_class_names(animals: Path) -> None:
    """With class names a folder's label is the index of its name."""
    found = opened(animals).labels(["bird", "dog", "cat"], 3)
    assert found is not None
    assert ([2, 2, 1], np.int64) == (found.tolist(), found.dtype)


def test_labels_follow_the_sorted_folders(animals: Path) -> None:
    """Without class names the sorted folder names are the classes."""
    found = opened(animals).labels(None, 2)
    assert found is not None
    assert [0, 0, 1] == found.tolist()


@pytest.mark.parametrize(
    ("class_names", "num_classes"),
    [(None, 3), (["cat", "dog"], 3), (["cat", "bird"], 2), (["Cat", "Dog"], 2)],
    ids=["another number", "network has more", "folder without class", "case"],
)
def test_folders_that_do_not_fit_carry_no_labels(
    animals: Path, class_names: list[str] | None, num_classes: int
) -> None:
    """Where names or their number do not fit the network, there are no labels, and no guess."""
    assert opened(animals).labels(class_names, num_classes) is None


def test_files_without_folders_carry_no_labels(tmp_path: Path) -> None:
    """Images directly in the folder are unlabelled."""
    save(tmp_path / "a.png")
    assert opened(tmp_path).labels(["x"], 1) is None


def test_bad_images_are_skipped_and_counted_on_request(animals: Path) -> None:
    """skip_bad leaves corrupt files out and says how many; labels stay in step."""
    (animals / "cat" / "a.png").write_bytes(b"broken")
    images = opened(animals, skip_bad=True)
    assert (2, 1) == (images.count, images.skipped)
    assert (2, 1) == (images.to_json()["images"], images.to_json()["skipped"])
    assert (2, 3, 8, 8) == np.concatenate([batch for (batch,) in images.batches()]).shape
    labels = images.labels(None, 2)
    assert labels is not None
    assert [0, 1] == labels.tolist()


def test_bad_images_are_errors_otherwise(animals: Path) -> None:
    """Without skip_bad the first corrupt file is named, with the way out."""
    (animals / "cat" / "b.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"b\.png cannot be decoded .*; --skip-bad-images leaves"):
        list(opened(animals).batches())


def test_a_folder_of_only_bad_images_is_an_error(tmp_path: Path) -> None:
    """When all are skipped, nothing is left to calibrate with, and the number is given."""
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"holds no readable image \(3 skipped\)$"):
        opened(tmp_path, skip_bad=True)


def test_missing_and_empty_folders_are_errors(tmp_path: Path) -> None:
    """The folder is named."""
    with pytest.raises(InputError, match=r"absent does not exist$"):
        opened(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no image"):
        opened(tmp_path)


def test_a_vanished_file_is_an_error_of_ours(animals: Path) -> None:
    """A file that disappears between listing and hashing is named."""
    images = opened(animals)
    (animals / "dog" / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png cannot be read"):
        images.to_json()


def test_count_bounds_the_images(animals: Path) -> None:
    """At most count images are taken, and every class stays in."""
    images = opened(animals, count=2)
    assert 2 == images.count
    labels = images.labels(None, 2)
    assert labels is not None
    assert [0, 1] == labels.tolist()


def test_description_is_recorded(animals: Path) -> None:
    """The words for the report are the caller's and are in the JSON with the data's hash."""
    images = opened(animals)
    assert "my images" == images.description == images.to_json()["description"]
    assert 64 == len(images.to_json()["sha256"])


def test_the_hash_follows_the_contents(animals: Path) -> None:
    """One changed pixel is another hash."""
    before = opened(animals).to_json()["sha256"]
    save(animals / "dog" / "a.png", 101)
    assert before != opened(animals).to_json()["sha256"]


def test_arrays_carry_no_labels() -> None:
    """Preprocessed arrays are images only."""
    images = ArrayImages.of(np.zeros((3, 3, 8, 8), np.float32))
    assert images.labels(["a", "b"], 2) is None
    assert (3, "arrays passed by the caller") == (images.count, images.description)


def test_array_batches_are_the_array_in_order() -> None:
    """Batches have at most BATCH_SIZE images and add up to the array."""
    array = np.arange(2 * BATCH_SIZE + 3, dtype=np.float32).reshape(-1, 1, 1, 1)
    batches = [batch for (batch,) in ArrayImages.of(array).batches()]
    assert [BATCH_SIZE, BATCH_SIZE, 3] == [len(batch) for batch in batches]
    np.testing.assert_array_equal(array, np.concatenate(batches))


def test_the_hash_of_arrays_is_that_of_their_bytes() -> None:
    """sha256 over the values in C order, whatever the memory layout."""
    array = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    expected = hashlib.sha256(array.tobytes()).hexdigest()
    assert expected == ArrayImages.of(array).to_json()["sha256"]
    assert expected == ArrayImages.of(np.asfortranarray(array)).to_json()["sha256"]


def test_outputs_of_runs_every_batch_in_order() -> None:
    """The network sees each batch once; its answers are concatenated."""
    array = np.arange(BATCH_SIZE + 5, dtype=np.float32).reshape(-1, 1, 1, 1)
    sizes: list[int] = []

    def run(inputs: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        (batch,) = inputs
        sizes.append(len(batch))
        return {"logits": np.concatenate([batch[:, :, 0, 0], -batch[:, :, 0, 0]], axis=1)}

    outputs = outputs_of(run, ArrayImages.of(array).batches())
    assert [BATCH_SIZE, 5] == sizes
    expected = np.stack([array.ravel(), -array.ravel()], axis=1)
    np.testing.assert_array_equal(expected, outputs["logits"])


def test_batches_of_another_size_have_outputs_of_their_own() -> None:
    """The size of the first batch is unmarked; ``@HxW`` marks the others."""
    sizes = [(2, 4, 6), (3, 4, 6), (1, 8, 4)]
    chunks = tuple((np.ones((n, 1, h, w), np.float32),) for n, h, w in sizes)
    found = outputs_of(
        lambda batch: {"sum": batch[0].sum((2, 3))}, ArrayImages(chunks=chunks).batches()
    )
    assert {"sum": (5, 1), "sum@8x4": (1, 1)} == {name: v.shape for name, v in found.items()}


def test_several_inputs_travel_together() -> None:
    """Each batch has the same images of every input; how they were passed does not matter."""
    left = np.arange(40, dtype=np.float32).reshape(40, 1)
    right = -left.reshape(40, 1, 1)
    whole = ArrayImages.of(left, right)
    parts = ArrayImages(chunks=((left[:7], right[:7]), (left[7:], right[7:])))
    assert whole.to_json() == parts.to_json()
    assert (40, 40) == (whole.count, parts.count)
    for images in (whole, parts):
        batches = list(images.batches())
        assert [16, 16, 8] == [len(batch[0]) for batch in batches]
        for first, second in batches:
            np.testing.assert_array_equal(first.ravel(), -second.ravel())


def test_single_images_are_those_of_the_batches() -> None:
    """Counted through all chunks, every input; there is none behind the last."""
    left = np.arange(40, dtype=np.float32).reshape(40, 1)
    images = ArrayImages(chunks=((left[:7], -left[:7]), (left[7:], -left[7:])))
    for index in (0, 6, 7, 39):
        first, second = images.image(index)
        assert ((1, 1), float(index), -float(index)) == (
            first.shape, first.item(), second.item(),
        )  # fmt: skip
    assert "image 7" == images.name(7)
    with pytest.raises(IndexError):
        images.image(40)


def test_a_file_is_found_by_its_name_within_the_folder(animals: Path) -> None:
    """The image of an index is that of the batches; one that has vanished is named."""
    images = opened(animals)
    (batch, *_) = next(iter(images.batches()))
    for index in range(len(batch)):
        np.testing.assert_array_equal(batch[index], images.image(index)[0][0])
        assert images.folder.files[index] == animals / images.name(index)
    images = opened(animals)
    images.folder.files[0].unlink()
    with pytest.raises(InputError, match=str(images.folder.files[0])):
        images.image(0)
