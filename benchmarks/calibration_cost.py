"""What calibration costs at 224 x 224: seconds beside one float pass, and peak memory.

    python benchmarks/calibration_cost.py
    python benchmarks/calibration_cost.py --b3

The bundled A0's weights, run at 224 x 224 on images of textures.py, as many as ``--counts`` says.
``float`` is one pass over the images in ONNX Runtime; the other rows make a Q/DQ graph. Every
figure comes from a fresh process, one after the other. ``--memory-gib`` caps a process's address
space; what does not fit ends as "out of memory". ``--b3`` is our quantizer alone, on a B3 with
random weights, 111 million parameters.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import onnx
import textures
import torch
from modelopt_environment import open_modelopt
from quantizer_job import Job
from quantizer_run import Cost, Failure, run
from torch import nn

from exporter.onnx_export import export_onnx
from models.checkpoint import load_checkpoint
from models.fusion import reparameterize
from models.registry import bundled_weights
from models.repvgg import RepVGG
from models.variants import find_variant

RESULTS = Path(__file__).parent / "results"
SIZE = 224
FLOAT = "float"
OURS = "ours full"
METHODS = (
    OURS,
    "onnxruntime MinMax",
    "onnxruntime Percentile",
    "onnxruntime Entropy",
    "modelopt max",
    "modelopt entropy",
)
_GENERATED = 64


def write_images(path: Path, count: int) -> None:
    """``count`` different images, float32 ``[count, 3, SIZE, SIZE]`` and nothing else."""
    with path.open("wb") as file:
        for start in range(0, count, _GENERATED):
            some = min(_GENERATED, count - start)
            textures.images("calibration", some, start=start, size=SIZE)[0].tofile(file)


def trained_a0() -> onnx.ModelProto:
    """The bundled A0 at another image size than it was trained at."""
    bundled = bundled_weights("A0")
    assert bundled is not None
    network = reparameterize(load_checkpoint(bundled.checkpoint).module)
    assert isinstance(network, RepVGG)
    return export_onnx(network, (SIZE, SIZE), {})


def random_b3() -> onnx.ModelProto:
    """B3 with kernels of He et al.'s initialization, which keeps activations at one size."""
    torch.manual_seed(0)
    network = RepVGG(find_variant("B3"), deploy=True).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return export_onnx(network, (SIZE, SIZE), {})


def measured(
    model: onnx.ModelProto, count: int, methods: Sequence[str], memory_gib: int, python: Path | None
) -> Iterator[tuple[str, Cost | Failure]]:
    """Each method's cost on ``count`` images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, images = folder / "float.onnx", folder / "images.f32"
        onnx.save(model, source)
        write_images(images, count)
        for method in methods:
            job = Job(
                method=method,
                source=str(source),
                target=str(folder / "quantized.onnx"),
                images=str(images),
                shape=(count, 3, SIZE, SIZE),
                address_space_mib=memory_gib << 10,
            )
            yield method, run(job, python)


def cell(cost: Cost | Failure, reference: Cost | Failure) -> str:
    """Seconds, the ratio to the float pass, MiB."""
    if isinstance(cost, Failure):
        return f"{cost.reason:>29}"
    ratio = cost.seconds / reference.seconds if isinstance(reference, Cost) else float("nan")
    return f"{cost.seconds:9.1f}{ratio:9.1f}{cost.peak_mib:11.0f}"


def table(costs: dict[int, dict[str, Cost | Failure]]) -> Iterator[str]:
    """One row a method, three columns a number of images."""
    yield f"{'':24}" + "".join(f"{f'{count} images':>29}" for count in costs)
    yield f"{'':24}" + f"{'s':>9}{'x float':>9}{'peak MiB':>11}" * len(costs)
    for method in next(iter(costs.values())):
        cells = (cell(found[method], found[FLOAT]) for found in costs.values())
        yield f"{method:24}" + "".join(cells)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 512], metavar="IMAGES")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--memory-gib", type=int, default=16)
    parser.add_argument("--b3", action="store_true", help="ours on B3 with random weights")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def command_line(args: argparse.Namespace) -> str:
    """The command that makes the same results."""
    words = ["python", "benchmarks/calibration_cost.py"]
    for name in ("counts", "methods", "memory_gib"):
        value = getattr(args, name)
        if value != build_parser().get_default(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(str(value) for value in values)]
    return shlex.join([*words, "--b3"] if args.b3 else words)


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    counts, methods = ([64], [OURS]) if args.b3 else (args.counts, args.methods)
    model = random_b3() if args.b3 else trained_a0()
    python = open_modelopt(methods)
    costs: dict[int, dict[str, Cost | Failure]] = {}
    for count in counts:
        costs[count] = {}
        for method, cost in measured(model, count, [FLOAT, *methods], args.memory_gib, python):
            costs[count][method] = cost
            print(f"{count} images, {method}:{cell(cost, costs[count][FLOAT])}", flush=True)
    title = f"{'B3, random weights' if args.b3 else 'A0'}, {SIZE} x {SIZE}, float32 images"
    command = command_line(args)
    limit = f"address space of each process: at most {args.memory_gib} GiB"
    text = "\n".join([f"$ {command}", title, limit, "", *table(costs)])
    print(f"\n{text}")
    stem = args.out / f"calibration_cost{'_b3' if args.b3 else ''}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".txt").write_text(f"{text}\n")
    found = {str(n): {name: asdict(cost) for name, cost in row.items()} for n, row in costs.items()}
    record = {"command": command, "memory_gib": args.memory_gib, "costs": found}
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
