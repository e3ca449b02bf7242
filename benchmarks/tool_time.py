"""Where the wall time of an export goes: imports, forward passes, the builder, onnxsim, the rest.

    python benchmarks/tool_time.py [--model A0] [--precision int8] [--images 64] [--size 64]

Every call that runs a network or a part of one (torch modules, ONNX Runtime sessions) counts as a
forward pass; onnxsim and the engine builder are processes of their own. Imports are measured by
importing the same modules in a fresh process. What is left is the tool itself.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Stopwatch:
    """Wall time by name; what is called within something that counts already counts there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts as ``name``."""

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return function(*arguments, **named)
            self._inside, start = True, time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - start
                self._inside = False

        return timed


def main() -> None:
    """Export once in this process and print where the time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="A0")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--size", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    before = time.perf_counter()
    stopwatch = Stopwatch()
    _instrument(stopwatch)
    from exporter import pipeline
    from exporter.request import ExportRequest, validate

    with tempfile.TemporaryDirectory() as folder:
        spec = validate(
            ExportRequest(
                model=options.model, precision=options.precision, target="sm86",
                weights=None if options.model == "A0" else "random",
                image_size=options.size, calibration_images=options.images,
                evaluation_images=options.images, out=str(Path(folder, "bundle")),
            )
        )  # fmt: skip
        start = time.perf_counter()
        result = pipeline.run(spec)
        run = time.perf_counter() - start
    loaded = time.perf_counter() - before - run
    found = {
        "imports": _imports(),
        "forward passes": stopwatch.seconds["forward passes"],
        "onnxsim": stopwatch.seconds["onnxsim"],
        "builder": stopwatch.seconds["builder"],
    }
    total = run + loaded
    found["the rest"] = total - sum(found.values())
    if options.json:
        print(json.dumps({"total": total, **found, "stages": result.seconds}))
        return
    for name, seconds in {**found, "total": total}.items():
        print(f"{name:15} {seconds:6.2f} s")
    print(", ".join(f"{name} {seconds:.2f}" for name, seconds in result.seconds.items()))


def _instrument(stopwatch: Stopwatch) -> None:
    """Watch what runs networks, onnxsim and the builder, where the road calls them."""
    import onnxruntime
    from torch import nn

    from exporter import float_graph, pipeline

    session = onnxruntime.InferenceSession
    session.run = stopwatch.watch("forward passes", session.run)
    nn.Module.__call__ = stopwatch.watch("forward passes", nn.Module.__call__)
    float_graph.simplify = stopwatch.watch("onnxsim", float_graph.simplify)
    pipeline.build_engine = stopwatch.watch("builder", pipeline.build_engine)


def _imports() -> float:
    """Seconds that a fresh process spends importing what this one has imported."""
    names = [name for name in sys.modules if not name.startswith("_")]
    code = (
        "import sys, time, importlib, contextlib\n"
        "start = time.perf_counter()\n"
        "for name in sys.argv[1:]:\n"
        "    with contextlib.suppress(Exception):\n"
        "        importlib.import_module(name)\n"
        "print(time.perf_counter() - start)\n"
    )
    roots = [name for name in names if "__main__" not in name]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *roots],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
