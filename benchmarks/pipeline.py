"""The whole road from a checkpoint and images to INT8, beside the peers' road.

    make benchmark-pipeline

Every side gets the same checkpoint and the same PNG files, and runs in a fresh process of its own,
one after the other, all sides once before any side again (``--repeats``; the fastest run counts).
Ours is the command ``repvgg-export engine`` with an empty stage cache, and once more with the cache
it left and another target. What a peer does, pipeline_child.py says. Neither makes an engine nor
compares anything with the original network; ours does both, and ``parity on N`` is ours comparing
on so many images, not on up to 512. A side that passes ``--memory-gib`` or ``--time-limit`` is
stopped, and its figures are lower bounds. ``--cases A0:512 --keep`` measures one case again. Images
are made once, under build/. Writes benchmarks/results/pipeline.json, pipeline.txt and
docs/speed.md; ``--quick`` is for the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import textures_files
from machine import machine
from measured_process import Limits, Usage, measure
from modelopt_environment import VERSION, open_modelopt
from pipeline_table import AGAIN, FEW, OURS, Result, page, text
from quantizer_run import Failure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "speed.md"
CHILD = ROOT / "benchmarks" / "pipeline_child.py"
BUILD = ROOT / "build" / "pipeline"
FEW_IMAGES = 64
PEERS = ("onnxruntime Entropy", "onnxruntime MinMax", "modelopt entropy")
METHODS = (OURS, AGAIN, FEW, *PEERS)
CASES = (("A0", 64), ("A0", 512), ("A0", 2048), ("B3", 64))
TARGET, OTHER_TARGET = "sm86", "sm89"
# The user's, which a measurement must not inherit: each side decides for itself.
_THREADS = ("OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What all sides are given."""

    variant: str
    weights: Path
    images: Path
    count: int
    size: int
    folder: Path


def ours(task: Task, *, target: str, evaluation: int = 512) -> list[str]:
    options = {
        "--weights": task.weights,
        "--calib": task.images,
        "--calib-images": task.count,
        "--evaluation": task.images,
        "--evaluation-images": min(evaluation, task.count),
        "--image-size": task.size,
        "--min-agreement": 0,  # random weights know no classes, so a tie is no failure
        "--target": target,
        "--out": task.folder / "bundle",
    }
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, "-m", "exporter", "engine", task.variant, *words, "--json", "--quiet"]


def peers(task: Task, method: str, python: Path) -> list[str]:
    road = {
        "method": method,
        "variant": task.variant,
        "weights": str(task.weights),
        "images": str(task.images),
        "count": task.count,
        "size": task.size,
        "folder": str(task.folder),
    }
    return [str(python), str(CHILD), json.dumps(road)]


def run(method: str, task: Task, limits: Limits, modelopt: Path | None) -> Usage | Failure:
    cache = task.folder / "cache"
    environment = {k: v for k, v in os.environ.items() if k not in _THREADS}
    environment |= {"PYTHONPATH": str(ROOT), "REPVGG_EXPORT_CACHE": str(cache)}
    if method != AGAIN:
        shutil.rmtree(cache, ignore_errors=True)
    if method == OURS:
        command = ours(task, target=TARGET)
    elif method == AGAIN:
        command = ours(task, target=OTHER_TARGET)
    elif method == FEW:
        command = ours(task, target=TARGET, evaluation=FEW_IMAGES)
    elif not method.startswith("modelopt"):
        command = peers(task, method, Path(sys.executable))
    elif modelopt is None:
        return Failure(reason="not installed")
    else:
        command = peers(task, method, modelopt)
    return measure(command, limits, environment)


def record(found: Usage | Failure) -> dict[str, Any]:
    """For the result; of our own side also the seconds of every stage."""
    if isinstance(found, Failure):
        return {"failure": found.reason}
    figures: dict[str, Any] = {
        name: round(getattr(found, name), 2)
        for name in ("wall_s", "cpu_s", "peak_mib", "own_peak_mib", "others")
    }
    figures["stopped"] = found.stopped
    if found.stopped is None and found.stdout.startswith("{"):
        figures["stages"] = json.loads(found.stdout)["seconds"]
    return figures


