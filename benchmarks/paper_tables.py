"""The tables of the paper's comparison, from the result of paper.py, as Markdown and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from paper_networks import DEPLOY, TRAIN
from paper_table4 import TABLE_4
from result_table import Table

Result = dict[str, Any]


def plain_keys(result: Result) -> dict[str, str]:
    """Each network's name and the key of the form that is compared with the paper's."""
    found = result["networks"]
    return {one["name"]: key for key, one in found.items() if one["form"] in (None, DEPLOY)}


def trained(result: Result) -> list[str]:
    """The names of the networks that have a train form."""
    return [one["name"] for one in result["networks"].values() if one["form"] == TRAIN]


def spread(ratio: dict[str, Any]) -> str:
    """``1.23 (1.20-1.31)``."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def counts(result: Result) -> Table:
    rows = []
    for name, key in plain_keys(result).items():
        one, paper = result["networks"][key], TABLE_4[name]
        rows.append(
            (
                name,
                f"{one['parameters'] / 1e6:.2f} ({paper.parameters_m:.2f})",
                f"{one['macs'] / 1e9:.2f} ({paper.flops_g})",
                f"{one['multiplications'] / 1e9:.2f} ({paper.wino_muls_g})",
                f"{100 * one['winograd_macs'] / one['macs']:.1f} %",
            )
        )
    return Table(
        title="What is computed",
        note="Counted in the exported graphs, BatchNorm folded; the paper's table 4 in brackets. "
        "*Wino MULs* count 4/9 of the multiply-accumulates of a 3x3 convolution with stride 1, "
        "which is what Winograd's F(2x2, 3x3) needs; the last column is the share of such layers. "
        "ONNX Runtime's CPU kernels do not use it, cuDNN on the paper's GPU does. "
        "The ResNet-50 here has its strides in the 3x3, as today's implementations do; with the "
        "original's in the 1x1 our count gives the paper's 3.9 and 2.8.",
        header=("network", "parameters M", "MACs G", "Wino MULs G", "3x3 stride 1"),
        rows=tuple(rows),
    )


def speeds(result: Result) -> Table:
    batches = next(iter(result["speed"].values())).keys()
    reference = TABLE_4[result["reference"]].images_per_second
    rows = []
    for name, key in plain_keys(result).items():
        latency = result["networks"][key]["latency"]
        rows.append(
            (
                name,
                *(f"{latency[batch]['p50_ms']:.1f}" for batch in batches),
                *(spread(result["speed"][name][batch]) for batch in batches),
                str(TABLE_4[name].images_per_second),
                f"{TABLE_4[name].images_per_second / reference:.2f}",
            )
        )
    return Table(
        title="Speed",
        note=f"Float32. *x {result['reference']}* is how many times as fast a network is, measured "
        "in turns within one process; in brackets the 10th and 90th percentile of the rounds. The "
        "last two columns are the paper's: images a second on a GTX 1080 Ti at batch 128.",
        header=(
            "network",
            *(f"ms, batch {batch}" for batch in batches),
            *(f"x {result['reference']}, batch {batch}" for batch in batches),
            "paper images/s",
            f"paper x {result['reference']}",
        ),
        rows=tuple(rows),
    )


def forms(result: Result) -> Table:
    batches = next(iter(result["speed"].values())).keys()
    rows = []
    for name in trained(result):
        train, deploy = (result["networks"][f"{name} {form}"] for form in (TRAIN, DEPLOY))
        rows.append(
            (
                name,
                f"{train['parameters'] / 1e6:.2f} / {deploy['parameters'] / 1e6:.2f}",
                f"{train['macs'] / 1e9:.2f} / {deploy['macs'] / 1e9:.2f}",
                *(spread(result["train"][name][batch]) for batch in batches),
                f"{train['memory']['computed'] / deploy['memory']['computed']:.2f}",
                f"{train['memory']['default'] / deploy['memory']['default']:.2f}",
            )
        )
    return Table(
        title="Train form against deploy form",
        note="Parameters and multiply-accumulates of train / deploy; then the train form's time "
        "and peak activation memory as multiples of the deploy form's. *As written* every branch "
        "has a tensor of its own (the paper's section 3.1); by *default* ONNX Runtime adds the 3x3 "
        "branch onto the 1x1 branch inside the convolution, so it never holds both.",
        header=(
            "network",
            "parameters M",
            "MACs G",
            *(f"time, batch {batch}" for batch in batches),
            "memory as written",
            "memory by default",
        ),
        rows=tuple(rows),
    )


