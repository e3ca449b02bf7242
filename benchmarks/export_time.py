"""Wall time of an export, stage by stage, without the environment's installation.

    make benchmark

Each precision runs ``--repeats`` times in fresh processes; the median of each stage is printed.
Timings on a shared machine are noisy: compare stages within one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run_once(model: str, precision: str, out: Path) -> dict[str, float]:
    """Seconds of each stage, and of the whole process under ``process``."""
    command = [sys.executable, "-m", "exporter", "engine", model, "--precision", precision]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", str(out), "--json", "--quiet", "--no-cache"],
        capture_output=True,
        text=True,
        check=True,
    )
    elapsed = time.perf_counter() - start
    return {**json.loads(done.stdout)["seconds"], "process": elapsed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="A0")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16", "int8"):
            out = Path(folder, precision)
            runs = [run_once(args.model, precision, out) for _ in range(args.repeats)]
            medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(f"{args.model} {precision}: process {medians.pop('process'):.1f} s (median of "
                  f"{args.repeats})")  # fmt: skip
            for stage, seconds in medians.items():
                print(f"  {stage:15} {seconds:6.2f} s")


if __name__ == "__main__":
    main()