def faster(one: dict[str, Any] | None, other: dict[str, Any]) -> dict[str, Any]:
    """The run that counts: the one of less wall time, and any before a failure."""
    if one is None or "failure" in one:
        return other
    return one if "failure" in other or one["wall_s"] <= other["wall_s"] else other


def rows(args: argparse.Namespace, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row a case and method, in the order of the table."""
    limits = Limits(memory_mib=args.memory_gib * 1024, seconds=args.time_limit)
    modelopt = open_modelopt(methods)
    for variant, count in args.cases:
        images = textures_files.folder(BUILD, args.files, args.size * 8 // 7)
        best: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            task = Task(
                variant=variant,
                weights=weights(variant),
                images=images,
                count=count,
                size=args.size,
                folder=Path(folder),
            )
            wanted = [m for m in methods if m != FEW or count > FEW_IMAGES]
            for method in wanted * args.repeats:
                found = record(run(method, task, limits, modelopt))
                best[method] = faster(best.get(method), found)
                print(f"{variant} {count} {method}: {json.dumps(found)}", flush=True)
        for method in wanted:
            yield {
                "variant": variant,
                "images": count,
                "method": method,
                "limit_gib": args.memory_gib,
                **best[method],
            }


def weights(variant: str) -> Path:
    """A checkpoint with random weights in train form, made once: the road is as long on any."""
    target = BUILD / f"{variant}.safetensors"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(CHILD), "prepare", variant, str(target)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return target


def case(words: str) -> tuple[str, int]:
    variant, _, count = words.partition(":")
    return variant, int(count)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", type=case, nargs="+", default=list(CASES), metavar="MODEL:IMAGES"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--files", type=int, default=2048, help="image files to choose from")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--memory-gib", type=float, default=18)
    parser.add_argument("--time-limit", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--quick", action="store_true", help="16 small images, one peer, no page")
    parser.add_argument(
        "--keep", action="store_true", help="leave the other cases of the result as they are"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def kept(out: Path, cases: Sequence[tuple[str, int]]) -> Result:
    """The result in ``out`` without the rows of ``cases``."""
    found: Result = json.loads((out / "pipeline.json").read_text())
    rows = [row for row in found["rows"] if (row["variant"], row["images"]) not in cases]
    return {**found, "rows": rows}


def in_order(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By network, number of images and METHODS, in whatever order they were measured."""
    return sorted(
        rows, key=lambda row: (row["variant"], row["images"], METHODS.index(row["method"]))
    )


def write(result: Result, out: Path) -> None:
    """The result as JSON and text in ``out``; where that is the repository's folder, the page."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "pipeline.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "pipeline.txt").write_text(text(result))
    if out == RESULTS:
        PAGE.write_text(page(result), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    args = build_parser().parse_args(words)
    if args.quick:
        args.cases, args.files, args.size = [("A0", 16)], 16, 56
        args.methods = [OURS, AGAIN, PEERS[0]]
    before = kept(args.out, args.cases) if args.keep else {"commands": [], "rows": []}
    command = shlex.join(["python", "benchmarks/pipeline.py", *words])
    result: Result = {
        "commands": list(dict.fromkeys([*before["commands"], command])),
        "machine": {
            **machine("onnxruntime", "onnxsim", "torch"),
            "modelopt": VERSION,
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        },
        "limit_s": args.time_limit,
        "size": args.size,
        "repeats": args.repeats,
        "rows": [],
    }
    made: list[dict[str, Any]] = []
    for row in rows(args, args.methods):
        made.append(row)
        result["rows"] = in_order([*before["rows"], *made])
        write(result, args.out)  # each time, so that an interrupted run keeps what it has
    print(text(result))
    return 0


if __name__ == "__main__":
    # As Ctrl-C does: what is being measured ends with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())
