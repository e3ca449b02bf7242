"""Implicit INT8, the recipe that TensorRT 11 removed and the DLA before it needs.

The builder normally calibrates by itself, on images that a calibrator object feeds it. Ours was
done before, so the object only hands over `calibration.cache`; asked for images it answers that
there are none, and remembers it: an exception must not cross the native code that asks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calibration.cache_text import CalibrationTableError, cache_text, parse_cache_text
from exporter.engine.capabilities import Api, Capability, needs
from exporter.engine.refusal import BadInputError
from exporter.engine.tensorrt_names import IBuilderConfig
from exporter.files.text_file import read_text


def cache_for(path: Path, version: str) -> bytes:
    """The cache in ``path`` under the header of this TensorRT version.

    A builder ignores a cache of another version and asks for images; the scales themselves do not
    depend on it.

    Raises:
        BadInputError: if the file cannot be read or is no calibration cache.
    """
    try:
        scales = parse_cache_text(read_text(path))
        numbers = ".".join(version.split(".")[:3])
        return cache_text(scales, numbers).encode()
    except (OSError, UnicodeDecodeError, CalibrationTableError) as error:
        raise BadInputError(f"calibration cache {path} cannot be used: {error}") from error


@needs(Capability.CALIBRATOR)
def set_calibrator(api: Api, config: IBuilderConfig, cache: bytes) -> Any:
    """Give ``config`` a calibrator that hands over ``cache``; the caller keeps it alive.

    Its attribute ``asked_for_images`` tells afterwards whether the builder wanted more.
    """

    base: Any = api.trt.IInt8EntropyCalibrator2

    class CacheOnly(base):  # type: ignore[misc]
        """Has a cache and no images."""

        def __init__(self) -> None:
            base.__init__(self)
            self.asked_for_images = False

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, _names: list[str]) -> None:
            self.asked_for_images = True

        def read_calibration_cache(self) -> bytes:
            return cache

        def write_calibration_cache(self, _cache: bytes) -> None:
            """Nothing to keep: what comes back is what was handed over."""

    calibrator = CacheOnly()
    config.int8_calibrator = calibrator
    return calibrator
