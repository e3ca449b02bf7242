"""Quantizing a chain stage by stage, each on what its quantized predecessors really deliver.

Two copies of a sample of images go through the chain side by side, one through the float stages and
one through the quantized ones. At each stage

1. the quantized copy's input is rounded to integers, ``x_q = s_x q``, with the chosen clip value;
2. the moments of the integer patches decide how W is rounded (:mod:`calibration.rounding`);
3. the bias takes the mean of what is left, over images and positions,

       b' = b + E[W * x_float] - E[W_q * x_q],

   so that this stage's result has the float network's mean, whatever went wrong before it.

Both copies then pass the gate and the ReLU. The classifier stays float, its bias corrected alike.
Memory is that of the sample at one stage, not of all the calibration images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calibration.chain import Chain, ChainError, Classifier, ConvStage
from calibration.clipping import input_scale, quantize_input
from calibration.convolution import (
    FloatArray,
    channel_first,
    classify,
    convolve,
    finish,
    visit_patches,
)
from calibration.rounding import DAMPING, MAX_COLUMNS, InputMoments, moment_blocks, round_weights
from calibration.threshold import quantize_weights, tensor_scale, weight_scales

IntArray = npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialOptions:
    """What is done to the weights and biases; ``keep_float`` names stages that are left alone.

    ``positions_per_column`` bounds the positions that moments are taken of.
    """

    second_order: bool = True
    bias_correction: bool = True
    per_tensor_weights: bool = False
    keep_float: Collection[str] = field(default=frozenset())
    damping: float = DAMPING
    positions_per_column: int = 16
    max_columns: int = MAX_COLUMNS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedStage:
    """Integers and scales of one stage: ``W = weight * weight_scales[o]``, ``x = q * input_scale``.

    ``weight`` is int8 ``[O, I / g, kh, kw]``, ``weight_scales`` float32 ``[O]``, ``bias`` float32.
    """

    name: str
    weight: IntArray
    weight_scales: npt.NDArray[np.float32]
    input_scale: float
    bias: npt.NDArray[np.float32]

    def dequantized(self, stage: ConvStage) -> ConvStage:
        """``stage`` with the weight and bias that the integers stand for."""
        weight = self.weight * self.weight_scales[:, None, None, None]
        return replace(stage, weight=weight, bias=self.bias)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedChain:
    """``chain`` in float but with corrected biases, and its quantized stages by name."""

    chain: Chain
    stages: Mapping[str, QuantizedStage]


def quantize_chain(
    chain: Chain,
    clips: Sequence[float],
    images: FloatArray,
    options: SequentialOptions | None = None,
) -> QuantizedChain:
    """Quantize ``chain`` on the sample ``images`` ``[N, C, H, W]``.

    ``clips[l]`` is the clip value of stage l's input; ``keep_float`` stages do not read theirs.
    Deterministic bit for bit on one machine.

    Raises:
        ChainError: no images; ``clips`` does not fit; ``keep_float`` names an unknown stage.
    """
    options = options or SequentialOptions()
    _require(chain, clips, images, options)
    exact = channel_first(images)
    real = exact
    stages: list[ConvStage] = []
    quantized: dict[str, QuantizedStage] = {}
    for stage, clip in zip(chain.stages, clips, strict=True):
        wanted = convolve(stage, exact)
        if stage.name in options.keep_float:
            found = convolve(stage, real)
            done = replace(stage, bias=_bias(stage, wanted, found, options))
        else:
            rounded, found = _quantize_stage(stage, real, clip, options)
            rounded = replace(rounded, bias=_bias(stage, wanted, found, options))
            quantized[stage.name] = rounded
            done = replace(stage, bias=rounded.bias)
        exact = finish(stage, _add(wanted, stage.bias))
        real = finish(stage, _add(found, done.bias))
        stages.append(done)
    classifier = _correct_classifier(chain, exact, real, options)
    corrected = Chain(stages=tuple(stages), classifier=classifier)
    return QuantizedChain(chain=corrected, stages=quantized)


def run_quantized(quantized: QuantizedChain, images: FloatArray) -> npt.NDArray[Any]:
    """Logits ``[N, K]`` as an INT8 engine computes them, up to float32 rounding."""
    x = channel_first(images)
    for stage in quantized.chain.stages:
        found = quantized.stages.get(stage.name)
        if found is None:
            y = convolve(stage, x)
        else:
            rounded = quantize_input(x, found.input_scale) * np.float32(found.input_scale)
            y = convolve(found.dequantized(stage), rounded)
        x = finish(stage, _add(y, stage.bias))
    return classify(quantized.chain, x)


def _require(
    chain: Chain, clips: Sequence[float], images: FloatArray, options: SequentialOptions
) -> None:
    if len(images) == 0:
        raise ChainError("there are no images to quantize on; give at least one")
    if len(clips) != len(chain.stages) or not all(np.isfinite(c) and c > 0 for c in clips):
        raise ChainError(f"expected {len(chain.stages)} positive clip values, one per stage")
    names = {stage.name for stage in chain.stages}
    if unknown := sorted(set(options.keep_float) - names):
        raise ChainError(f"no stage is called {unknown[0]!r}; known: {', '.join(sorted(names))}")


def _quantize_stage(
    stage: ConvStage, x: FloatArray, clip: float, options: SequentialOptions
) -> tuple[QuantizedStage, FloatArray]:
    """The stage with its bias uncorrected, and its result on ``x`` without a bias."""
    scale = input_scale(clip)
    q = quantize_input(x, scale)
    choose = tensor_scale if options.per_tensor_weights else weight_scales
    scales = choose(stage.weight)
    if options.second_order:
        covariance = input_moments(stage, q, options).covariance()
        weight = round_weights(stage.weight, scales, covariance, damping=options.damping)
    else:
        weight = quantize_weights(stage.weight, scales)
    rounded = QuantizedStage(
        name=stage.name,
        weight=weight,
        weight_scales=scales,
        input_scale=scale,
        bias=stage.bias.astype(np.float32),
    )
    q *= np.float32(scale)
    return rounded, convolve(rounded.dequantized(stage), q)


def input_moments(stage: ConvStage, q: FloatArray, options: SequentialOptions) -> InputMoments:
    """Moments of the patches of the integer inputs ``q`` ``[I, N, H, W]``.

    Of more positions than ``positions_per_column`` times the columns (and 16384), a part is taken
    that depends on nothing but their number.
    """
    channels, taps = stage.weight.shape[1], stage.weight.shape[2] * stage.weight.shape[3]
    blocks = moment_blocks(stage.groups, channels, taps, options.max_columns)
    moments = InputMoments(blocks, stage.in_channels * taps // blocks)
    rows, columns = stage.output_size(q.shape[2], q.shape[3])
    total = q.shape[1] * rows * columns
    wanted = max(options.positions_per_column * channels * taps, 1 << 14)
    seen = 0

    def visit(patches: FloatArray) -> None:
        nonlocal seen
        index = np.arange(seen, seen + patches.shape[2], dtype=np.uint64)
        seen += patches.shape[2]
        if wanted < total:
            # Fibonacci hashing spreads any run of positions evenly over 32 bits.
            place = (index * np.uint64(2654435769)) & np.uint64(0xFFFFFFFF)
            patches = patches[:, :, place < np.uint64(wanted / total * 2**32)]
        moments.update(patches)

    visit_patches(stage, q, visit)
    return moments


def _bias(
    stage: ConvStage, wanted: FloatArray, found: FloatArray, options: SequentialOptions
) -> npt.NDArray[np.float32]:
    bias = stage.bias.astype(np.float64)
    if options.bias_correction:
        axes = (1, 2, 3)
        bias = bias + wanted.mean(axis=axes, dtype=np.float64)
        bias = bias - found.mean(axis=axes, dtype=np.float64)
    return np.asarray(bias, dtype=np.float32)


def _add(y: FloatArray, bias: npt.NDArray[Any]) -> FloatArray:
    y += bias.astype(np.float32)[:, None, None, None]
    return y


def _correct_classifier(
    chain: Chain, exact: FloatArray, real: FloatArray, options: SequentialOptions
) -> Classifier:
    if not options.bias_correction:
        return chain.classifier
    shift = (classify(chain, exact) - classify(chain, real)).mean(axis=0)
    return replace(chain.classifier, bias=chain.classifier.bias + shift)
