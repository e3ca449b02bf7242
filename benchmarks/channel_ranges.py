"""Why INT8 collapses, drawn from the bundled A0: docs/int8_ranges.svg.

    python benchmarks/channel_ranges.py

Left: the largest |x| of every channel at every boundary, as a share of the tensor's largest, which
is all that an INT8 scale knows. As trained, after a rescaling by 2^U(-3, 3) per channel, which
changes no float result, and after equalization of that. Right: how many INT8 levels one standard
deviation of a fused kernel's taps gets, with the merged identity branch and without it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from pathlib import Path

import matplotlib as mpl
import numpy as np
import onnx
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from calibration.chain import ConvStage, rescale
from calibration.images import Preprocess
from calibration.moments import ChannelStatistics
from exporter.onnx_export import export_onnx
from exporter.quantization.chain_observer import observe_chain
from exporter.quantization.chain_quantizer import quantize_observed
from exporter.quantization.plain_chain import PlainChain, read_chain, with_chain
from exporter.running.image_set import FolderImages
from models.checkpoint import load_checkpoint
from models.fusion import reparameterize
from models.registry import bundled_weights

TARGET = Path(__file__).parents[1] / "docs" / "int8_ranges.svg"
COLOURS = {"as trained": "#1f6fb4", "rescaled": "#d1495b", "equalized": "#2e8b57"}


def network() -> tuple[onnx.ModelProto, FolderImages]:
    bundled = bundled_weights("A0")
    assert bundled is not None
    preprocess = Preprocess.from_json(bundled.preprocess)
    images = FolderImages.open(
        bundled.calibration_images, preprocess, "", count=512, skip_bad=False
    )
    module = reparameterize(load_checkpoint(bundled.checkpoint).module)
    return export_onnx(module, preprocess.image_size, {}), images  # type: ignore[arg-type]


def chain_of(model: onnx.ModelProto) -> PlainChain:
    plain = read_chain(model)
    assert plain is not None
    return plain


def shares(statistics: tuple[ChannelStatistics, ...]) -> list[np.ndarray]:
    """Each channel's largest |x| over the tensor's, boundary by boundary, the image left out."""
    live = [np.maximum(found.abs_max, 1e-12) for found in statistics[1:]]
    return [values / values.max() for values in live]


def draw_ranges(axes: Axes, ranges: dict[str, list[np.ndarray]]) -> None:
    for offset, (name, boundaries) in enumerate(ranges.items()):
        places = np.arange(1, len(boundaries) + 1) + 0.27 * (offset - 1)
        low, middle, high = (
            np.array([np.percentile(values, q) for values in boundaries]) for q in (5, 50, 95)
        )
        colour = COLOURS[name]
        axes.vlines(places, low, high, color=colour, linewidth=3, alpha=0.55, label=name)
        axes.plot(places, middle, "o", markersize=3, color=colour)
    axes.set_yscale("log", base=2)
    axes.axhline(1 / 127, color="grey", linewidth=0.8, linestyle=":")
    axes.text(1, 1 / 127, " below this a channel is 0 or 1 level", fontsize=7, va="bottom")
    axes.set_xlabel("boundary (input of convolution n + 1)")
    axes.set_ylabel("channel's largest |x| / tensor's largest")
    axes.set_title("Activations: 5th to 95th percentile of channels", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")


def levels(stage: ConvStage, *, without_identity: bool) -> float:
    """Median over output channels of 127 sigma / max |W|, sigma over the channel's taps."""
    weight = stage.weight.copy()
    if without_identity:
        centre = weight.shape[2] // 2
        rows = np.arange(len(weight))
        if weight.shape[1] != len(weight):
            return float("nan")
        weight[rows, rows, centre, centre] = 0.0
    flat = weight.reshape(len(weight), -1)
    return float(np.median(127 * flat.std(axis=1) / np.abs(flat).max(axis=1)))


def draw_spikes(axes: Axes, stages: tuple[ConvStage, ...]) -> None:
    places = np.arange(1, len(stages) + 1)
    merged = [levels(stage, without_identity=False) for stage in stages]
    removed = [levels(stage, without_identity=True) for stage in stages]
    axes.bar(places, merged, color=COLOURS["rescaled"], label="fused kernel")
    axes.plot(places, removed, "o", color=COLOURS["equalized"], markersize=4,
              label="the same without the identity's diagonal")  # fmt: skip
    axes.set_xlabel("convolution")
    axes.set_ylabel("INT8 levels per standard deviation of the taps")
    axes.set_title("Weights: what the merged identity leaves to the rest", fontsize=9)
    axes.legend(fontsize=7)


def main() -> None:
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "int8"
    model, images = network()
    plain = chain_of(model)
    rng = np.random.default_rng(0)
    factors = [2.0 ** rng.uniform(-3, 3, len(stage.weight)) for stage in plain.chain.stages]
    rescaled = with_chain(model, rescale(plain.chain, factors))
    observed = observe_chain(model, plain, images)
    stressed = observe_chain(rescaled, chain_of(rescaled), images)
    made = quantize_observed(rescaled, chain_of(rescaled), stressed, "equalize")
    ranges = {
        "as trained": shares(observed.statistics),
        "rescaled": shares(stressed.statistics),
        "equalized": shares(tuple(made.outcome.equalization.statistics)),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_ranges(left, ranges)
    draw_spikes(right, plain.chain.stages)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, metadata={"Date": None})
    for name, boundaries in ranges.items():
        spread = np.median([np.log2(1 / np.percentile(values, 5)) for values in boundaries])
        print(f"{name:12} 5th percentile channel is 2^-{spread:.1f} of the largest (median)")


if __name__ == "__main__":
    main()
