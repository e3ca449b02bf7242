"""INT8 quality beside ONNX Runtime's own quantizer: same model, same calibration and test images.

    python benchmarks/int8_quality.py

The bundled A0, as it is and after every channel of every boundary was rescaled by 2^U(-3, 3), which
changes no float result. Each quantizer gets the 128 bundled calibration images; its Q/DQ graph runs
in ONNX Runtime on the 360 test images and is compared with the float graph's logits.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)

from calibration.chain import rescale
from calibration.images import Preprocess
from exporter.chain_quantizer import observe_chain, quantize_observed
from exporter.image_set import FolderImages, ImageSet
from exporter.onnx_export import export_onnx
from exporter.onnx_runner import OnnxRunner
from exporter.parity import compare
from exporter.plain_chain import read_chain, with_chain
from models.checkpoint import load_checkpoint
from models.fusion import reparameterize
from models.registry import bundled_weights

RECIPES = ("minmax", "percentile", "mse", "entropy", "equalize", "full")
PEERS = ("MinMax", "Percentile", "Entropy")
Quantizer = Callable[[onnx.ModelProto], onnx.ModelProto]


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images, one batch at a time."""

    def __init__(self, images: ImageSet) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = (
            {"images": b} for (b,) in images.batches()
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def ours(recipe: str, images: ImageSet) -> Quantizer:
    def run(model: onnx.ModelProto) -> onnx.ModelProto:
        plain = read_chain(model)
        assert plain is not None
        observed = observe_chain(model, plain, images)
        return quantize_observed(model, plain, observed, recipe).graph

    return run


def peer(method: str, images: ImageSet) -> Quantizer:
    def run(model: onnx.ModelProto) -> onnx.ModelProto:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "a.onnx"), Path(folder, "b.onnx")
            onnx.save(model, source)
            quantize_static(
                source,
                target,
                Reader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=getattr(CalibrationMethod, method),
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
            )
            return onnx.load(target)

    return run


def logits(model: onnx.ModelProto, images: ImageSet) -> np.ndarray:
    runner = OnnxRunner(model)
    return np.concatenate([next(iter(runner.run(b).values())) for b in images.batches()])


def main() -> None:
    warnings.simplefilter("ignore")
    bundled = bundled_weights("A0")
    assert bundled is not None
    preprocess = Preprocess.from_json(bundled.preprocess)
    calibration, test = (
        FolderImages.open(root, preprocess, "", count=512, skip_bad=False)
        for root in (bundled.calibration_images, bundled.test_images)
    )
    labels = test.labels(bundled.class_names, len(bundled.class_names))
    network = reparameterize(load_checkpoint(bundled.checkpoint).module)
    base = export_onnx(network, preprocess.image_size, {})  # type: ignore[arg-type]
    plain = read_chain(base)
    assert plain is not None
    rng = np.random.default_rng(0)
    factors = [2.0 ** rng.uniform(-3, 3, len(stage.weight)) for stage in plain.chain.stages]
    models = {"as trained": base, "rescaled": with_chain(base, rescale(plain.chain, factors))}
    reference = logits(base, test)
    print(f"float: top-1 {100 * np.mean(reference.argmax(1) == labels):.2f} %, {test.count} images")
    quantizers = {f"ONNX Runtime {name}": peer(name, calibration) for name in PEERS}
    quantizers |= {f"--recipe {name}": ours(name, calibration) for name in RECIPES}
    print(f"{'quantizer':26}" + "".join(f"{name + ': dB, top-1 %, s':>32}" for name in models))
    for name, quantizer in quantizers.items():
        cells = []
        for model in models.values():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # the peers report their histograms
                graph = quantizer(model)
            seconds = time.perf_counter() - start
            found = logits(graph, test)
            top1 = 100 * float(np.mean(found.argmax(1) == labels))
            cells.append(f"{compare(reference, found).sqnr_db:12.1f} {top1:8.2f} {seconds:9.1f}")
        print(f"{name:26}" + "".join(f"{cell:>32}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
