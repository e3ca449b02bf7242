"""Images and preprocessing against independent computations, and every refusal by name."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calibration.decoding import PixelMemory, batches
from calibration.images import (
    ImageDataError,
    ImageFolder,
    Preprocess,
    load_image,
    unreadable,
)

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder_of(root: Path, sizes: dict[str, int]) -> ImageFolder:
    for label, count in sizes.items():
        (root / label).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            picture(4, 4, index).save(root / label / f"{index:03}.png")
    return ImageFolder.open(root)


def normalized(pixels: np.ndarray) -> np.ndarray:
    """Channels first, one scalar at a time in double precision."""
    height, width, _ = pixels.shape
    out = np.empty((3, height, width))
    for channel in range(3):
        out[channel] = (pixels[:, :, channel] / 255.0 - MEAN[channel]) / STD[channel]
    return out


def test_an_image_of_the_crop_size_is_only_normalized() -> None:
    """With crop_fraction 1 an image of the right size is copied pixel for pixel."""
    image = picture(20, 30)
    found = Preprocess(image_size=(30, 20), crop_fraction=1.0)(image)
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.float32, (3, 30, 20), True)
    np.testing.assert_allclose(found, normalized(np.asarray(image)), atol=2e-6)


def test_pixels_are_what_is_normalized() -> None:
    """Calling is normalize(pixels), one image or many; denormalize is the way back."""
    preprocess = Preprocess(image_size=(12, 9))
    images = [picture(40, 30, seed) for seed in range(3)]
    pixels = np.stack([preprocess.pixels(image) for image in images])
    assert (np.uint8, (3, 12, 9, 3)) == (pixels.dtype, pixels.shape)
    expected = np.stack([preprocess(image) for image in images])
    np.testing.assert_array_equal(expected, preprocess.normalize(pixels))
    np.testing.assert_allclose(preprocess.denormalize(expected), pixels, rtol=0, atol=1e-4)


def test_the_imagenet_default_is_resize_256_and_crop_224() -> None:
    """crop_fraction 0.875 of 224 resizes the shorter edge to 256 and crops the centre."""
    image = picture(400, 300)
    resized = image.resize((341, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[16 : 16 + 224, 58 : 58 + 224]
    found = Preprocess()(image)
    assert found.shape == (3, 224, 224)
    np.testing.assert_allclose(found, normalized(expected), atol=2e-6)


@pytest.mark.parametrize("size", [(10, 7), (7, 10), (5, 5), (100, 3)])
def test_small_images_are_enlarged_to_cover_the_crop(size: tuple[int, int]) -> None:
    """An image smaller than the crop is enlarged; nothing is padded."""
    image = picture(*size)
    shorter = min(size)
    width, height = (int(edge * (16 / shorter)) for edge in size)
    left, top = round((width - 16) / 2), round((height - 16) / 2)
    box = image.resize((width, height), Image.Resampling.BICUBIC)
    expected = np.asarray(box)[top : top + 16, left : left + 16]
    found = Preprocess(image_size=(16, 16), crop_fraction=1.0, interpolation="bicubic")(image)
    np.testing.assert_allclose(found, normalized(expected), atol=2e-6)


@pytest.mark.parametrize("image_size", [(24, 48), (48, 24)])
def test_non_square_crops_are_covered(image_size: tuple[int, int]) -> None:
    """The image covers both edges of a non-square crop, keeping its proportions."""
    image = picture(60, 40)
    height, width = image_size
    factor = max(height / 40, width / 60)
    resized = image.resize((int(60 * factor), int(40 * factor)), Image.Resampling.NEAREST)
    left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
    expected = np.asarray(resized)[top : top + height, left : left + width]
    preprocess = Preprocess(image_size=image_size, crop_fraction=1.0, interpolation="nearest")
    np.testing.assert_allclose(preprocess(image), normalized(expected), atol=2e-6)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.5, 1), st.integers(1, 40))
@settings(max_examples=40)
def test_every_size_gives_the_crop(width: int, height: int, fraction: float, edge: int) -> None:
    """Whatever the image, the output has the crop's shape and finite values."""
    preprocess = Preprocess(image_size=(edge, edge + 3), crop_fraction=fraction)
    found = preprocess(picture(width, height))
    assert found.shape == (3, edge, edge + 3)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "CMYK", "1", "YCbCr"])
