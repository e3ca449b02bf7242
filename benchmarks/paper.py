"""The paper's claims on your own machine: docs/paper.md, docs/paper.svg, results/paper.json, .txt.

    make benchmark-paper
    python benchmarks/paper.py --quick --out FOLDER

Train form against deploy form against VGG-16 and ResNet-50 on ONNX Runtime's CPU kernels:
parameters, multiply-accumulates, Winograd's multiplications, latency in turns, peak activation
memory, INT8, and the rate of every layer. Times want a machine that does nothing else.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from convolution_cost import layers_of
from machine import machine
from paper_int8 import QUANTIZERS, int8_kernels, quantized
from paper_layers import layer_speeds, streamed_gb_per_s
from paper_memory import measure
from paper_networks import DEPLOY, TRAIN, PaperNetwork, float_graph, networks
from paper_page import draw, page, text
from paper_tables import Result
from paper_timing import Turns, in_turns, model_steps

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
REFERENCE = "ResNet-50"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What is measured. ``rounds`` has a number of turns for each batch size, first 1."""

    models: tuple[str, ...]
    image_size: tuple[int, int]
    memory_batch: int
    rounds: Mapping[int, int]
    profiled_runs: int


FULL = Effort(
    models=("A0", "A2", "B1g4", "B1", REFERENCE, "VGG-16"),
    image_size=(224, 224),
    memory_batch=8,
    rounds={1: 20, 8: 8},
    profiled_runs=20,
)
QUICK = Effort(
    models=("A0", REFERENCE),
    image_size=(64, 64),
    memory_batch=2,
    rounds={1: 2, 2: 2},
    profiled_runs=3,
)


def export_all(effort: Effort, folder: Path) -> tuple[dict[str, PaperNetwork], dict[str, Path]]:
    """Every network in each of its forms, by key, and where its float graph is."""
    found = {network.key: network for network in networks(effort.models, effort.image_size)}
    files = {key: folder / f"{key.replace(' ', '-')}.onnx" for key in found}
    for key, network in found.items():
        onnx.save(float_graph(network, effort.image_size), files[key])
        _say(f"exported {key}")
    return found, files


def describe(network: PaperNetwork, file: Path, effort: Effort) -> dict[str, Any]:
    """Counts and peak memory of one graph."""
    model = onnx.load(file)
    layers = layers_of(model, 1)
    memory = measure(file, effort.memory_batch, effort.image_size)
    _say(f"memory of {network.key}: {memory.computed / memory.batch / 1e6:.2f} MB an image")
    return {
        "name": network.name,
        "form": network.form,
        "parameters": sum(math.prod(tensor.dims) for tensor in model.graph.initializer),
        "macs": sum(layer.macs for layer in layers),
        "winograd_macs": sum(layer.macs for layer in layers if layer.winograd),
        "multiplications": round(sum(layer.multiplications for layer in layers)),
        "memory": memory.to_json(),
    }


def quantize_all(
    plain: Mapping[str, Path], effort: Effort, folder: Path
) -> dict[str, dict[str, Path]]:
    """For each name of ``plain`` and each quantizer, where the Q/DQ graph is."""
    made: dict[str, dict[str, Path]] = {}
    for name, source in plain.items():
        made[name] = {}
        for quantizer in QUANTIZERS:
            target = folder / f"{name}-{quantizer}.int8.onnx"
            quantized(quantizer, source, target, effort.image_size)
            made[name][quantizer] = target
            _say(f"quantized {name} by {quantizer}")
    return made


def time_all(models: Mapping[str, Path], batch: int, effort: Effort) -> Turns:
    """All ``models`` in turns at one batch size."""
    rounds = effort.rounds[batch]
    steps = model_steps(models, batch, effort.image_size)
    return in_turns(
        steps,
        batch,
        rounds,
        progress=lambda done: _say(f"batch {batch}: round {done} of {rounds}"),
    )


def int8_result(
    made: Mapping[str, Mapping[str, Path]], plain_keys: Mapping[str, str], turns: Turns
) -> dict[str, Any]:
    """Ratios and what really runs in INT8."""
    found: dict[str, Any] = {}
    for name, by_quantizer in made.items():
        found[name] = {}
        for quantizer, file in by_quantizer.items():
            int8, total = int8_kernels(file)
            found[name][quantizer] = {
                "int8_convolutions": int8,
                "convolutions": total,
                "ratio": turns.ratio(file.stem, plain_keys[name]).to_json(),
            }
    return found


def layers_result(plain: Mapping[str, Path], effort: Effort) -> dict[str, Any]:
    """Every layer's time at batch 1, the best rate of all, and how fast memory is."""
    layers, best = {}, 0.0
    for name, file in plain.items():
        speeds, total = layer_speeds(file, 1, effort.image_size, effort.profiled_runs)
        best = max(best, *(speed.gmac_per_s for speed in speeds))
        found = [speed.to_json() for speed in speeds]
        layers[name] = {"total_ms": round(1e3 * total, 3), "layers": found}
        _say(f"profiled {name}")
    return {
        "layers": layers,
        "best_gmac_per_s": round(best, 2),
        "streamed_gb_per_s": round(streamed_gb_per_s(), 2),
    }


def run(effort: Effort, command: str, folder: Path) -> Result:
    """Everything, as the JSON record."""
    found, files = export_all(effort, folder)
    plain_keys = {one.name: key for key, one in found.items() if one.form in (None, DEPLOY)}
    plain = {name: files[key] for name, key in plain_keys.items()}
    described = {key: describe(network, files[key], effort) for key, network in found.items()}
    made = quantize_all(plain, effort, folder)
    int8_files = {file.stem: file for one in made.values() for file in one.values()}
    turns = {
        batch: time_all({**files, **int8_files} if batch == 1 else files, batch, effort)
        for batch in effort.rounds
    }
    for key, one in described.items():
        one["latency"] = {str(b): turn.latency(key).to_json() for b, turn in turns.items()}
    return {
        "command": command,
        "machine": machine("onnxruntime", "torch"),
        "image_size": list(effort.image_size),
        "reference": REFERENCE,
        "networks": described,
        "speed": {
            name: {
                str(b): t.ratio(key, plain_keys[REFERENCE]).to_json() for b, t in turns.items()
            }
            for name, key in plain_keys.items()
        },
        "train": {
            name: {
                str(b): t.ratio(key, f"{name} {TRAIN}").to_json() for b, t in turns.items()
            }
            for name, key in plain_keys.items()
            if f"{name} {TRAIN}" in found
        },
        "int8": int8_result(made, plain_keys, turns[1]),
        **layers_result(plain, effort),
    }  # fmt: skip


def _say(words: str) -> None:
    print(words, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two networks, small images")
    parser.add_argument("--out", type=Path, help="folder for all four files, not the repository's")
    args = parser.parse_args(arguments)
    if args.quick and args.out is None:
        parser.error("--quick needs --out: its figures are no result")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    command = f"python benchmarks/paper.py{' --quick' if args.quick else ''}"
    with tempfile.TemporaryDirectory() as folder:
        result = run(QUICK if args.quick else FULL, command, Path(folder))
        picture = Path(folder, "paper.svg")
        draw(result, picture)
        results, docs = (args.out, args.out) if args.out else (RESULTS, DOCS)
        for place in (results, docs):
            place.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, docs / "paper.svg")
    (results / "paper.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (results / "paper.txt").write_text(text(result), encoding="utf-8")
    (docs / "paper.md").write_text(page(result), encoding="utf-8")
    _say(f"\n{text(result)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
