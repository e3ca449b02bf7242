"""From the trained network to its plain float graph: what every precision begins with.

reparameterize -> export -> simplify -> contract, each judged against the original network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from exporter import contract
from exporter.clock import StageClock
from exporter.contract import ContractVerdict
from exporter.graph.annotation import Description, annotate
from exporter.localization.graphs import GraphPair
from exporter.localization.modules import ModulePair
from exporter.network import torch_runner
from exporter.onnx_export import export_network, export_onnx
from exporter.running.onnx_runner import OnnxRunner
from exporter.simplify import Simplifier, simplify
from exporter.sources.inputs import Inputs
from exporter.spec import ExportSpec
from exporter.stage_cache.values import read_value, write_value
from exporter.stages.evidence import graph_metadata, model_figures
from exporter.stages.fused_blocks import Fused, expected_blocks, fuse
from exporter.stages.judge import Judge, Judged, Verdicts
from models import BlockEquivalence
from models.repvgg import RepVGG
from models.variants import Squeeze

SAMPLE = 8
"""Images on which each fused block must equal its block, and the simplified graph its input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatGraph:
    """The plain graph, and what is known of the network that it was made from.

    ``blocks`` say how far each fused block is from its branches, ``figures`` what the manifest says
    of the model; ``seconds`` is the wall time of each stage.
    """

    model: onnx.ModelProto
    verdict: ContractVerdict
    blocks: tuple[BlockEquivalence, ...]
    notes: tuple[str, ...]
    figures: Mapping[str, Any]
    judged: Judged
    seconds: Mapping[str, float]


def make_float_graph(
    spec: ExportSpec,
    inputs: Inputs,
    fused: Fused,
    judge: Judge,
    *,
    clock: StageClock,
    simplifier: Simplifier,
) -> FloatGraph:
    """Export a fused network and simplify the graph by ``simplifier``; ``judge`` gets the rows.

    Raises:
        GateFailedError: a graph does not compute what the original does, or is not plain.
        InputError: the network cannot be exported.
    """
    model, verdict = _export(spec, inputs, fused.module, judge, clock=clock, simplifier=simplifier)
    return FloatGraph(
        model=model,
        verdict=verdict,
        blocks=fused.blocks,
        notes=fused.notes,
        figures=model_figures(spec, inputs.interface, fused.module),
        judged=judge.judged(),
        seconds=dict(clock.seconds),
    )


def fuse_network(inputs: Inputs, judge: Judge) -> Fused:
    """Fuse the network's blocks; ``judge`` gets the row.

    Raises:
        GateFailedError: the fused network does not compute what the original does.
        InputError: it cannot be fused.
    """
    source = inputs.source
    if source.form == "deploy":
        judge.skip("reparameterized", "the checkpoint is already in deploy form")
        return Fused(module=source.module)
    fused = fuse(source.module, judge.images.samples(SAMPLE)[0])
    judge.check("reparameterized", torch_runner(fused.module, inputs.interface))
    return fused


def _export(
    spec: ExportSpec,
    inputs: Inputs,
    fused: nn.Module,
    judge: Judge,
    *,
    clock: StageClock,
    simplifier: Simplifier,
) -> tuple[onnx.ModelProto, ContractVerdict]:
    metadata = graph_metadata(spec, inputs)
    plain = fused if isinstance(fused, RepVGG) and _is_plain(spec) else None
    with clock.stage("export"):
        if plain is not None:
            (_, _, height, width) = inputs.interface.example[0]
            free_size = spec.dynamic_size is not None
            model = export_onnx(plain, (height, width), metadata, free_size=free_size)
        else:
            model = export_network(fused, inputs.interface, spec.title, metadata)
        pair = ModulePair(module=fused, interface=inputs.interface, graph=model)
        judge.check("onnx", OnnxRunner(model).run, graphs=pair)
    with clock.stage("simplify"):
        exported, model = model, simplify(model, judge.images.samples(SAMPLE), simplifier)
        if model is exported:
            judge.carry_over("onnx", "simplified")
        else:
            simplified = GraphPair(reference="onnx", good=exported, bad=model)
            judge.check("simplified", OnnxRunner(model).run, graphs=simplified)
        if plain is not None:
            verdict = contract.require(model, plain.variant, plain.num_classes)
            blocks = {f"{layer.name}.weight": layer.name for layer in plain.variant.layers}
        else:
            expected = expected_blocks(fused)
            verdict = contract.require_blocks(model, expected, spec.title)
            blocks = {block.weight: name for name, block in expected.items()}
    description = Description(title=spec.title, metadata=metadata, blocks=blocks)
    return annotate(model, description), verdict


def _is_plain(spec: ExportSpec) -> bool:
    return spec.variant is not None and spec.variant.squeeze is Squeeze.NONE


_MODEL, _ANSWERS, _VALUES = "float.onnx", "original.npz", "float.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Values:
    """A float graph without its model and arrays; ``outputs`` are the names of these."""

    verdict: ContractVerdict
    blocks: tuple[BlockEquivalence, ...]
    notes: tuple[str, ...]
    figures: dict[str, Any]
    verdicts: Verdicts
    outputs: tuple[str, ...]
    seconds: dict[str, float]


def save_float_graph(made: FloatGraph, folder: Path) -> Iterator[Path]:
    """Write a float graph as files, for :func:`load_float_graph`."""
    onnx.save(made.model, folder / _MODEL)
    yield folder / _MODEL
    np.savez(folder / _ANSWERS, *made.judged.original.values())
    yield folder / _ANSWERS
    values = _Values(
        verdict=made.verdict,
        blocks=made.blocks,
        notes=made.notes,
        figures=dict(made.figures),
        verdicts=made.judged.verdicts,
        outputs=tuple(made.judged.original),
        seconds=dict(made.seconds),
    )
    yield write_value(folder / _VALUES, values)


def load_float_graph(folder: Path) -> FloatGraph:
    """Read what :func:`save_float_graph` wrote."""
    values = read_value(folder / _VALUES, _Values)
    with np.load(folder / _ANSWERS, allow_pickle=False) as stored:
        arrays = [stored[f"arr_{index}"] for index in range(len(values.outputs))]
    original = dict(zip(values.outputs, arrays, strict=True))
    return FloatGraph(
        model=onnx.load(folder / _MODEL),
        verdict=values.verdict,
        blocks=values.blocks,
        notes=values.notes,
        figures=values.figures,
        judged=Judged(original=original, verdicts=values.verdicts),
        seconds=values.seconds,
    )