def test_eight_bit_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    """Any 8-bit mode is read as the RGB picture that PIL shows; alpha is dropped."""
    image = picture(8, 8).convert(mode)
    file = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    image.save(file)
    with Image.open(file) as stored:
        expected = normalized(np.asarray(stored.convert("RGB")))
    found = load_image(file, Preprocess(image_size=(8, 8), crop_fraction=1.0))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_transparency_is_dropped_without_a_warning(tmp_path: Path) -> None:
    """RGBA and transparent palette images keep their colours under any alpha."""
    rgb = picture(8, 8)
    preprocess = Preprocess(image_size=(8, 8), crop_fraction=1.0)
    rgba = rgb.copy()
    rgba.putalpha(0)
    np.testing.assert_array_equal(preprocess(rgb), preprocess(rgba))
    palette = rgb.convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_image(tmp_path / "p.png", preprocess)
    np.testing.assert_array_equal(preprocess(palette.convert("RGB")), found)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_wide_pixels_are_refused(dtype: type, tmp_path: Path) -> None:
    """Images of more than 8 bits a channel are refused by name instead of being clipped."""
    file = tmp_path / "deep.tif"
    Image.fromarray(np.full((8, 8), 1000, dtype=dtype)).save(file)
    with pytest.raises(ImageDataError, match=r"deep\.tif has pixel mode .*; only 8-bit images"):
        load_image(file, Preprocess())


def test_slivers_are_refused() -> None:
    """An image one pixel wide is an error rather than gigabytes of enlarged pixels."""
    with pytest.raises(ImageDataError, match=r"^is too narrow: 1 x 10000 pixels$"):
        Preprocess()(Image.new("RGB", (1, 10_000)))