def memory(result: Result) -> Table:
    rows = []
    for key, one in result["networks"].items():
        found = one["memory"]
        batch = found["batch"]
        kinds = ("computed", "default", "resident", "arena")
        cells = (f"{found[kind] / batch / 1e6:.2f}" for kind in kinds)
        rows.append((key, *cells, found["where"]))
    return Table(
        title="Peak activation memory",
        note="MB an image, weights and inputs not counted. *Computed* is the liveness analysis of "
        "the graph as written ([activation_memory.py](../benchmarks/activation_memory.py)), and "
        "ONNX Runtime without optimizations held the same bytes after every single node. "
        "*Default* is its allocator's count with optimizations, *resident* how far a fresh process "
        "grew in such runs, *arena* the same with the arena, as it runs unless told otherwise. The "
        f"batch was {next(iter(result['networks'].values()))['memory']['batch']}.",
        header=("network", "computed", "default", "resident", "arena", "computed peak at"),
        rows=tuple(rows),
    )


def int8(result: Result) -> Table:
    rows = [
        (
            name,
            quantizer,
            f"{found['int8_convolutions']} of {found['convolutions']}",
            spread(found["ratio"]),
        )
        for name, by_quantizer in result["int8"].items()
        for quantizer, found in by_quantizer.items()
    ]
    return Table(
        title="INT8 on ONNX Runtime",
        note="Time in float32 over time in INT8, batch 1, and how many convolutions ONNX Runtime "
        "really computes with its INT8 kernel. *ours* is the graph that the exporter makes for "
        "TensorRT, with quantizers behind the ReLUs. ONNX Runtime's kernel needs one directly "
        "behind the convolution and computes everything else in float32 between the roundings: "
        "our graph is for engines and for checking them, not for speed on a CPU. *onnxruntime* is "
        "its own `quantize_static`, placed for its kernels, min-max, symmetric, per channel.",
        header=("network", "quantizer", "INT8 convolutions", "float32 / INT8"),
        rows=tuple(rows),
    )


def kinds(result: Result) -> Table:
    best = result["best_gmac_per_s"]
    rows = []
    for name, found in result["layers"].items():
        layers = found["layers"]
        macs, time = sum(one["macs"] for one in layers), found["total_ms"]
        for kind in dict.fromkeys(one["kind"] for one in layers):
            group = [one for one in layers if one["kind"] == kind]
            done, spent = (sum(one[key] for one in group) for key in ("macs", "ms"))
            bound = sum(memory_bound(one, result) for one in group)
            rows.append(
                (
                    name,
                    kind,
                    str(len(group)),
                    f"{100 * done / macs:.1f} %",
                    f"{100 * spent / time:.1f} %",
                    f"{done / spent / 1e6:.0f}",
                    f"{100 * done / spent / 1e6 / best:.0f} %",
                    str(bound),
                )
            )
    return Table(
        title="Where the time goes",
        note="By ONNX Runtime's profiler at batch 1, layers of a kind together; per layer in "
        "[results/paper.txt](../benchmarks/results/paper.txt). The fastest layer of all reached "
        f"{best:.0f} GMAC/s, memory streamed {result['streamed_gb_per_s']:.0f} GB/s: a layer of "
        f"fewer than {best / result['streamed_gb_per_s']:.1f} MACs a byte is counted as "
        "memory-bound. That is where its bytes come from memory; what is still in the last-level "
        "cache may come faster. Layers far from the best that are not memory-bound are limited by "
        "their kernel.",
        header=("network", "kind", "layers", "MACs", "time", "GMAC/s", "of best", "memory-bound"),
        rows=tuple(rows),
    )


def memory_bound(layer: dict[str, Any], result: Result) -> bool:
    """Whether its bytes take longer from memory than its products at the best rate."""
    ridge: float = result["best_gmac_per_s"] / result["streamed_gb_per_s"]
    return bool(layer["macs"] / layer["bytes"] < ridge)


def each_layer(result: Result, name: str) -> Table:
    best = result["best_gmac_per_s"]
    rows = tuple(
        (
            one["name"],
            one["kind"],
            "x".join(map(str, one["weight"])),
            "x".join(map(str, one["output"])) or "-",
            f"{one['macs'] / 1e6:.1f}",
            f"{one['macs'] / one['bytes']:.1f}",
            f"{one['ms']:.3f}",
            f"{one['macs'] / one['ms'] / 1e6:.0f}",
            f"{100 * one['macs'] / one['ms'] / 1e6 / best:.0f} %",
            "yes" if one["winograd"] else "no",
            "yes" if memory_bound(one, result) else "no",
        )
        for one in result["layers"][name]["layers"]
    )
    return Table(
        title=f"Layers of {name}",
        note="At batch 1. *Winograd*: F(2x2, 3x3) can compute it.",
        header=("layer", "kind", "weight", "output", "MMACs", "MACs/byte", "ms", "GMAC/s",
                "of best", "Winograd", "memory-bound"),
        rows=rows,
    )  # fmt: skip


def page_tables(result: Result) -> Iterator[Table]:
    """In the order of the page."""
    yield from (make(result) for make in (counts, speeds, forms, memory, int8, kinds))


def text_tables(result: Result) -> Sequence[Table]:
    """The page's, and every layer of every network."""
    return [*page_tables(result), *(each_layer(result, name) for name in result["layers"])]
