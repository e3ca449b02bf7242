"""What a bundle says about itself: engine contents, table, reference values, ledger, manifest."""

from __future__ import annotations

from typing import Any

import numpy as np

from calibration.table import CalibrationTable
from exporter import bundle as files
from exporter.bundle import BundleWriter
from exporter.engine import BuiltEngine
from exporter.inputs import Inputs
from exporter.judge import Judge
from exporter.provenance import created, versions
from exporter.spec import ExportSpec
from models.fusion import BlockEquivalence

REFERENCE_IMAGES = 8
TENSORRT_CACHE_VERSION = "10.3.0"
"""The TensorRT of JetPack 6, whose DLA still reads calibration caches."""


def write_evidence(
    writer: BundleWriter,
    inputs: Inputs,
    judge: Judge,
    engine: BuiltEngine,
    table: CalibrationTable | None,
) -> None:
    writer.path(files.ENGINE).write_bytes(engine.plan)
    writer.write_text(files.ENGINE_SUMMARY, files.dumps(engine.summary.to_json()))
    writer.write_text(files.BUILD_LOG, engine.build_log)
    if table is not None:
        writer.write_text(files.CALIBRATION, table.dumps())
        writer.write_text(files.CALIBRATION_CACHE, table.to_cache_text(TENSORRT_CACHE_VERSION))
    images = next(inputs.evaluation.batches())[:REFERENCE_IMAGES]
    np.savez(writer.path(files.REFERENCE), images=images, logits=judge.original[: len(images)])
    writer.write_text(files.PARITY, files.dumps(judge.ledger.to_json()))


def manifest(
    spec: ExportSpec,
    inputs: Inputs,
    engine: BuiltEngine,
    blocks: tuple[BlockEquivalence, ...],
    notes: tuple[str, ...],
) -> dict[str, Any]:
    source = inputs.source
    worst = max(blocks, key=lambda block: block.relative, default=None)
    return {
        "created": created(),
        "model": {
            "variant": spec.variant.name,
            "num_classes": source.module.num_classes,
            "parameters": spec.variant.deploy_parameters(source.module.num_classes),
            "macs": spec.variant.macs(inputs.preprocess.image_size, source.module.num_classes),
        },
        "class_names": list(source.class_names) if source.class_names else None,
        "weights": source.origin,
        "calibration": inputs.calibration.to_json() if inputs.calibration else None,
        "evaluation": inputs.evaluation.to_json(),
        "preprocess": inputs.preprocess.to_json(),
        "reparameterization": {
            "blocks": len(blocks),
            "worst_block": worst.name if worst else None,
            "worst_relative": worst.relative if worst else None,
        },
        "targets": list(engine.summary.targets),
        "versions": versions(),
        "spec": spec.to_json(),
        "notes": list(notes),
    }