def declared_png(path: Path, width: int, height: int) -> Path:
    """A PNG whose header says this size; of its rows there is none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + rows)
    return path


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (13_000, 13_000, r"is too large: 13000 x 13000, more than 90000000 pixels$"),
        (20_000, 20_000, r"is too large to be a picture \("),
        (1, 80_000_000, r"is too narrow: 1 x 80000000 pixels$"),
    ],
)
def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(
    width: int, height: int, message: str, tmp_path: Path
) -> None:
    """Not a row is decoded, as there is none to decode; no warning is left for the user."""
    with pytest.raises(ImageDataError, match=message):
        load_image(declared_png(tmp_path / "bomb.png", width, height), Preprocess())


def test_undecodable_files_are_named(tmp_path: Path) -> None:
    """Corrupt, truncated and empty files are refused by name, and listed by unreadable()."""
    root = folder_of(tmp_path, {"a": 1}).root
    picture(64, 64).save(root / "a" / "full.jpg")
    jpeg = (root / "a" / "full.jpg").read_bytes()
    (root / "a" / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    png = bytearray((root / "a" / "000.png").read_bytes())
    png[-30] ^= 0xFF
    (root / "a" / "bad.png").write_bytes(png)
    (root / "a" / "empty.bmp").write_bytes(b"")
    folder = ImageFolder.open(root)
    bad = unreadable(folder, Preprocess())
    assert [path.name for path in bad] == ["bad.png", "empty.bmp", "half.jpg"]
    for path in bad:
        with pytest.raises(ImageDataError, match=rf"^image .*{path.name} cannot be decoded \("):
            load_image(path, Preprocess())
    assert [path.name for path in folder.without(bad).files] == ["000.png", "full.jpg"]
    with pytest.raises(ImageDataError, match=r"bad\.png cannot be decoded"):
        list(batches(folder, PixelMemory(Preprocess()), 8))


def test_missing_empty_and_wrong_folders_are_refused(tmp_path: Path) -> None:
    """A folder that is missing, a file, or without images is refused with its reason."""
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ImageDataError, match=r"^image folder .*nowhere does not exist$"):
        ImageFolder.open(tmp_path / "nowhere")
    with pytest.raises(ImageDataError, match=r"^image folder .*notes\.txt is not a folder$"):
        ImageFolder.open(tmp_path / "notes.txt")
    with pytest.raises(ImageDataError, match=r"holds no image \(looked for \.bmp \.jpeg"):
        ImageFolder.open(tmp_path)


def test_order_does_not_depend_on_creation(tmp_path: Path) -> None:
    """Files are sorted by path, whatever order they were written in; suffixes ignore case."""
    names = ["b/2.png", "a/9.PNG", "b/10.png", "a/1.jpg", "a-b/3.png"]
    hashes = []
    for root, order in ((tmp_path / "x", names), (tmp_path / "y", names[::-1])):
        for name in order:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            picture(4, 4).save(root / name)
        folder = ImageFolder.open(root)
        found = [path.relative_to(root).as_posix() for path in folder.files]
        assert found == ["a/1.jpg", "a/9.PNG", "a-b/3.png", "b/10.png", "b/2.png"]
        assert folder.label_names() == ("a", "a", "a-b", "b", "b")
        hashes.append(folder.sha256())
    assert hashes[0] == hashes[1]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    """Where a file lies directly in the folder there are no labels."""
    folder_of(tmp_path, {"a": 1})
    picture(4, 4).save(tmp_path / "top.png")
    assert ImageFolder.open(tmp_path).label_names() is None


def test_hash_sees_every_byte_and_name(tmp_path: Path) -> None:
    """The hash changes when a byte, a name, a label or the selection changes."""
    folder = folder_of(tmp_path, {"a": 2, "b": 1})
    hashes = [folder.sha256(), folder.take(2).sha256()]
    file = folder.files[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    hashes.append(folder.sha256())
    file.rename(file.with_name("999.png"))
    hashes.append(ImageFolder.open(tmp_path).sha256())
    (tmp_path / "b").rename(tmp_path / "c")
    hashes.append(ImageFolder.open(tmp_path).sha256())
    assert len(set(hashes)) == 5
    with pytest.raises(ImageDataError, match=r"^image .*000\.png cannot be read \("):
        folder.sha256()


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes on POSIX only")
def test_names_that_are_not_utf8_are_hashed(tmp_path: Path) -> None:
    """A file name that is not valid UTF-8 does not stop the hash."""
    try:
        picture(4, 4).save(tmp_path / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system accepts UTF-8 names only")
    assert len(ImageFolder.open(tmp_path).sha256()) == 64


@pytest.mark.parametrize("count", [3, 4, 7, 10, 29])
@pytest.mark.parametrize("sizes", [{"a": 10, "b": 10, "c": 10}, {"a": 28, "b": 1, "c": 1}])
def test_take_keeps_every_class(count: int, sizes: dict[str, int], tmp_path: Path) -> None:
    """A selection has exactly the wanted count, in order, with every class in it."""
    folder = folder_of(tmp_path, sizes)
    taken = folder.take(count)
    assert len(taken.files) == len(set(taken.files)) == count
    assert list(taken.files) == sorted(taken.files)
    assert set(taken.label_names() or ()) == {"a", "b", "c"}
    assert taken == folder.take(count)


def test_take_is_even_and_bounded(tmp_path: Path) -> None:
    """An even spread where classes are equal; all files for None or more than there are."""
    folder = folder_of(tmp_path, {"a": 6, "b": 6})
    labels = folder.take(4).label_names()
    assert labels == ("a", "a", "b", "b")
    assert folder == folder.take(None) == folder.take(12) == folder.take(99)
    assert folder_of(tmp_path / "a", {}).take(3).label_names() is None
    for count in (0, -1):
        with pytest.raises(ValueError, match=r"^the number of images must be positive, not "):
            folder.take(count)


def test_batches_keep_order_and_size(tmp_path: Path) -> None:
    """Batches are full but for the last, and hold the images in the folder's order."""
    folder = folder_of(tmp_path, {"a": 3, "b": 2})
    preprocess = Preprocess(image_size=(4, 4), crop_fraction=1.0)
    found = list(batches(folder, PixelMemory(preprocess), 2))
    assert [len(batch) for batch in found] == [2, 2, 1]
    expected = [load_image(path, preprocess) for path in folder.files]
    np.testing.assert_array_equal(expected, np.concatenate(found))
    with pytest.raises(ValueError, match=r"^batch size must be positive, not 0$"):
        next(batches(folder, PixelMemory(preprocess), 0))


