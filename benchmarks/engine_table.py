"""What is in the engines: every precision, model and target in one table.

    make engine-table

Each network is exported once for each precision, and then `repvgg-export build` makes its engine
for every target that can do the precision, and one plan for all of these together. The figures are
those of `engine.json`; the seconds are those of one build on this machine, the start of the
builder's process included. B1g4 has random weights: what an engine contains does not depend on
them. Writes benchmarks/results/engines.json and docs/engines.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from exporter.bundle import ENGINE_SUMMARY, Bundle
from exporter.device import build_engine
from exporter.engine import get_backend
from exporter.spec import Precision

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "engines.json"
PAGE = HERE.parent / "docs" / "engines.md"
MODELS = {"A0": (), "B1g4": ("--weights", "random")}
PRECISIONS = (Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8)
PORTABLE = "portable"
FEW_IMAGES = ("--calib-images", "32", "--evaluation-images", "16")
"""Enough for ranges that the engine's contents do not depend on."""

INTRODUCTION = """# What the engines contain

Made by `make engine-table` ([benchmarks/engine_table.py](../benchmarks/engine_table.py)):
TensorRT-RTX {version} on {cores} CPU cores without a GPU, 224 x 224 pixels, batch 1:8:32. Every
row is an engine that was built and passed its gate; the figures are read from the builder's own
layer table and stand in each bundle's `engine.json`. *Portable* is one plan for all targets above
it: the builder optimizes it once, for what all of them can do. *Fused* counts the convolutions
whose own kernel also adds the bias, applies the ReLU and, where the next one is quantized,
requantizes; *others* are all kernels that are not convolutions. Seconds are those of one build on
a shared machine. How fast an engine runs is not in the table: no GPU was at hand.
"""


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Build everything, one row an engine; MODELS and PRECISIONS say what."""
    cells = [(model, precision) for model in MODELS for precision in PRECISIONS]
    for model, precision in track(cells, description="engines"):
        path = _export(model, precision, folder / f"{model}-{precision}")
        targets = get_backend("tensorrt-rtx").supported_targets(precision)
        for target in (*targets, PORTABLE):
            yield _build(path, model, precision, target, targets)


def _export(model: str, precision: Precision, out: Path) -> Path:
    command = [sys.executable, "-m", "exporter", "engine", model, "--precision", str(precision)]
    subprocess.run(
        [*command, *MODELS[model], *FEW_IMAGES, "--out", str(out), "--quiet", "--json"],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return out


def _build(
    path: Path, model: str, precision: Precision, target: str, targets: tuple[str, ...]
) -> dict[str, Any]:
    bundle = Bundle.load(path)
    asked = ",".join(targets) if target == PORTABLE else target
    start = time.perf_counter()
    built = build_engine(bundle, backend="tensorrt-rtx", target=asked)
    seconds = time.perf_counter() - start
    engine = json.loads((built.path / ENGINE_SUMMARY).read_text("utf-8"))
    keys = ("convolutions", "epilogue_fused", "other_kernels", "plan_bytes",
            "activation_memory_bytes")  # fmt: skip
    return {
        "model": model,
        "precision": str(precision),
        "target": target,
        "targets": engine["targets"],
        "version": engine["version"],
        "build_seconds": round(seconds, 2),
        **{key: engine[key] for key in keys},
    }


def page(result: dict[str, Any]) -> str:
    """docs/engines.md: one table a model."""
    text = INTRODUCTION.format(version=result["version"], cores=result["cores"])
    for model in dict.fromkeys(row["model"] for row in result["engines"]):
        text += f"\n## RepVGG-{model}\n\n"
        text += "| precision | target | plan MB | build s | convolutions | fused | others | "
        text += "activations MB |\n|---|---|---|---|---|---|---|---|\n"
        text += "".join(_line(row) for row in result["engines"] if row["model"] == model)
    return text


def _line(row: dict[str, Any]) -> str:
    counts = row["convolutions"]
    kinds = [f"{n} {kind}" for kind, n in counts.items() if kind != "total" and n]
    cells = [
        row["precision"],
        row["target"],
        f"{row['plan_bytes'] / 1e6:.1f}",
        f"{row['build_seconds']:.1f}",
        ", ".join(kinds),
        f"{row['epilogue_fused']} of {counts['total']}",
        str(row["other_kernels"]),
        f"{row['activation_memory_bytes'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engines = list(rows(Path(folder)))
    result = {
        "version": engines[0]["version"],
        "cores": os.cpu_count(),
        "engines": engines,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    PAGE.write_text(page(result), encoding="utf-8")
    print(f"{len(engines)} engines: {PAGE}")


if __name__ == "__main__":
    main()
