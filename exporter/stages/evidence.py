"""What the network, its images and its graphs say in a bundle: table, reference, manifest."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from calibration.table import CalibrationTable
from exporter import bundle as files
from exporter import report
from exporter.contract import ContractVerdict
from exporter.graph.prologue import Prologue, normalized
from exporter.localization.layers import measure_layers
from exporter.network import Interface, multiply_accumulates
from exporter.running.onnx_runner import FloatArray
from exporter.sources.inputs import Inputs
from exporter.spec import ExportSpec, Precision
from exporter.stages.judge import Judge
from models import BlockEquivalence

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
    folder: Path,
    precision: Precision,
    table: CalibrationTable | None,
    pixel_inputs: Collection[str] = (),
) -> None:
    """Write the scales as this project's JSON and, for INT8, as TensorRT's text.

    Builders without Q/DQ read model.onnx: behind the prologue of the inputs ``pixel_inputs`` its
    tensors have other names.
    """
    if table is None:
        return
    (folder / files.CALIBRATION).write_text(table.dumps(), encoding="utf-8")
    if precision is Precision.INT8:
        own = table.renamed({name: normalized(name) for name in pixel_inputs})
        text = own.to_cache_text(TENSORRT_CACHE_VERSION)
        (folder / files.CALIBRATION_CACHE).write_text(text, encoding="utf-8")


def gather(
    judge: Judge,
    exported: onnx.ModelProto,
    model: onnx.ModelProto,
    graph: onnx.ModelProto,
    precision: str,
) -> None:
    """Put into the ledger what is measured for the report alone: figures of every layer.

    The graphs are those of :func:`exporter.localization.layers.measure_layers`.
    """
    (batch, *_) = judge.images.samples(files.REFERENCE_IMAGES)
    compared = graph if graph is not model else None
    judge.record_layers(measure_layers(exported, model, compared, precision, batch))


def write_reference(folder: Path, inputs: Inputs, judge: Judge, prologue: Prologue | None) -> None:
    """Write a few real inputs, as the graph takes them, and the original's outputs for them."""
    (sample, *_) = judge.images.samples(files.REFERENCE_IMAGES)
    ports = inputs.interface
    given = sample if prologue is None else prologue.pixels(sample)
    arrays = {port.name: array for port, array in zip(ports.inputs, given, strict=True)}
    for port in ports.outputs:
        arrays[port.name] = judge.original[port.name][: len(sample[0])]
    np.savez(folder / files.REFERENCE, **arrays)  # type: ignore[arg-type]


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


def document(
    inputs: Inputs,
    *,
    figures: Mapping[str, Any],
    blocks: Sequence[BlockEquivalence],
    verdict: ContractVerdict,
    prologue: Prologue | None,
    recipe: str | None,
) -> dict[str, Any]:
    """The manifest's part about the network and its graphs; ``figures`` by `model_figures`."""
    interface = inputs.interface
    worst = max(blocks, key=lambda block: block.relative, default=None)
    return {
        **what_went_in(inputs, recipe),
        "model": dict(figures),
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
            "blocks": [asdict(block) for block in blocks],
            "worst_block": worst.name if worst else None,
            "worst_relative": worst.relative if worst else None,
        },
    }


def what_went_in(inputs: Inputs, recipe: str | None = None) -> dict[str, Any]:
    """The part that is known before anything has been made."""
    source = inputs.source
    calibration = None
    if inputs.calibration is not None:
        calibration = {"recipe": recipe, **inputs.calibration.to_json()}
        calibration["data"] = inputs.data.to_json() if inputs.data else None
    return {
        "class_names": list(source.class_names) if source.class_names else None,
        "weights": source.origin,
        "calibration": calibration,
        "evaluation": inputs.evaluation.to_json(),
        "preprocess": inputs.preprocess.to_json() if inputs.preprocess else None,
    }


def model_figures(spec: ExportSpec, interface: Interface, module: nn.Module) -> dict[str, Any]:
    """What the manifest says of the network ``module`` in deploy form."""
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
