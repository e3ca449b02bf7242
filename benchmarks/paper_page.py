"""docs/paper.md and docs/paper.svg, from the result of paper.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from paper_networks import DEPLOY, TRAIN
from paper_table4 import TABLE_4
from paper_tables import Result, page_tables, plain_keys, text_tables

INTRODUCTION = """# The paper's claims on a CPU

Made by `make benchmark-paper` ([benchmarks/paper.py](../benchmarks/paper.py)): {processor}, {cores}
cores, ONNX Runtime {onnxruntime} at its defaults, {height} x {width} pixels. The networks have
random weights, on which neither speed nor memory depends; accuracy is not measured here. The paper,
Ding et al., [RepVGG: Making VGG-style ConvNets Great Again](https://arxiv.org/abs/2101.03697),
measured a GPU. Compare ratios: absolute times are those of one run on a shared machine.

![Speed beside ResNet-50, peak activation memory, and the rate of every layer](paper.svg)

"""
COLOURS = {"first": "#1f6fb4", "second": "#7fb2dd", "paper": "#9a9a9a", TRAIN: "#d1495b"}
KINDS = {"3x3": "#1f6fb4", "3x3 groups": "#2e8b57", "3x3 stride 2": "#d1495b", "1x1": "#e0a030"}
OTHER_KINDS, OTHER = "other", "#9a9a9a"


def page(result: Result) -> str:
    """docs/paper.md."""
    height, width = result["image_size"]
    text = INTRODUCTION.format(**result["machine"], height=height, width=width)
    return text + "\n".join(table.markdown() for table in page_tables(result))


def text(result: Result) -> str:
    """benchmarks/results/paper.txt."""
    machine = result["machine"]
    head = [
        f"$ {result['command']}",
        f"{machine['processor']}, {machine['cores']} cores, ONNX Runtime {machine['onnxruntime']}",
    ]
    return "\n".join([*head, "", *(table.text() for table in text_tables(result))])


def draw(result: Result, target: Path) -> None:
    """Three panels, as SVG."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "paper"
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    _draw_speed(left, result)
    _draw_memory(middle, result)
    _draw_layers(right, result)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def _draw_speed(axes: Axes, result: Result) -> None:
    names = list(plain_keys(result))
    batches = list(result["speed"][names[0]])
    reference = TABLE_4[result["reference"]].images_per_second
    for offset, (batch, colour) in enumerate(zip(batches, ("first", "second"), strict=True)):
        found = [result["speed"][name][batch] for name in names]
        middle = [one["median"] for one in found]
        errors = [
            [one["median"] - one["low"] for one in found],
            [one["high"] - one["median"] for one in found],
        ]
        places = [index + 0.27 * (offset - 1) for index in range(len(names))]
        axes.bar(places, middle, 0.27, yerr=errors, color=COLOURS[colour],
                 error_kw={"linewidth": 0.8}, label=f"here, batch {batch}")  # fmt: skip
    paper = [TABLE_4[name].images_per_second / reference for name in names]
    places = [index + 0.27 for index in range(len(names))]
    axes.bar(places, paper, 0.27, color=COLOURS["paper"], label="paper, 1080 Ti, batch 128")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel(f"times as fast as {result['reference']}")
    axes.set_title("Speed in float32", fontsize=9)
    axes.legend(fontsize=7)


def _draw_memory(axes: Axes, result: Result) -> None:
    names = list(plain_keys(result))
    series: dict[str, tuple[str, str, str]] = {
        "train form, as written": (TRAIN, "computed", COLOURS[TRAIN]),
        "deploy or only form, as written": (DEPLOY, "computed", COLOURS["first"]),
        "deploy or only form, by default": (DEPLOY, "default", COLOURS["second"]),
    }
    for offset, (label, (form, kind, colour)) in enumerate(series.items()):
        values = [_megabytes(result, name, form, kind) for name in names]
        places = [index + 0.27 * (offset - 1) for index in range(len(names))]
        axes.bar(places, values, 0.27, color=colour, label=label)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("MB an image")
    axes.set_title("Peak activation memory", fontsize=9)
    axes.legend(fontsize=7)


def _megabytes(result: Result, name: str, form: str, kind: str) -> float:
    """Zero for the train form of a network that has only one form."""
    networks = result["networks"]
    if f"{name} {form}" not in networks and form == TRAIN:
        return 0.0
    found = networks.get(f"{name} {form}", networks.get(name))["memory"]
    return float(found[kind] / found["batch"] / 1e6)


def _draw_layers(axes: Axes, result: Result) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for found in result["layers"].values():
        for one in found["layers"]:
            groups.setdefault(_colour_group(one["kind"]), []).append(one)
    for kind in (*KINDS, OTHER_KINDS):
        layers = groups.get(kind, [])
        axes.plot(
            [one["macs"] / one["bytes"] for one in layers],
            [one["macs"] / one["ms"] / 1e6 for one in layers],
            "o",
            markersize=3,
            color=KINDS.get(kind, OTHER),
            label=kind,
        )
    best, stream = result["best_gmac_per_s"], result["streamed_gb_per_s"]
    ridge = best / stream
    axes.plot([ridge / 100, ridge, ridge * 100], [best / 100, best, best], color="grey",
              linewidth=0.8, linestyle=":", label="memory, fastest layer")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-accumulates a byte")
    axes.set_ylabel("GMAC/s")
    axes.set_title("Every layer, batch 1", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")


def _colour_group(kind: str) -> str:
    if kind.endswith("groups") and kind.startswith("3x3"):
        return "3x3 groups"
    return kind if kind in KINDS else OTHER_KINDS
