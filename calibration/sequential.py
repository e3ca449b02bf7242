"""Quantizing a chain stage by stage, each on what its quantized predecessors really deliver.

A sample of images goes through the quantized stages. At each

1. the input is rounded to integers, ``x_q = s_x q``, with the chosen clip value;
2. the moments of the integer patches decide how W is rounded (:mod:`calibration.rounding`);
3. the bias takes the mean of what is left, over images and positions,

       b' = E[W * x + b] - E[W_q * x_q],

   so that this stage's result has the float network's mean, whatever went wrong before it. The
   first mean is :mod:`calibration.survey`'s of the same images, the second linear in x_q's mean.

The result then passes the gate and the ReLU. The classifier stays float, its bias corrected alike.
Memory is that of the sample at one stage, not of all the calibration images.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from calibration.autocorrelation import correlates, patch_products
from calibration.chain import Chain, ChainError, Classifier, ConvStage
from calibration.clipping import input_scale, quantize_input
from calibration.convolution import (
    NUMPY,
    FloatArray,
    Kernels,
    channel_first,
    classify,
    mean_patch,
    patches_at,
    run_stage,
)
from calibration.rounding import DAMPING, MAX_COLUMNS, InputMoments, moment_blocks, round_weights
from calibration.survey import FloatPass, mean_result, survey
from calibration.threshold import quantize_weights, tensor_scale, weight_scales

IntArray = npt.NDArray[np.int8]

MINIMUM_IMAGES = 32
_MINIMUM_POSITIONS = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class SequentialOptions:
    """What is done to the weights and biases; ``keep_float`` names stages that are left alone.

    ``full_range`` gives what comes out of a ReLU all 256 integers, 0 to 255.
    ``positions_per_column`` bounds the positions that moments are taken of.
    """

    second_order: bool = True
    bias_correction: bool = True
    per_tensor_weights: bool = False
    full_range: bool = False
    keep_float: Collection[str] = field(default=frozenset())
    damping: float = DAMPING
    positions_per_column: int = 8
    max_columns: int = MAX_COLUMNS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedStage:
    """Integers and scales of one stage: ``W = weight * weight_scales[o]``, ``x = q * input_scale``.

    ``weight`` is int8 ``[O, I / g, kh, kw]``, ``weight_scales`` float32 ``[O]``, ``bias`` float32.
    The integers q are -128 to 127, or 0 to 255 where ``unsigned``.
    """

    name: str
    weight: IntArray
    weight_scales: npt.NDArray[np.float32]
    input_scale: float
    bias: npt.NDArray[np.float32]
    unsigned: bool = False

    def rounded_input(self, x: FloatArray) -> FloatArray:
        """``x`` as the integers stand for it."""
        q = quantize_input(x, self.input_scale, unsigned=self.unsigned)
        q *= np.float32(self.input_scale)
        return q

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
    *,
    floats: FloatPass | None = None,
    kernels: Kernels = NUMPY,
) -> QuantizedChain:
    """Quantize ``chain`` on the sample ``images`` ``[N, C, H, W]``.

    ``clips[l]`` is the clip value of stage l's input; ``keep_float`` stages do not read theirs.
    ``floats`` is the float chain's run of the same images, where it is known already.
    Deterministic bit for bit on one machine.

    Raises:
        ChainError: no images; ``clips`` does not fit; ``keep_float`` names an unknown stage.
    """
    options = options or SequentialOptions()
    _require(chain, clips, images, options)
    if floats is None and options.bias_correction:
        floats = survey(chain, images, kernels)
    x = channel_first(images)
    stages: list[ConvStage] = []
    quantized: dict[str, QuantizedStage] = {}
    for index, (stage, clip) in enumerate(zip(chain.stages, clips, strict=True)):
        computed = stage
        if stage.name not in options.keep_float:
            unsigned = options.full_range and is_unsigned(chain, index)
            quantized[stage.name], x = _quantize_stage(
                stage, x, clip, options, kernels, unsigned=unsigned
            )
            computed = quantized[stage.name].dequantized(stage)
        # Before the first rounding there is nothing to correct.
        if floats is not None and quantized:
            bias = floats.means[index] - mean_result(computed, x)
            computed = replace(computed, bias=np.asarray(bias, dtype=np.float32))
        if stage.name in quantized:
            quantized[stage.name] = replace(quantized[stage.name], bias=computed.bias)
        stages.append(replace(stage, bias=computed.bias))
        x = run_stage(computed, x, kernels)
    classifier = _correct_classifier(chain, x, floats if quantized else None)
    corrected = Chain(stages=tuple(stages), classifier=classifier)
    return QuantizedChain(chain=corrected, stages=quantized)


def is_unsigned(chain: Chain, index: int) -> bool:
    """Whether no value that stage ``index`` reads is negative: a ReLU is before it."""
    return index > 0 and chain.stages[index - 1].relu


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
    stage: ConvStage,
    x: FloatArray,
    clip: float,
    options: SequentialOptions,
    kernels: Kernels,
    *,
    unsigned: bool,
) -> tuple[QuantizedStage, FloatArray]:
    """The stage with its bias uncorrected, and its input ``x`` rounded."""
    scale = input_scale(clip, unsigned=unsigned)
    q = quantize_input(x, scale, unsigned=unsigned)
    choose = tensor_scale if options.per_tensor_weights else weight_scales
    scales = choose(stage.weight)
    if options.second_order:
        # Only ratios of moments matter, and their integers have seven bits and a sign.
        halves = np.floor(q / 2) if unsigned else q
        covariance = input_moments(stage, halves, options, kernels).covariance()
        weight = round_weights(stage.weight, scales, covariance, damping=options.damping)
    else:
        weight = quantize_weights(stage.weight, scales)
    rounded = QuantizedStage(
        name=stage.name,
        weight=weight,
        weight_scales=scales,
        input_scale=scale,
        bias=stage.bias.astype(np.float32),
        unsigned=unsigned,
    )
    q *= np.float32(scale)
    return rounded, q


def input_moments(
    stage: ConvStage, q: FloatArray, options: SequentialOptions, kernels: Kernels = NUMPY
) -> InputMoments:
    """Moments of the patches of the integer inputs ``q`` ``[I, N, H, W]``.

    Of more images than are needed for ``positions_per_column`` times the columns (and for
    ``MINIMUM_IMAGES``), the first are taken; of more positions than needed, a part that depends on
    nothing but their number.
    """
    channels, taps = stage.weight.shape[1], stage.weight.shape[2] * stage.weight.shape[3]
    blocks = moment_blocks(stage.groups, channels, taps, options.max_columns)
    moments = InputMoments(blocks, stage.in_channels * taps // blocks)
    rows, columns = stage.output_size(q.shape[2], q.shape[3])
    wanted = max(options.positions_per_column * channels * taps, _MINIMUM_POSITIONS)
    if correlates(stage):
        q = q[:, : max(-(-wanted // (rows * columns)), MINIMUM_IMAGES)]
        moments.count = q.shape[1] * rows * columns
        # Sums of integers, up to the rounding of the mean.
        moments.sums = np.rint(mean_patch(stage, q).reshape(blocks, -1) * moments.count)
        moments.products = patch_products(q, blocks, kernels)
        return moments
    moments.update(patches_at(stage, q, _spread(q.shape[1] * rows * columns, wanted)))
    return moments


def _spread(total: int, wanted: int) -> npt.NDArray[np.intp]:
    """About ``wanted`` of ``total`` places, evenly spread; all of them if there are no more."""
    places = np.arange(total)
    # Fibonacci hashing spreads any run of places evenly over 32 bits.
    hashed = (places.astype(np.uint64) * np.uint64(2654435769)) & np.uint64(0xFFFFFFFF)
    return places[hashed < np.uint64(wanted / total * 2**32)] if wanted < total else places


def _correct_classifier(chain: Chain, x: FloatArray, floats: FloatPass | None) -> Classifier:
    if floats is None:
        return chain.classifier
    shift = floats.logits.mean(axis=0) - classify(chain, x).mean(axis=0)
    return replace(chain.classifier, bias=chain.classifier.bias + shift)
