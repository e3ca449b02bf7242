"""INT8 by the calibration table of an earlier run, if everything it is bound to is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from calibration.cache_text import CalibrationTableError
from calibration.chain import ChainError
from calibration.images import Preprocess
from calibration.recipe import Recipe as Rung
from calibration.recipe import RecipeOptions, requantize
from calibration.table import IMPORTED, CalibrationTable
from exporter.errors import InputError
from exporter.files.text_file import read_text
from exporter.graph import graph_sha256
from exporter.quantization.chain_observer import Sampler
from exporter.quantization.chain_quantizer import integer_graph
from exporter.quantization.half_nodes import in_half
from exporter.quantization.onnx_kernels import OnnxKernels
from exporter.quantization.plain_chain import PlainChain, with_chain
from exporter.quantization.quantizers import Quantized, QuantizerOptions
from exporter.quantize import quantize
from exporter.running.image_set import ImageSet
from exporter.spec import Recipe

_ANY_TENSORRT = "10.3.0"


def load_table(path: Path) -> CalibrationTable:
    """Read ``calibration.json`` of a bundle.

    Raises:
        InputError: if it cannot be read, or holds trained scales, which belong to their weights, or
            scales of another type than INT8.
    """
    try:
        table = CalibrationTable.loads(read_text(path))
        _require_usable(table)
    except (OSError, UnicodeDecodeError, CalibrationTableError) as error:
        raise InputError(f"calibration table {path} cannot be used: {error}") from error
    if table.method == IMPORTED:
        raise InputError(
            f"calibration table {path} holds the scales that came with the weights: pass these "
            "weights and no table"
        )
    if "data_type" in table.options:
        raise InputError(
            f"calibration table {path} holds scales for {table.options['data_type']}, not for "
            "int8: leave --calibration-table away to calibrate anew"
        )
    return table


def _require_usable(table: CalibrationTable) -> None:
    """What the table's own type leaves open, and an export relies on.

    Raises:
        CalibrationTableError: naming it.
    """
    table.to_cache_text(_ANY_TENSORRT)  # names that the bundle's cache could not hold
    for key in ("keep_half", "keep_float"):
        names = table.options.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CalibrationTableError(f"option {key} must be a list of names, not {names!r}")


def require_binding(
    table: CalibrationTable,
    model: onnx.ModelProto,
    images: ImageSet | None,
    options: QuantizerOptions,
    recipe: Recipe | None,
) -> None:
    """Refuse a table that was made from something else than what is asked for now.

    Raises:
        InputError: naming everything that differs.
    """
    differs = []
    if graph_sha256(model) != table.source_sha256:
        differs.append("the network (or how it was exported)")
    if images is not None and images.to_json()["sha256"] != table.data_sha256:
        differs.append("the calibration images")
    if _json(options.preprocess) != table.preprocess:
        differs.append("the preprocessing")
    if recipe is not None and str(recipe) != table.method:
        differs.append(f"the recipe (the table's is {table.method}, not {recipe})")
    asked = options.to_json()
    given = {key: value for key, value in asked.items() if value}
    if any(table.options.get(key) != value for key, value in given.items()):
        differs.append(f"{', '.join(key for key in given).replace('_', ' ')}")
    if differs:
        raise InputError(
            f"the calibration table was made for something else: {'; '.join(differs)} "
            f"differ{'s' * (len(differs) == 1)}; leave --calibration-table away to calibrate anew"
        )


def replay(
    model: onnx.ModelProto,
    chain: PlainChain | None,
    images: ImageSet | None,
    table: CalibrationTable,
) -> Quantized:
    """The graphs that the table's run made, bit for bit on one machine.

    Images are needed where the recipe rounds on them; the network is not observed again.

    Raises:
        InputError: if they are missing, or the table does not fit the graph.
    """
    kept_half = tuple(table.options.get("keep_half", ()))
    kept_float = tuple(table.options.get("keep_float", ()))
    per_tensor = bool(table.options.get("per_tensor_weights", False))
    if chain is None:
        graph = quantize(
            model, table, keep_float={*kept_half, *kept_float}, per_tensor_weights=per_tensor
        )
        return Quantized(model=model, graph=in_half(graph, kept_half), table=table)
    if images is None:
        raise InputError(
            f"recipe {table.method} rounds on the calibration images: pass --calib with the table"
        )
    sampler = Sampler()
    for (batch,) in images.batches():
        sampler.update(batch)
    kept = frozenset({*kept_half, *kept_float}).difference(chain.float_nodes)
    options = RecipeOptions(per_tensor_weights=per_tensor, keep_float=kept)
    stages = chain.chain.stages
    boundaries = dict(zip((stage.name for stage in stages), chain.boundaries, strict=False))
    scales = [table.channel_scales.get(stage.name) for stage in stages]
    try:
        clips = [
            table.ranges[boundaries[stage.name]].threshold if stage.name not in kept else 1.0
            for stage in stages
        ]
        rescaled, done = requantize(
            Rung(table.method),
            chain.chain,
            [None if scale is None else np.array(scale) for scale in scales],
            clips,
            images=sampler.images,
            options=options,
            kernels=OnnxKernels(),
        )
    except (ChainError, KeyError) as error:
        raise InputError(f"the calibration table does not fit the network: {error}") from error
    graph = integer_graph(model, chain, done, table, options)
    return Quantized(
        model=with_chain(model, rescaled), graph=in_half(graph, kept_half), table=table
    )


def _json(preprocess: Preprocess | None) -> dict[str, object]:
    return preprocess.to_json() if preprocess else {}
