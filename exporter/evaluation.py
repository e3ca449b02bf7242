"""Top-1 and top-5 of a bundle over a folder of labelled images, on the device or on the CPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.images import (
    ImageDataError,
    ImageFolder,
    Preprocess,
    load_image,
    load_pixels,
)
from exporter.bundle import MANIFEST, Bundle, file_sha256
from exporter.device import (
    BundleRunner,
    RunBackend,
    is_classifier,
    open_runner,
    output_names,
    require_intact,
)
from exporter.device.accuracy import TOP, Evaluation, Labels, Shard, ranks
from exporter.errors import GateFailedError, InputError
from exporter.pixel_input import Layout, recorded_layout
from exporter.running.onnx_runner import FloatArray

InputArray = npt.NDArray[Any]


def evaluate(
    bundle: Bundle,
    folder: Path,
    backend: RunBackend = RunBackend.AUTO,
    *,
    shard: Shard | None = None,
    progress: Callable[[float], None] = lambda _fraction: None,
    skip_bad_images: bool = False,
    threads: int = 0,
    runtime_cache: bool = True,
) -> Evaluation:
    """Classify the images of ``folder``, one sub-folder a class, with the bundle's preprocessing.

    ``threads`` is for ONNX Runtime, 0 means all cores; ``runtime_cache`` is for TensorRT-RTX, whose
    kernels are then kept for the next start.

    Raises:
        GateFailedError: a file of the bundle is damaged, or the network's outputs are not finite.
        InputError: the bundle is no image classifier, the folder's classes are not the bundle's, or
            an image cannot be read (with ``skip_bad_images`` such are counted and left out).
        EnvironmentLackError: ``backend`` cannot run here.
    """
    require_intact(bundle)
    shard = shard or Shard()
    preprocess = _preprocess(bundle)
    try:
        images = ImageFolder.open(folder)
    except ImageDataError as error:
        raise InputError(str(error)) from error
    names, labels = _labels(bundle, images)
    chosen = range(shard.index - 1, len(images.files), shard.count)
    counts = _Counts()
    reader = _Reader(preprocess, skip_bad_images, recorded_layout(bundle.manifest))
    with open_runner(bundle, backend, threads=threads, runtime_cache=runtime_cache) as runner:
        start = time.perf_counter()
        files = [(images.files[index], int(labels[index])) for index in chosen]
        for pixels, truth in reader.batches(files, runner.batch.opt):
            counts.add(_logits(bundle, runner, pixels, len(names)), truth)
            progress((counts.images + reader.skipped) / len(files))
        seconds = time.perf_counter() - start
    if not counts.confusion:
        raise InputError(
            f"image folder {folder}: shard {shard} holds no readable image "
            f"({reader.skipped} skipped)"
        )
    return Evaluation(
        bundle=str(bundle.path),
        bundle_sha256=file_sha256(bundle.path / MANIFEST),
        precision=bundle.manifest["spec"]["precision"],
        backend=str(runner.backend),
        library=runner.library,
        data=str(folder),
        class_names=names,
        confusion=dict(counts.confusion),
        top5_correct=counts.top5,
        skipped=reader.skipped,
        folder_images=len(images.files),
        folder_names_sha256=images.names_sha256(),
        shards=(shard,),
        seconds=seconds,
        note=runner.remarks,
    )


class _Counts:
    """What has been counted so far."""

    def __init__(self) -> None:
        self.confusion: Counter[tuple[int, int]] = Counter()
        self.top5 = 0

    @property
    def images(self) -> int:
        return self.confusion.total()

    def add(self, logits: FloatArray, labels: Labels) -> None:
        predicted = logits.argmax(axis=1)
        self.confusion.update(zip(labels.tolist(), predicted.tolist(), strict=True))
        self.top5 += int(np.count_nonzero(ranks(logits, labels) < TOP))


class _Reader:
    """Files -> batches, of pixels if there is a ``layout``; counts what it had to leave out."""

    def __init__(
        self, preprocess: Preprocess, skip_bad_images: bool, layout: Layout | None
    ) -> None:
        self._preprocess = preprocess
        self._skip = skip_bad_images
        self._layout = layout
        self.skipped = 0

    def batches(
        self, files: Sequence[tuple[Path, int]], size: int
    ) -> Iterator[tuple[InputArray, Labels]]:
        """At most ``size`` images a batch, and their labels."""
        load = load_image if self._layout is None else load_pixels
        pixels: list[InputArray] = []
        labels: list[int] = []
        for path, label in files:
            try:
                pixels.append(load(path, self._preprocess))
            except ImageDataError as error:
                if not self._skip:
                    advice = "--skip-bad-images leaves such files out"
                    raise InputError(f"{error}; {advice}") from error
                self.skipped += 1
                continue
            labels.append(label)
            if len(pixels) == size:
                yield self._stack(pixels), np.array(labels, dtype=np.int64)
                pixels, labels = [], []
        if pixels:
            yield self._stack(pixels), np.array(labels, dtype=np.int64)

    def _stack(self, images: Sequence[InputArray]) -> InputArray:
        batch = np.stack(images)
        return batch if self._layout is None else self._layout.arranged(batch)


def _preprocess(bundle: Bundle) -> Preprocess:
    if not is_classifier(bundle):
        raise InputError(f"bundle {bundle.path} is no classifier: there is no top-1 to count")
    recorded = bundle.manifest.get("preprocess")
    if recorded is None:
        raise InputError(
            f"bundle {bundle.path} records no preprocessing: it was made from arrays, and how "
            "images become such arrays only its maker knows"
        )
    try:
        return Preprocess.from_json(recorded)
    except ValueError as error:
        raise InputError(f"bundle {bundle.path}: {error}") from error


def _labels(bundle: Bundle, folder: ImageFolder) -> tuple[tuple[str, ...], Labels]:
    """The class names in the order of the logits, and each file's index among them."""
    found = folder.label_names()
    if found is None:
        raise InputError(
            f"image folder {folder.root} has no labels: put every image into a folder that is "
            "named after its class"
        )
    recorded = bundle.manifest.get("class_names")
    names = tuple(recorded) if recorded else tuple(sorted(set(found)))
    classes = bundle.manifest["model"].get("num_classes") or len(names)
    if len(names) != classes:
        raise InputError(
            f"bundle {bundle.path} has {classes} classes without names, so all of them must have a "
            f"folder; {folder.root} has {len(names)}"
        )
    strangers = sorted(set(found) - set(names))
    if strangers:
        raise InputError(
            f"image folder {folder.root}: {', '.join(strangers[:3])} is not among the bundle's "
            f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        )
    index = {name: position for position, name in enumerate(names)}
    return names, np.array([index[name] for name in found], dtype=np.int64)


def _logits(bundle: Bundle, runner: BundleRunner, pixels: InputArray, classes: int) -> FloatArray:
    outputs = runner.run((pixels,))
    logits = outputs[output_names(bundle)[0]]
    if logits.shape != (len(pixels), classes):
        raise GateFailedError(
            f"{runner.library} returns shape {list(logits.shape)}, expected "
            f"[{len(pixels)}, {classes}]"
        )
    bad = int(np.count_nonzero(~np.isfinite(logits)))
    if bad:
        raise GateFailedError(f"{bad} of {logits.size} outputs of {runner.library} are NaN or Inf")
    return logits
