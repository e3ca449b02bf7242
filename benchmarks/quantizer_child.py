"""The child that runs our quantizer or ONNX Runtime's (see quantizer_job.py).

Methods: ``ours RECIPE``, ``onnxruntime MinMax|Entropy|Percentile``, and ``float``, one float pass.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime_ptq
from quantizer_job import Job, answer

from calibration.recipe import RecipeOptions
from exporter.quantization.chain_observer import observe_chain
from exporter.quantization.chain_quantizer import quantize_observed
from exporter.quantization.plain_chain import read_chain
from exporter.running.image_set import Pass, Result, unheard
from exporter.running.onnx_runner import Batch, OnnxRunner


class JobImages:
    """A job's images as an exporter.running.image_set.ImageSet that holds one batch at a time."""

    description = "benchmark"
    first = 0

    def __init__(self, job: Job) -> None:
        self._job = job
        self.count = job.shape[0]

    def batches(self) -> Iterator[Batch]:
        return ((batch,) for batch in self._job.batches())

    def in_parts(
        self, work: Pass[Result], advance: Callable[[float], None] = unheard
    ) -> list[Result]:
        return [work(self, advance)]

    def labels(self, _class_names: Sequence[str] | None, _num_classes: int) -> None:
        return None

    def to_json(self) -> dict[str, Any]:
        with Path(self._job.images).open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return {"images": self.count, "sha256": digest.hexdigest()}


def run_ours(job: Job, recipe: str) -> None:
    """One rung of the ladder."""
    model = onnx.load(job.source)
    plain = read_chain(model)
    assert plain is not None
    observed = observe_chain(model, plain, JobImages(job))
    options = RecipeOptions(per_tensor_weights=job.per_tensor_weights)
    onnx.save(quantize_observed(model, plain, observed, recipe, options=options).graph, job.target)


def run_onnxruntime(job: Job, method: str) -> None:
    onnxruntime_ptq.quantize(Path(job.source), Path(job.target), job.batches(), method)


def run_float(job: Job, _: str) -> None:
    """All images through the float graph, once."""
    runner = OnnxRunner(Path(job.source))
    for batch in job.batches():
        runner(batch)


METHODS: dict[str, Callable[[Job, str], None]] = {
    "ours": run_ours,
    "onnxruntime": run_onnxruntime,
    "float": run_float,
}


def main() -> None:
    warnings.simplefilter("ignore")
    job = Job.from_json(sys.argv[1])
    kind, _, argument = job.method.partition(" ")
    answer(job, lambda: METHODS[kind](job, argument))


if __name__ == "__main__":
    main()
