"""Images on disk -> float batches, through the one Preprocess that the whole project shares.

Calibration, validation, the bundle's reference inputs and the training example all call the same
:class:`Preprocess`; its JSON form is what the manifest records. That is the whole defence against
the commonest INT8 accident, calibrating with another preprocessing than the network was trained on.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.float32]
PixelArray = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
)
_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# PIL converts these to 8 bits by clipping, which would silently blacken or whiten the picture.
_WIDE_MODES = ("I", "F")
# A sliver of an image grows without bound when its shorter edge is resized; no photograph does.
_MAX_RESIZED_PIXELS = 100_000_000
# Pillow holds 4 bytes a pixel, twice while it converts: 0.7 GB.
_MAX_PIXELS = 90_000_000
_MAX_CROP_PIXELS = 4096 * 4096
_OPENING = threading.Lock()


# Means and standard deviations beyond this would overflow or vanish in float32.
_LIMIT = 1e6


def _are_numbers(values: object, count: int, kind: type | tuple[type, ...] = (int, float)) -> bool:
    """Whether ``values`` is a tuple of ``count`` finite numbers; True and False are none."""
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
        and all(abs(value) < math.inf for value in values)
    )


class ImageDataError(ValueError):
    """The image data cannot be used; the message names the file or folder and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Resize the shorter edge, crop the centre, scale to [0, 1], normalize.

    ``image_size`` is ``(height, width)`` in pixels. The shorter edge is resized so that the crop
    covers ``crop_fraction`` of it (0.875: 256 for a 224 crop). ``mean`` and ``std`` are RGB values
    on the [0, 1] scale. The defaults are those of the published ImageNet checkpoints.
    """

    image_size: tuple[int, int] = (224, 224)
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        complaints = []
        if not _are_numbers(self.image_size, 2, int) or min(self.image_size) < 1:
            complaints.append(f"image_size must be two positive integers, not {self.image_size!r}")
        elif math.prod(self.image_size) > _MAX_CROP_PIXELS:
            height, width = self.image_size
            complaints.append(
                f"image_size {height} x {width} is more than {_MAX_CROP_PIXELS} pixels"
            )
        if not _are_numbers((self.crop_fraction,), 1) or not 0 < self.crop_fraction <= 1:
            complaints.append(f"crop_fraction must be in (0, 1], not {self.crop_fraction!r}")
        if not isinstance(self.interpolation, str) or self.interpolation not in _INTERPOLATIONS:
            known = ", ".join(_INTERPOLATIONS)
            complaints.append(f"interpolation must be one of {known}, not {self.interpolation!r}")
        if not _are_numbers(self.mean, 3) or max(map(abs, self.mean)) > _LIMIT:
            complaints.append(f"mean must be three finite numbers, not {self.mean!r}")
        if not _are_numbers(self.std, 3) or not all(1 / _LIMIT <= s <= _LIMIT for s in self.std):
            complaints.append(f"std must be three positive numbers, not {self.std!r}")
        if complaints:
            raise ValueError("; ".join(complaints))

    def __call__(self, image: Image.Image) -> FloatArray:
        """Return ``[3, H, W]`` float32 in RGB order: :meth:`normalize` of :meth:`pixels`.

        Raises:
            ImageDataError: as :meth:`pixels`.
        """
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image) -> PixelArray:
        """The resized and cropped image, ``[H, W, 3]`` RGB, 0 to 255.

        Raises:
            ImageDataError: for images of more than 8 bits a channel, and for slivers whose resized
                form would not fit in memory.
        """
        if image.mode.startswith(_WIDE_MODES):
            raise ImageDataError(f"has pixel mode {image.mode}; only 8-bit images are supported")
        # All of this before a pixel is decoded: the file's size says nothing about theirs.
        if image.width * image.height > _MAX_PIXELS:
            size = f"{image.width} x {image.height}"
            raise ImageDataError(f"is too large: {size}, more than {_MAX_PIXELS} pixels")
        height, width = self.image_size
        scale = max(height / image.height, width / image.width) / self.crop_fraction
        resized_w = max(width, math.floor(image.width * scale + 1e-6))
        resized_h = max(height, math.floor(image.height * scale + 1e-6))
        if resized_w * resized_h > max(_MAX_RESIZED_PIXELS, image.width * image.height):
            raise ImageDataError(f"is too narrow: {image.width} x {image.height} pixels")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        if (resized_w, resized_h) != rgb.size:
            rgb = rgb.resize((resized_w, resized_h), _INTERPOLATIONS[self.interpolation])
        left, top = round((resized_w - width) / 2), round((resized_h - height) / 2)
        return np.asarray(rgb.crop((left, top, left + width, top + height)), dtype=np.uint8)

    def normalize(self, pixels: PixelArray) -> FloatArray:
        """``[..., H, W, 3]`` of 0 to 255 as the network's ``[..., 3, H, W]`` float32."""
        mean, std = np.array([self.mean, self.std], dtype=np.float32)
        normalized = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(np.moveaxis(normalized, -1, -3), dtype=np.float32)

    def denormalize(self, images: FloatArray) -> npt.NDArray[np.float64]:
        """The inverse of :meth:`normalize`: ``[..., H, W, 3]`` on 0 to 255, not rounded."""
        values = np.moveaxis(images.astype(np.float64), -3, -1)
        return np.asarray(255 * (values * np.array(self.std) + np.array(self.mean)))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_json` reads it back unchanged."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """Build from :meth:`to_json`'s dictionary; missing fields take the defaults.

        Raises:
            ValueError: for unknown fields, and for values of the wrong type or out of range.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"preprocess must be an object, not {data!r}")
        unknown = sorted(set(map(str, data)) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"unknown preprocess field {', '.join(unknown)}; known: {known}")
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Image files under one folder, in an order that does not depend on the file system.

    Where the images lie in sub-folders, the first folder level is the label, by name.
    """

    root: Path
    files: tuple[Path, ...]

    @classmethod
    def open(cls, root: Path) -> ImageFolder:
        """List the images under ``root``.

        Raises:
            ImageDataError: if ``root`` is missing, not a folder or holds no image.
        """
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise ImageDataError(f"image folder {root} {what}")
        files = sorted(
            path
            for path in root.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
        )
        if not files:
            kinds = " ".join(sorted(IMAGE_SUFFIXES))
            raise ImageDataError(f"image folder {root} holds no image (looked for {kinds})")
        return cls(root, tuple(files))

    def label_names(self) -> tuple[str, ...] | None:
        """The label of each file, or None where files lie directly in the folder."""
        parts = [path.relative_to(self.root).parts for path in self.files]
        return tuple(p[0] for p in parts) if all(len(p) > 1 for p in parts) else None

    def names_sha256(self) -> str:
        """Hash of the relative names of all files, in order; none of them is read."""
        names = (os.fsencode(path.relative_to(self.root).as_posix()) for path in self.files)
        return hashlib.sha256(b"\0".join(names)).hexdigest()

    def sha256(self) -> str:
        """Hash of the relative names and contents of all files, in order.

        Raises:
            ImageDataError: naming the file that cannot be read.
        """
        digest = hashlib.sha256()
        for path in self.files:
            # fsencode, because a file name on Linux need not be valid UTF-8.
            digest.update(os.fsencode(path.relative_to(self.root).as_posix()) + b"\0")
            try:
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            except OSError as error:
                raise ImageDataError(f"image {path} cannot be read ({error.strerror})") from error
        return digest.hexdigest()

    def take(self, count: int | None) -> ImageFolder:
        """At most ``count`` files, spread evenly over the list.

        Every class stays in where ``count`` allows it: if an even spread would lose a small class,
        the first file of each class is taken before the rest is spread. The order is kept; the
        choice is deterministic.

        Raises:
            ValueError: if ``count`` is not positive.
        """
        if count is None or count >= len(self.files):
            return self
        if count < 1:
            raise ValueError(f"the number of images must be positive, not {count}")
        labels = self.label_names() or ("",) * len(self.files)
        picks = _spread(range(len(self.files)), count)
        heads = sorted({label: i for i, label in reversed(list(enumerate(labels)))}.values())
        if len({labels[index] for index in picks}) < min(count, len(heads)):
            picks = _spread(heads, min(count, len(heads)))
            others = sorted(set(range(len(self.files))) - set(picks))
            picks = sorted(picks + _spread(others, count - len(picks)))
        return ImageFolder(self.root, tuple(self.files[index] for index in picks))

    def without(self, files: Sequence[Path]) -> ImageFolder:
        """The same folder with ``files`` left out."""
        left_out = set(files)
        return ImageFolder(self.root, tuple(f for f in self.files if f not in left_out))


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """``count`` of ``indices``, evenly spaced."""
    return [indices[step * len(indices) // count] for step in range(count)]


def load_image(path: Path, preprocess: Preprocess) -> FloatArray:
    """Decode one file to ``[3, H, W]`` float32.

    Raises:
        ImageDataError: naming the file, if it cannot be decoded whole.
    """
    return preprocess.normalize(load_pixels(path, preprocess))


def load_pixels(path: Path, preprocess: Preprocess) -> PixelArray:
    """Decode one file to ``[H, W, 3]`` uint8, resized and cropped but not normalized.

    Raises:
        ImageDataError: as :func:`load_image`.
    """
    try:
        with _opened(path) as image:
            return preprocess.pixels(image)
    except ImageDataError as error:
        raise ImageDataError(f"image {path} {error}") from error
    except Image.DecompressionBombError as error:
        raise ImageDataError(f"image {path} is too large to be a picture ({error})") from error
    except Exception as error:
        # Pillow's plug-ins raise whatever their parsing meets in a damaged file: OSError,
        # SyntaxError, struct.error, IndexError, KeyError, OverflowError and more.
        reason = str(error) or type(error).__name__
        raise ImageDataError(f"image {path} cannot be decoded ({reason})") from error


def _opened(path: Path) -> Image.Image:
    # Images are decoded in several threads, and warning filters belong to the process.
    with _OPENING, warnings.catch_warnings():
        # Of a size that is judged here.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def unreadable(folder: ImageFolder, preprocess: Preprocess) -> tuple[Path, ...]:
    """The files of ``folder`` that :func:`load_image` refuses."""
    bad = []
    for path in folder.files:
        try:
            load_image(path, preprocess)
        except ImageDataError:
            bad.append(path)
    return tuple(bad)
