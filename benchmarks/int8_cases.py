"""The trained networks that quantizers are compared on, and their images.

Each network in two versions that compute the same: as trained, and with every channel of every
boundary rescaled by ``2^U(-3, 3)``, as a checkpoint from elsewhere may happen to be scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import textures

from calibration.chain import rescale
from calibration.images import Preprocess
from exporter.onnx_export import export_onnx
from exporter.quantization.plain_chain import read_chain, with_chain
from exporter.running.image_set import FolderImages
from models.checkpoint import load_checkpoint
from models.fusion import reparameterize
from models.registry import bundled_weights
from models.repvgg import RepVGG

FloatArray = npt.NDArray[np.float32]
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A trained network in its versions by name, calibration and test images, test labels."""

    name: str
    versions: dict[str, onnx.ModelProto]
    calibration: FloatArray
    test: FloatArray
    labels: npt.NDArray[np.int64]


def bundled_a0(calibration_images: int, test_images: int) -> Case:
    """The bundled A0 on handwritten digits."""
    bundled = bundled_weights("A0")
    assert bundled is not None
    preprocess = Preprocess.from_json(bundled.preprocess)
    calibration, test = (
        FolderImages.open(root, preprocess, "", count=count, skip_bad=False)
        for root, count in (
            (bundled.calibration_images, calibration_images),
            (bundled.test_images, test_images),
        )
    )
    labels = test.labels(bundled.class_names, len(bundled.class_names))
    assert labels is not None
    network = load_checkpoint(bundled.checkpoint).module
    assert isinstance(network, RepVGG)
    return Case(
        name="A0 on digits",
        versions=_versions(network, preprocess.image_size),
        calibration=np.concatenate([images for (images,) in calibration.batches()]),
        test=np.concatenate([images for (images,) in test.batches()]),
        labels=labels,
    )


def textured_shapes(calibration_images: int, test_images: int) -> Case:
    """The narrow network on textured shapes."""
    test, labels = textures.images("test", test_images)
    return Case(
        name=f"{textures.VARIANT.name} on textures",
        versions=_versions(textures.load(), (textures.SIZE, textures.SIZE)),
        calibration=textures.images("calibration", calibration_images)[0],
        test=test,
        labels=labels,
    )


CASES: dict[str, Callable[[int, int], Case]] = {"a0": bundled_a0, "textures": textured_shapes}


def noise_like(images: FloatArray) -> FloatArray:
    """Normal noise of the images' mean and deviation by channel: calibration data from nowhere."""
    mean = images.mean((0, 2, 3), keepdims=True)
    deviation = images.std((0, 2, 3), keepdims=True)
    rng = np.random.default_rng(_SEED)
    noise: FloatArray = rng.standard_normal(images.shape, dtype=np.float32) * deviation + mean
    return noise


def _versions(network: RepVGG, image_size: tuple[int, int]) -> dict[str, onnx.ModelProto]:
    deploy = reparameterize(network)
    assert isinstance(deploy, RepVGG)
    trained = export_onnx(deploy, image_size, {})
    plain = read_chain(trained)
    assert plain is not None
    rng = np.random.default_rng(_SEED)
    factors = [2.0 ** rng.uniform(-3, 3, len(stage.weight)) for stage in plain.chain.stages]
    return {
        "as trained": trained,
        "rescaled": with_chain(trained, rescale(plain.chain, factors)),
    }
