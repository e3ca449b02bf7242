"""What a bundle says about itself: engine contents, table, reference values, ledger, manifest."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from calibration.table import CalibrationTable
from exporter import bundle as files
from exporter.bundle import BundleWriter
from exporter.contract import ContractVerdict
from exporter.fused_blocks import Fused
from exporter.inputs import Inputs
from exporter.judge import Judge
from exporter.network import Interface, multiply_accumulates
from exporter.plan_engine import EngineOutcome
from exporter.provenance import created, versions
from exporter.spec import ExportSpec

REFERENCE_IMAGES = 8
TENSORRT_CACHE_VERSION = "10.3.0"
"""The TensorRT of JetPack 6, whose DLA still reads calibration caches."""


def write_calibration(writer: BundleWriter, table: CalibrationTable) -> None:
    """The INT8 scales, as this project's JSON and as TensorRT's text."""
    writer.write_text(files.CALIBRATION, table.dumps())
    writer.write_text(files.CALIBRATION_CACHE, table.to_cache_text(TENSORRT_CACHE_VERSION))


def write_evidence(
    writer: BundleWriter, inputs: Inputs, judge: Judge, engine: EngineOutcome
) -> None:
    writer.write_text(files.ENGINE_SUMMARY, files.dumps(engine.to_json()))
    if engine.built is not None:
        writer.path(files.ENGINE).write_bytes(engine.built.plan)
        writer.write_text(files.BUILD_LOG, engine.built.build_log)
    (sample, *_) = judge.samples(REFERENCE_IMAGES)
    ports = inputs.interface
    arrays = {port.name: array for port, array in zip(ports.inputs, sample, strict=True)}
    for port in ports.outputs:
        arrays[port.name] = judge.original[port.name][: len(sample[0])]
    np.savez(writer.path(files.REFERENCE), **arrays)  # type: ignore[arg-type]
    writer.write_text(files.PARITY, files.dumps(judge.ledger.to_json()))


def manifest(
    spec: ExportSpec,
    inputs: Inputs,
    engine: EngineOutcome,
    *,
    fused: Fused,
    verdict: ContractVerdict,
    recipe: str | None,
    half_scales: bool,
    notes: tuple[str, ...],
) -> dict[str, Any]:
    source, interface = inputs.source, inputs.interface
    calibration = None
    if inputs.calibration is not None:
        calibration = {"recipe": recipe, **inputs.calibration.to_json()}
        calibration["data"] = inputs.data.to_json() if inputs.data else None
    worst = max(fused.blocks, key=lambda block: block.relative, default=None)
    return {
        "created": created(),
        "model": _model(spec, inputs.interface, fused.module),
        "inputs": [port.to_json() for port in interface.inputs],
        "outputs": [port.to_json() for port in interface.outputs],
        "class_names": list(source.class_names) if source.class_names else None,
        "weights": source.origin,
        "calibration": calibration,
        "evaluation": inputs.evaluation.to_json(),
        "preprocess": inputs.preprocess.to_json() if inputs.preprocess else None,
        "contract": verdict.to_json(),
        "reparameterization": {
            "blocks": [asdict(block) for block in fused.blocks],
            "worst_block": worst.name if worst else None,
            "worst_relative": worst.relative if worst else None,
        },
        "targets": list(engine.targets),
        "half_scales": half_scales,
        "versions": versions(),
        "spec": spec.to_json(),
        "notes": list(notes),
    }


def _model(spec: ExportSpec, interface: Interface, module: nn.Module) -> dict[str, Any]:
    variant, classes = spec.variant, interface.num_classes
    if variant is not None and classes is not None:
        (_, _, height, width) = interface.example[0]
        parameters, macs = (
            variant.deploy_parameters(classes),
            variant.macs((height, width), classes),
        )
    else:
        parameters = sum(parameter.numel() for parameter in module.parameters())
        macs = multiply_accumulates(module, interface)
    return {
        "name": spec.title,
        "variant": variant.name if variant else None,
        "num_classes": classes,
        "parameters": parameters,
        "macs": macs,
    }
