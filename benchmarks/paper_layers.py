"""How fast each layer runs: measured multiply-accumulates a second, beside what memory allows.

ONNX Runtime's profiler times the nodes of the optimized graph, whose names are its own. A node is
matched to the first layer not yet matched that has its input, output and weight shape; layers equal
in all three cost the same, and run in the graph's order.

With R the rate of the fastest layer of all networks and B the rate at which all cores stream
through memory, a layer of fewer than R / B multiply-accumulates a byte cannot reach R if its bytes
come from memory (Williams et al., "Roofline", CACM 2009). At batch 1 weights of a small network may
stay in the last-level cache, which is faster than B.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from convolution_cost import Layer, layers_of
from ort_profile import NodeRun, profiled

_PRODUCTS = ("Conv", "FusedConv", "Gemm", "FusedGemm")
_STREAM_VALUES = 1 << 26
_STREAM_REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpeed:
    """A layer with the median time of its node, activation and bias included."""

    layer: Layer
    seconds: float

    @property
    def gmac_per_s(self) -> float:
        """10^9 multiply-accumulates a second."""
        return self.layer.macs / self.seconds / 1e9

    def to_json(self) -> dict[str, Any]:
        """What the page and the text show."""
        return {
            "name": self.layer.name,
            "kind": self.layer.kind,
            "weight": list(self.layer.weight),
            "output": list(self.layer.output[2:]),
            "macs": self.layer.macs,
            "winograd": self.layer.winograd,
            "bytes": self.layer.bytes,
            "ms": round(1e3 * self.seconds, 4),
        }


def layer_speeds(
    model: Path, batch: int, image_size: tuple[int, int], runs: int
) -> tuple[list[LayerSpeed], float]:
    """Each layer in the graph's order, and the seconds of all nodes together (medians of ``runs``).

    Raises:
        ValueError: if a node of the optimized graph is no layer of the one as written.
    """
    images = np.random.default_rng(3).standard_normal((batch, 3, *image_size), np.float32)
    found = profiled(model, images, runs + 1)[1:]
    layers = layers_of(onnx.load(model), batch)
    seconds = [
        statistics.median(node.seconds for node in nodes) for nodes in zip(*found, strict=True)
    ]
    speeds = {
        layer.name: LayerSpeed(layer=layer, seconds=seconds[position])
        for position, layer in matched(layers, found[0]).items()
    }
    return [speeds[layer.name] for layer in layers], sum(seconds)


def matched(layers: Sequence[Layer], run: Sequence[NodeRun]) -> dict[int, Layer]:
    """The layer that the node at each position computes.

    Raises:
        ValueError: naming a node without a layer, or a layer without a node.
    """
    open_layers = list(layers)
    found = {}
    for position, node in enumerate(run):
        if node.op in _PRODUCTS:
            layer = next((one for one in open_layers if _is(node, one)), None)
            if layer is None:
                raise ValueError(f"node {node.name} of the optimized graph is none of the layers")
            open_layers.remove(layer)
            found[position] = layer
    if open_layers:
        raise ValueError(f"no node of the optimized graph computes {open_layers[0].name}")
    return found


def _is(node: NodeRun, layer: Layer) -> bool:
    # A Gemm's weights are packed and therefore missing from the profile.
    weights = [shape for shape in node.inputs[1:2] if len(shape) == 4]
    return (
        node.inputs[0] == layer.input
        and node.outputs[0] == layer.output
        and weights in ([], [layer.weight])
        and node.op.endswith("Gemm") == (len(layer.weight) == 2)
    )


def streamed_gb_per_s() -> float:
    """Bytes read and written by ``b = 2 a`` on all cores, in 10^9 a second; the best of a few."""
    source, target = torch.ones(_STREAM_VALUES), torch.empty(_STREAM_VALUES)
    best = float("inf")
    for _ in range(_STREAM_REPEATS):
        start = time.perf_counter()
        torch.mul(source, 2.0, out=target)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best / 1e9
