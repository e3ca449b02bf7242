"""The last change of the graphs before they are published: pixels in, by option."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx

from calibration.cache_text import CalibrationTableError, parse_cache_text
from exporter.errors import InputError
from exporter.files.text_file import read_text
from exporter.graph.prologue import Prologue, normalized, require_prologue, with_prologue
from exporter.running.image_set import ArrayImages
from exporter.running.onnx_runner import Batch, OnnxRunner, Outputs, Runner
from exporter.running.runnable import runnable
from exporter.sources.inputs import Inputs
from exporter.sources.source import Source
from exporter.spec import ExportSpec, Precision
from exporter.stages.judge import Judge
from exporter.stages.precision import Precise, Stage

_OPTION = "--with-preprocess"


def choose_prologue(spec: ExportSpec, inputs: Inputs) -> Prologue | None:
    """What ``spec`` wants in front of the network; None without ``with_preprocess``.

    Raises:
        InputError: if the network takes something else than one RGB image, or nobody says how its
            images are normalized, or the images to compare on are no normalized pixels, or a
            calibration cache is of a graph without prologue.
    """
    if spec.with_preprocess is None:
        return None
    ports = inputs.interface.inputs
    if len(ports) != 1:
        names = ", ".join(port.name for port in ports)
        raise InputError(f"{_OPTION} is for networks of one image; this one takes {names}")
    (port,) = ports
    if inputs.interface.image_size is None or inputs.preprocess is None:
        raise InputError(
            f"{_OPTION} is for RGB images [N, 3, H, W]; input {port.name} is "
            f"[{', '.join(map(str, port.shape))}]"
        )
    images = (inputs.evaluation, inputs.calibration)
    if any(isinstance(found, ArrayImages) for found in images) and not is_stated(
        spec, inputs.source
    ):
        raise InputError(
            f"{_OPTION} needs to know how images become the arrays that were passed: name their "
            "mean and std with preprocess="
        )
    prologue = Prologue(layout=spec.with_preprocess, preprocess=inputs.preprocess)
    prologue.pixels(next(inputs.evaluation.batches()))
    if spec.build.calibration_cache is not None:
        _require_cache(spec.build.calibration_cache, port.name)
    return prologue


def _require_cache(path: Path, name: str) -> None:
    """Implicit INT8 would leave the first convolution in float, for lack of a scale."""
    try:
        scales = parse_cache_text(read_text(path))
    except (OSError, UnicodeDecodeError, CalibrationTableError) as error:
        raise InputError(f"calibration cache {path} cannot be used: {error}") from error
    if name in scales:
        raise InputError(
            f"calibration cache {path} has a scale for {name}, which takes pixels, in place of "
            f"{normalized(name)}: it is of an export without {_OPTION}"
        )


def is_stated(spec: ExportSpec, source: Source) -> bool:
    """Whether the preprocessing is the user's or the checkpoint's, not ImageNet's as a guess."""
    return spec.preprocess is not None or source.preprocess is not None


def precede(
    precise: Precise,
    prologue: Prologue | None,
    judge: Judge,
    stage: Stage,
    *,
    precision: Precision,
    half_scales: bool = False,
) -> Precise:
    """``precise`` with the prologue before both graphs, whose rows are measured anew on pixels.

    The gates stay those that the rows had. The table stays that of the network alone.

    Raises:
        GateFailedError: if a graph does not begin with the prologue, or is not close enough.
    """
    if prologue is None:
        return precise
    with stage("prologue"):
        model = _preceded(precise.model, prologue)
        _recheck(judge, "simplified", _fed(OnnxRunner(model), prologue))
        if precision is Precision.FP32:
            return replace(precise, model=model, graph=model)
        graph = _preceded(precise.graph, prologue)
        runner = runnable(graph, str(precision), half_scales=half_scales).open()
        _recheck(judge, str(precision), _fed(runner, prologue))
    return replace(precise, model=model, graph=graph)


def _preceded(model: onnx.ModelProto, prologue: Prologue) -> onnx.ModelProto:
    preceded = with_prologue(model, prologue)
    require_prologue(preceded, prologue)
    return preceded


def _fed(runner: OnnxRunner, prologue: Prologue) -> Runner:
    """``runner``, which takes pixels, as what takes the normalized images that they become."""

    return partial(_run_on_pixels, runner, prologue)


def _run_on_pixels(runner: OnnxRunner, prologue: Prologue, batch: Batch) -> Outputs:
    return runner.run(prologue.pixels(batch))


def _recheck(judge: Judge, stage: str, run: Runner) -> None:
    (row,) = (row for row in judge.ledger.stages if row.stage == stage)
    judge.recheck(stage, run, row.gate)
