"""What a bundle says about itself: engine contents, table, reference values, ledger, manifest."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from calibration.table import CalibrationTable
from exporter import bundle as files
from exporter import report
from exporter.bundle_writer import BundleWriter
from exporter.contract import ContractVerdict
from exporter.fused_blocks import Fused
from exporter.inputs import Inputs
from exporter.judge import Judge
from exporter.layers import measure_layers
from exporter.network import Interface, multiply_accumulates
from exporter.onnx_runner import FloatArray
from exporter.plan_engine import EngineOutcome
from exporter.prologue import Prologue, normalized
from exporter.provenance import created, recorded_seconds, versions
from exporter.report import ReportContent
from exporter.spec import ExportSpec, Precision

REFERENCE_IMAGES = 8
TENSORRT_CACHE_VERSION = "10.3.0"
"""The TensorRT of JetPack 6, whose DLA still reads calibration caches."""


def graph_metadata(spec: ExportSpec, inputs: Inputs) -> dict[str, str]:
    """What a graph must carry to be used and traced without its bundle; texts by key."""
    origin, preprocess = inputs.source.origin, inputs.preprocess
    classes = inputs.source.class_names
    found = {
        "network": spec.title,
        "variant": spec.variant.name if spec.variant else None,
        "num_classes": inputs.interface.num_classes,
        "class_names": json.dumps(list(classes)) if classes else None,
        "weights_sha256": origin.get("sha256"),
        "preprocess": json.dumps(preprocess.to_json()) if preprocess else None,
    }
    return {key: str(value) for key, value in found.items() if value is not None}


def write_calibration(
    writer: BundleWriter,
    precision: Precision,
    table: CalibrationTable | None,
    pixel_inputs: Collection[str] = (),
) -> Path | None:
    """Write the scales as this project's JSON and, for INT8, as TensorRT's text, whose path it is.

    Builders without Q/DQ read model.onnx: behind the prologue of the inputs ``pixel_inputs`` its
    tensors have other names.
    """
    if table is None:
        return None
    writer.write_text(files.CALIBRATION, table.dumps())
    if precision is not Precision.INT8:
        return None
    own = table.renamed({name: normalized(name) for name in pixel_inputs})
    writer.write_text(files.CALIBRATION_CACHE, own.to_cache_text(TENSORRT_CACHE_VERSION))
    return writer.path(files.CALIBRATION_CACHE)


def gather(
    judge: Judge,
    exported: onnx.ModelProto,
    model: onnx.ModelProto,
    graph: onnx.ModelProto,
    precision: str,
) -> None:
    """Put into the ledger what is measured for the report alone: figures of every layer.

    The graphs are those of :func:`exporter.layers.measure_layers`.
    """
    (batch, *_) = judge.samples(REFERENCE_IMAGES)
    compared = graph if graph is not model else None
    judge.record_layers(measure_layers(exported, model, compared, precision, batch))


def write_evidence(
    writer: BundleWriter,
    inputs: Inputs,
    judge: Judge,
    engine: EngineOutcome,
    prologue: Prologue | None,
) -> None:
    writer.write_text(files.ENGINE_SUMMARY, files.dumps(engine.to_json()))
    if engine.built is not None:
        writer.path(files.ENGINE).write_bytes(engine.built.plan)
        # The folder that the bundle is made in has another name each time, and is gone afterwards.
        own_paths = engine.built.build_log.replace(f"{writer.path('.')}/", "")
        writer.write_text(files.BUILD_LOG, own_paths)
    (sample, *_) = judge.samples(REFERENCE_IMAGES)
    ports = inputs.interface
    given = sample if prologue is None else prologue.pixels(sample)
    arrays = {port.name: array for port, array in zip(ports.inputs, given, strict=True)}
    for port in ports.outputs:
        arrays[port.name] = judge.original[port.name][: len(sample[0])]
    np.savez(writer.path(files.REFERENCE), **arrays)  # type: ignore[arg-type]
    writer.write_text(files.PARITY, files.dumps(judge.ledger.to_json()))


def write_report(
    writer: BundleWriter,
    document: Mapping[str, Any],
    inputs: Inputs,
    judge: Judge,
    engine: EngineOutcome,
    *,
    seconds: Mapping[str, float],
) -> None:
    """Add junit.xml and report.html to a bundle that has all its other files but the manifest."""
    spec, parity = document["spec"], judge.ledger.to_json()
    suite = f"repvgg.{spec['variant'] or spec['name']}.{spec['precision']}"
    writer.write_text(files.JUNIT, report.junit_xml(parity, suite))
    content = ReportContent(
        manifest=document,
        parity=parity,
        engine=engine.to_json(),
        seconds={name: recorded_seconds(taken) for name, taken in seconds.items()},
        files=writer.sizes(),
        pictures=pictures(inputs, judge),
    )
    writer.write_text(files.REPORT, report.html(content))


def pictures(inputs: Inputs, judge: Judge) -> dict[int, str]:
    """Thumbnails of the worst images, from the first input that is one."""
    rows = judge.ledger.worst_images.rows if judge.ledger.worst_images else ()
    images: dict[int, FloatArray] = {}
    for row in rows:
        arrays = [array[0] for array in inputs.evaluation.image(row.index)]
        shown = [array for array in arrays if report.is_picture(array)]
        if shown:
            images[row.index] = shown[0]
    return report.thumbnails(images, inputs.preprocess)


def manifest(
    spec: ExportSpec,
    inputs: Inputs,
    engine: EngineOutcome,
    *,
    fused: Fused,
    verdict: ContractVerdict,
    prologue: Prologue | None,
    recipe: str | None,
    half_scales: bool,
    notes: tuple[str, ...],
) -> dict[str, Any]:
    interface = inputs.interface
    worst = max(fused.blocks, key=lambda block: block.relative, default=None)
    return {
        **what_went_in(spec, inputs, recipe),
        "model": _model(spec, inputs.interface, fused.module),
        "inputs": [
            prologue.port(port.name, port.shape) if prologue else port.to_json()
            for port in interface.inputs
        ],
        "outputs": [port.to_json() for port in interface.outputs],
        "contract": {
            **verdict.to_json(),
            "prologue": list(prologue.operators) if prologue else [],
        },
        "reparameterization": {
            "blocks": [asdict(block) for block in fused.blocks],
            "worst_block": worst.name if worst else None,
            "worst_relative": worst.relative if worst else None,
        },
        "targets": list(engine.targets),
        "half_scales": half_scales,
        "notes": list(notes),
    }


def what_went_in(spec: ExportSpec, inputs: Inputs, recipe: str | None = None) -> dict[str, Any]:
    """The part of the manifest that is known before anything has been made."""
    source = inputs.source
    calibration = None
    if inputs.calibration is not None:
        calibration = {"recipe": recipe, **inputs.calibration.to_json()}
        calibration["data"] = inputs.data.to_json() if inputs.data else None
    return {
        "created": created(),
        "class_names": list(source.class_names) if source.class_names else None,
        "weights": source.origin,
        "calibration": calibration,
        "evaluation": inputs.evaluation.to_json(),
        "preprocess": inputs.preprocess.to_json() if inputs.preprocess else None,
        "versions": versions(),
        "spec": spec.to_json(),
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