NUMBERS = st.floats(-10, 10)
POSITIVE = st.floats(0.01, 10)


@given(
    st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
    st.floats(0, 1, exclude_min=True),
    st.sampled_from(["nearest", "bilinear", "bicubic"]),
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.tuples(POSITIVE, POSITIVE, POSITIVE),
)
def test_json_round_trip(size: Any, fraction: Any, interpolation: Any, mean: Any, std: Any) -> None:
    """from_json(to_json(p)) equals p, and missing fields take the defaults."""
    preprocess = Preprocess(
        image_size=size, crop_fraction=fraction, interpolation=interpolation, mean=mean, std=std
    )
    assert preprocess == Preprocess.from_json(preprocess.to_json())
    assert Preprocess(mean=mean) == Preprocess.from_json({"mean": list(mean)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": 1}, r"^unknown preprocess field size; known: image_size, crop_fraction"),
        ({5: 1}, r"^unknown preprocess field 5; known: "),
        ([], r"^preprocess must be an object, not \[\]$"),
        ({"mean": "abc"}, r"^mean must be three finite numbers, not 'abc'$"),
        ({"mean": [0, 0]}, r"^mean must be three finite numbers, not \(0, 0\)$"),
        ({"mean": [0, 0, True]}, r"^mean must be three finite numbers"),
        ({"mean": [0, 0, float("nan")]}, r"^mean must be three finite numbers"),
        ({"mean": [0, 0, 1e39]}, r"^mean must be three finite numbers"),
        ({"mean": None}, r"^mean must be three finite numbers, not None$"),
        ({"std": [1, 1, 0]}, r"^std must be three positive numbers"),
        ({"std": [1, 1, 1e-50]}, r"^std must be three positive numbers"),
        ({"std": [1, 1, [1]]}, r"^std must be three positive numbers"),
        ({"image_size": [1.5, 2]}, r"^image_size must be two positive integers, not \(1.5, 2\)$"),
        ({"image_size": [True, 2]}, r"^image_size must be two positive integers"),
        ({"image_size": [0, 2]}, r"^image_size must be two positive integers"),
        ({"image_size": [2, 2, 2]}, r"^image_size must be two positive integers"),
        (
            {"image_size": [2**40, 1]},
            r"^image_size 1099511627776 x 1 is more than 16777216 pixels$",
        ),
        ({"image_size": 224}, r"^image_size must be two positive integers, not 224$"),
        ({"image_size": {"h": 1, "w": 2}}, r"^image_size must be two positive integers"),
        ({"crop_fraction": True}, r"^crop_fraction must be in \(0, 1\], not True$"),
        ({"crop_fraction": "1"}, r"^crop_fraction must be in \(0, 1\], not '1'$"),
        ({"crop_fraction": 0}, r"^crop_fraction must be in \(0, 1\], not 0$"),
        ({"interpolation": "cubic"}, r"^interpolation must be one of nearest, bilinear, bicubic"),
        ({"interpolation": {}}, r"^interpolation must be one of"),
        ({"crop_fraction": 2, "std": 1}, r"^crop_fraction must .*; std must be three positive"),
    ],
)
def test_bad_preprocess_fields_are_refused(data: Any, message: str) -> None:
    """Unknown fields and wrong types are a ValueError; several complaints come together."""
    with pytest.raises(ValueError, match=message):
        Preprocess.from_json(data)
