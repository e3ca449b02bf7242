"""INT8 quality beside ONNX Runtime's and Model Optimizer's quantizers: same model, same images.

    python benchmarks/int8_quality.py

Two trained networks, each as trained and with every channel of every boundary rescaled by
2^U(-3, 3), which changes no float result (int8_cases.py). Every quantizer gets the same calibration
images and works in a fresh process, one after the other; its Q/DQ graph runs in ONNX Runtime here,
on the same test images, and is compared with the float graph's logits.

Two rows are controls and have to come out worse than the row they are named after: calibration on
noise, and one weight scale per tensor without equalization; with it, per-tensor weights lose
little. ``--quick`` is a smoke test: few images, no installation, fewer rows.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from int8_cases import CASES, Case, noise_like
from modelopt_environment import VERSION, UnavailableError, modelopt_python
from quantizer_job import Job
from quantizer_run import Cost, Failure, run

from exporter.running.onnx_runner import OnnxRunner

FloatArray = npt.NDArray[np.float32]
RESULTS = Path(__file__).parent / "results" / "int8_quality"
CONTROLS = ("ours full, noise calibration", "ours minmax, per-tensor weights")
OURS = ("minmax", "percentile", "mse", "entropy", "equalize", "full", "wide")
PEERS = (
    *(f"onnxruntime {method}" for method in ("MinMax", "Percentile", "Entropy")),
    *(f"modelopt {method}" for method in ("max", "entropy")),
)
QUICK = ("onnxruntime MinMax", "ours minmax", "ours full", *CONTROLS)
ALL = (
    *PEERS,
    *(f"ours {recipe}" for recipe in OURS),
    "ours full, per-tensor weights",
    *CONTROLS,
)
HEADER = f"{'':32}{'top-1 %':>9}{'agree %':>9}{'SQNR dB':>9}{'seconds':>9}{'memory MiB':>12}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How a quantized graph's logits compare with the float graph's; the shares in percent."""

    top1: float
    agreement: float
    sqnr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One quantizer on one version of one network: both results, or neither."""

    name: str
    quality: Quality | None
    cost: Cost | None
    failure: str = ""

    def __str__(self) -> str:
        if self.quality is None or self.cost is None:
            return f"{self.name:32}  {self.failure}"
        return (
            f"{self.name:32}{self.quality.top1:9.2f}{self.quality.agreement:9.2f}"
            f"{self.quality.sqnr_db:9.1f}{self.cost.seconds:9.1f}{self.cost.peak_growth_mib:12.0f}"
        )


def compared(reference: FloatArray, found: FloatArray, labels: npt.NDArray[np.int64]) -> Quality:
    """Both logits ``[N, classes]``."""
    noise = float(np.sum((reference - found).astype(np.float64) ** 2))
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    return Quality(
        top1=100 * float(np.mean(found.argmax(1) == labels)),
        agreement=100 * float(np.mean(found.argmax(1) == reference.argmax(1))),
        sqnr_db=10 * math.log10(signal / noise) if noise else math.inf,
    )


def measured(
    case: Case, source: Path, reference: FloatArray, jobs: Sequence[Job], modelopt: Path | None
) -> Iterator[Row]:
    """A row for each job, whose method is the row's name."""
    for job in jobs:
        name = job.method
        done = run(replace(job, method=name.partition(",")[0], source=str(source)), modelopt)
        if isinstance(done, Failure):
            yield Row(name=name, quality=None, cost=None, failure=done.reason)
        else:
            found = OnnxRunner(Path(job.target))(case.test)
            yield Row(name=name, quality=compared(reference, found, case.labels), cost=done)


def jobs_for(case: Case, names: Sequence[str], folder: Path) -> list[Job]:
    """The same images for all, written once; the words after a name's comma say what differs."""
    real, noise = folder / "calibration.f32", folder / "noise.f32"
    case.calibration.tofile(real)
    noise_like(case.calibration).tofile(noise)
    count, channels, height, width = case.calibration.shape
    return [
        Job(
            method=name,
            source="",
            target=str(folder / "quantized.onnx"),
            images=str(noise if name.endswith("noise calibration") else real),
            shape=(count, channels, height, width),
            per_tensor_weights=name.endswith("per-tensor weights"),
        )
        for name in names
    ]


def measure_case(case: Case, names: Sequence[str], modelopt: Path | None) -> Iterator[Any]:
    """Lines of text as they come, and at the end the case as JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = jobs_for(case, names, folder)
        versions = []
        for version, model in case.versions.items():
            source = folder / "float.onnx"
            onnx.save(model, source)
            reference = OnnxRunner(source)(case.test)
            top1 = 100 * float(np.mean(reference.argmax(1) == case.labels))
            yield f"\n{case.name}, {version}: float top-1 {top1:.2f} %"
            yield HEADER
            rows = []
            for row in measured(case, source, reference, jobs, modelopt):
                yield str(row)
                rows.append(row)
            versions.append(
                {"version": version, "float_top1": top1, "rows": [asdict(row) for row in rows]}
            )
    yield {
        "name": case.name,
        "calibration_images": len(case.calibration),
        "test_images": len(case.test),
        "versions": versions,
    }


def broken_controls(cases: Sequence[dict[str, Any]]) -> list[str]:
    """The controls that are not worse than the row they are named after, in words."""
    found = []
    for case in cases:
        for version in case["versions"]:
            rows = {row["name"]: row["quality"] for row in version["rows"]}
            for control in CONTROLS:
                worse, better = rows[control], rows[control.partition(",")[0]]
                if not (worse and better and worse["sqnr_db"] < better["sqnr_db"]):
                    found.append(f"{case['name']}, {version['version']}: {control} is not worse")
    return found


def open_modelopt(names: Sequence[str]) -> tuple[Path | None, str]:
    """Model Optimizer's interpreter where it is wanted and can be had, and a line about it."""
    if not any(name.startswith("modelopt") for name in names):
        return None, "Model Optimizer: left out"
    try:
        return modelopt_python(), f"Model Optimizer {VERSION}"
    except UnavailableError as error:
        return None, str(error)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="few images and rows, no installation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="OUT.txt and OUT.json")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    names = QUICK if args.quick else ALL
    calibration_images, test_images = (32, 96) if args.quick else (256, 3200)
    command = "python benchmarks/int8_quality.py"
    command += f" --models {' '.join(args.models)}" if args.models != list(CASES) else ""
    command += " --quick" if args.quick else ""
    modelopt, about = open_modelopt(names)
    started = time.perf_counter()
    lines = [
        f"$ {command}",
        f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}, {about}",
        "seconds and memory: of the quantizer's work alone, each in a fresh process; memory is the",
        "highest resident set less that before the work",
    ]
    print("\n".join(lines), flush=True)
    cases = []
    for name in args.models:
        for found in measure_case(CASES[name](calibration_images, test_images), names, modelopt):
            if isinstance(found, str):
                print(found, flush=True)
                lines.append(found)
            else:
                cases.append(found)
    broken = broken_controls(cases)
    last = [*broken] or ["controls: both are worse everywhere"]
    print("\n".join(["", *last]), f"\n{time.perf_counter() - started:.0f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".txt").write_text("\n".join([*lines, "", *last]) + "\n")
    about_run = {"command": command, "onnxruntime": onnxruntime.__version__, "modelopt": about}
    args.out.with_suffix(".json").write_text(
        json.dumps({**about_run, "cases": cases}, indent=1) + "\n"
    )
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
