"""Two ways to INT8, one door: what the ladder climbs and mixed precision dials.

A *chain* quantizer knows every recipe: a chain of convolutions, gates included, can be rescaled
exactly, and rounded stage by stage. A *clip* quantizer takes any graph and chooses clip values
only. Both look at the calibration images once, when they are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import onnx

from calibration.images import Preprocess
from calibration.recipe import Outcome, RecipeOptions
from calibration.sensitivity import StageEffect, predicted_effects, signal_power
from calibration.table import CalibrationTable
from exporter.calibrator import observe_images, table_by
from exporter.errors import InputError
from exporter.graph import attributes, quantizable, require_nodes, with_outputs
from exporter.precision import largest_magnitudes, require_half_range
from exporter.quantization.chain_observer import observe_chain
from exporter.quantization.chain_quantizer import quantize_observed
from exporter.quantization.half_nodes import in_half
from exporter.quantization.onnx_kernels import OnnxKernels
from exporter.quantization.plain_chain import PlainChain
from exporter.quantize import quantize
from exporter.running.image_set import ImageSet, outputs_of
from exporter.running.onnx_runner import FloatArray, OnnxRunner
from exporter.spec import Recipe

_CLIP_RECIPES = (Recipe.MINMAX, Recipe.PERCENTILE, Recipe.MSE, Recipe.ENTROPY)
_SWEEP_BATCHES = 2
_SWEEP_IMAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizerOptions:
    """What holds for every recipe. ``keep_float`` names nodes."""

    keep_float: tuple[str, ...] = ()
    per_tensor_weights: bool = False
    power_of_two: bool = False
    preprocess: Preprocess | None = None

    def to_json(self, kept_half: Sequence[str] = ()) -> dict[str, Any]:
        """What binds a calibration table beside recipe, data and preprocessing."""
        return {
            "keep_float": sorted(self.keep_float),
            "keep_half": sorted(kept_half),
            "per_tensor_weights": self.per_tensor_weights,
            "power_of_two": self.power_of_two,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """The float graph to publish, the Q/DQ graph made from it, and its scales.

    ``outcome`` is the chain behind the graphs, where there is one.
    """

    model: onnx.ModelProto
    graph: onnx.ModelProto
    table: CalibrationTable
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerEffects:
    """What each quantized layer adds to the error power of the outputs, and their own power."""

    layers: tuple[StageEffect, ...]
    signal: float


class Quantizer(Protocol):
    """Makes the graph of any recipe that its network allows."""

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """From plain to full."""
        ...

    @property
    def default(self) -> Recipe:
        """The one to use where nothing is asked for."""
        ...

    @property
    def predicts(self) -> bool:
        """Whether ``effects`` costs one sweep, not one run of the network for each layer."""
        ...

    @property
    def rescales(self) -> bool:
        """Whether ``Quantized.model`` has other weights than the network it was opened with."""
        ...

    def make(self, recipe: Recipe, kept_half: Sequence[str] = ()) -> Quantized:
        """Quantize by ``recipe`` with the layers ``kept_half`` computed in half.

        Raises:
            GateFailedError: if a kept layer's values are beyond half's range, or equalization
                would change the float network.
        """
        ...

    def effects(self, made: Quantized) -> LayerEffects:
        """How much each layer of ``made``, which keeps none in half, costs the outputs."""
        ...


def open_quantizer(
    model: onnx.ModelProto,
    chain: PlainChain | None,
    images: ImageSet,
    options: QuantizerOptions,
    progress: Callable[[float], None],
) -> Quantizer:
    """Observe the calibration images with ``model``; ``chain`` is what it is, if it is one.

    Raises:
        InputError: if an image cannot be read; if an option fits no such graph, or names no node.
    """
    known = (node.name for node in quantizable(model))
    require_nodes(options.keep_float, known, "convolution")
    if chain is not None:
        return _ChainQuantizer(model, chain, images, options, progress)
    if options.power_of_two:
        raise InputError(
            "power-of-two scales belong to equalization, which this network does not allow"
        )
    return _ClipQuantizer(model, images, options, progress)


class _ChainQuantizer:
    recipes = tuple(recipe for recipe in Recipe if recipe is not Recipe.AUTO)
    default = Recipe.FULL
    predicts = True
    rescales = True

    def __init__(
        self,
        model: onnx.ModelProto,
        chain: PlainChain,
        images: ImageSet,
        options: QuantizerOptions,
        progress: Callable[[float], None],
    ) -> None:
        self._model, self._chain, self._images, self._options = model, chain, images, options
        self._observed = observe_chain(model, chain, images, progress)

    def make(self, recipe: Recipe, kept_half: Sequence[str] = ()) -> Quantized:
        options = self._options
        made = quantize_observed(
            self._model,
            self._chain,
            self._observed,
            str(recipe),
            options=RecipeOptions(
                power_of_two=options.power_of_two,
                per_tensor_weights=options.per_tensor_weights,
                keep_float=frozenset({*options.keep_float, *kept_half}),
            ),
            preprocess=options.preprocess,
        )
        _require_half_fits(made.model, self._images, kept_half)
        return Quantized(
            model=made.model,
            graph=in_half(made.graph, kept_half),
            table=replace(made.table, options=options.to_json(kept_half)),
            outcome=made.outcome,
        )

    def effects(self, made: Quantized) -> LayerEffects:
        """Predicted, in one backward sweep over a few images."""
        assert made.outcome is not None
        few = self._observed.sample[:_SWEEP_IMAGES]
        chain = made.outcome.equalization.chain
        kernels = OnnxKernels()
        return LayerEffects(
            layers=predicted_effects(chain, made.outcome.quantized, few, kernels),
            signal=signal_power(chain, few, kernels),
        )


class _ClipQuantizer:
    recipes = _CLIP_RECIPES
    default = Recipe.MSE
    predicts = False
    rescales = False

    def __init__(
        self,
        model: onnx.ModelProto,
        images: ImageSet,
        options: QuantizerOptions,
        progress: Callable[[float], None],
    ) -> None:
        self._model, self._images, self._options = model, images, options
        self._observers = observe_images(model, images, progress)
        # Hashes every image: once, not for each recipe.
        self._data = images.to_json()

    def make(self, recipe: Recipe, kept_half: Sequence[str] = ()) -> Quantized:
        preprocess = self._options.preprocess
        table = table_by(str(recipe), self._observers, self._model, self._data, preprocess)
        _require_half_fits(self._model, self._images, kept_half)
        graph = self._graph(table, {*self._options.keep_float, *kept_half})
        table = replace(table, options=self._options.to_json(kept_half))
        return Quantized(model=self._model, graph=in_half(graph, kept_half), table=table)

    def _graph(self, table: CalibrationTable, kept: Collection[str]) -> onnx.ModelProto:
        return quantize(
            self._model,
            table,
            keep_float=kept,
            per_tensor_weights=self._options.per_tensor_weights,
        )

    def effects(self, made: Quantized) -> LayerEffects:
        """Measured: one run for each layer, that layer alone in INT8."""
        names = [n.name for n in quantizable(self._model) if n.name not in self._options.keep_float]
        batches = list(islice(self._images.batches(), _SWEEP_BATCHES))
        exact = outputs_of(OnnxRunner(self._model).run, batches)
        macs = multiply_accumulates(self._model, batches[0])
        effects = []
        for name in names:
            others = {*self._options.keep_float, *names} - {name}
            found = outputs_of(OnnxRunner(self._graph(made.table, others)).run, batches)
            effects.append(
                StageEffect(name=name, power=_relative_noise(exact, found), macs=macs[name])
            )
        return LayerEffects(layers=tuple(effects), signal=1.0)


def _relative_noise(exact: Mapping[str, FloatArray], found: Mapping[str, FloatArray]) -> float:
    """Noise over signal power, the worst of the outputs."""
    worst = 0.0
    for name, values in exact.items():
        reference = values.astype(np.float64)
        noise = float(((found[name] - reference) ** 2).sum())
        worst = max(worst, noise / (float((reference**2).sum()) or 1.0))
    return worst


def multiply_accumulates(
    model: onnx.ModelProto, batch: tuple[FloatArray, ...]
) -> Mapping[str, int]:
    """Of each Conv, Gemm and MatMul with constant weights, for one image of ``batch``'s size."""
    nodes = quantizable(model)
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    probe = OnnxRunner(with_outputs(model, [node.output[0] for node in nodes]))
    found = probe.run(tuple(array[:1] for array in batch))
    macs = {}
    for node in nodes:
        shape = shapes[node.input[1]]
        outputs = int(np.prod(found[node.output[0]].shape[1:]))
        transposed = node.op_type == "Gemm" and attributes(node).get("transB", 0)
        terms = int(np.prod(shape[1:])) if node.op_type == "Conv" or transposed else shape[0]
        macs[node.name] = outputs * terms
    return macs


def _require_half_fits(
    model: onnx.ModelProto, images: ImageSet, kept_half: Collection[str]
) -> None:
    if not kept_half:
        return
    outputs = {node.output[0] for node in model.graph.node if node.name in kept_half}
    largest = largest_magnitudes(model, islice(images.batches(), _SWEEP_BATCHES))
    require_half_range({name: value for name, value in largest.items() if name in outputs})
