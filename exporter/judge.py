"""Runs every stage on the same images and holds its logits against the original network's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from exporter import parity
from exporter.errors import GateFailedError
from exporter.image_set import ImageSet, LabelArray, logits_of
from exporter.onnx_runner import FloatArray
from exporter.parity import Gate, Ledger
from exporter.source import Source


class Judge:
    """Holds the original's logits and the ledger; refuses a stage that fails its gate."""

    def __init__(self, source: Source, images: ImageSet) -> None:
        self.images = images
        self.labels: LabelArray | None = self.images.labels(
            source.class_names, source.module.num_classes
        )
        self.original = logits_of(torch_runner(source.module), self.images)
        self.ledger = Ledger(
            stages=(),
            images=self.images.description,
            image_count=self.images.count,
            original_top1=parity.accuracy(self.original, self.labels),
        )

    def check(
        self, stage: str, run: Callable[[FloatArray], FloatArray], gate: Gate | None = None
    ) -> None:
        logits = logits_of(run, self.images)
        result = parity.judge(stage, self.original, logits, gate=gate, labels=self.labels)
        self.ledger = self.ledger.with_stage(result)
        if result.status == "fail":
            raise GateFailedError(
                f"parity failed at stage {stage}: {result.reason}; nothing was published"
            )

    def skip(self, stage: str, reason: str) -> None:
        self.ledger = self.ledger.with_stage(parity.not_run(stage, reason))


def torch_runner(module: torch.nn.Module) -> Callable[[FloatArray], FloatArray]:
    def run_module(images: FloatArray) -> FloatArray:
        with torch.no_grad():
            logits: FloatArray = module(torch.from_numpy(images)).numpy()
        return logits

    return run_module
