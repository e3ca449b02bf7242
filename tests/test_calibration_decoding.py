"""Images as batches: the same as file by file, decoded once, within a limit of memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration import decoding
from calibration.decoding import PixelMemory, batches
from calibration.images import ImageDataError, ImageFolder, Preprocess, load_image, load_pixels

SMALL = Preprocess(image_size=(8, 8))
IMAGE_BYTES = 8 * 8 * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Seven pictures of noise."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(7):
        pixels = random.integers(0, 256, (9, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index}.png")
    return ImageFolder.open(root)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was decoded."""
    counts: Counter[str] = Counter()

    def counting(path: Path, preprocess: Preprocess):
        counts[path.name] += 1
        return load_pixels(path, preprocess)

    monkeypatch.setattr(decoding, "load_pixels", counting)
    return counts


@given(size=st.integers(1, 9), limit=st.integers(0, 8))
@settings(max_examples=25, deadline=None)
def test_batches_are_the_files_in_order(folder: ImageFolder, size: int, limit: int) -> None:
    """Whatever the batch size and however many of them are kept, the second time too."""
    memory = PixelMemory(SMALL, limit * IMAGE_BYTES)
    expected = np.stack([load_image(path, SMALL) for path in folder.files])
    for _ in range(2):
        found = list(batches(folder, memory, size))
        assert all(len(batch) == size for batch in found[:-1])
        np.testing.assert_array_equal(expected, np.concatenate(found))


@pytest.mark.parametrize(("kept", "further"), [(7, 0), (3, 4), (0, 7)])
def test_a_file_is_decoded_once_while_there_is_room(
    folder: ImageFolder, decoded: Counter[str], kept: int, further: int
) -> None:
    memory = PixelMemory(SMALL, kept * IMAGE_BYTES)
    for total in (7, 7 + further):
        list(batches(folder, memory, 2))
        assert total == sum(decoded.values())


def test_the_next_batch_is_decoded_while_the_caller_works(
    folder: ImageFolder, decoded: Counter[str]
) -> None:
    """And no more than that: an early end decodes no further."""
    found = batches(folder, PixelMemory(SMALL), 2)
    next(found)
    found.close()
    assert 2 <= sum(decoded.values()) <= 4


def test_the_first_file_that_cannot_be_decoded_is_named(
    folder: ImageFolder, tmp_path: Path
) -> None:
    good = folder.files[0].read_bytes()
    for name, content in (("a.png", good), ("b.png", good[:40]), ("c.png", b"")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageDataError, match=r"b\.png"):
        list(batches(ImageFolder.open(tmp_path), PixelMemory(SMALL), 1))
