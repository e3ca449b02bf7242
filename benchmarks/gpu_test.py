"""Everything that needs a GPU, by the commands that a person would use, into one JSON file.

    make gpu-test

Builds, runs, verifies, evaluates and times the bundled A0 at fp16 and int8: each step is one
`repvgg-export ... --json` in a process of its own (`gpu_steps`), and the file says of each its
command, status, exit code, seconds, figures and, where it did not pass, its own sentence. A step
that fails ends nothing but what needs it. Kernels are cached in a folder of this run, so that cold
starts are cold.

Exit code 0 if every step that applies to this GPU passed, 1 if one did not, 3 without a driver:
then nothing is written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gpu_steps import Machine, Status, Step, steps

from exporter.engine.driver import device_name, device_target, driver_lack
from exporter.engine.tensorrt_rtx import TARGETS
from exporter.provenance import created, versions
from models.registry import bundled_weights

RESULT = Path(__file__).parent / "results" / "gpu_test.json"
TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One command that has ended."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float


Run = Callable[[Sequence[str]], Finished]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one step; ``result`` is the kept part of what it printed."""

    step: Step
    status: Status
    reason: str | None = None
    exit_code: int | None = None
    seconds: float | None = None
    result: Mapping[str, Any] | None = None

    @property
    def is_fine(self) -> bool:
        """Whether it passed, or was not to pass on this GPU."""
        return not self.step.applies or self.status in (Status.PASSED, Status.NOT_APPLICABLE)

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return {
            "step": self.step.name,
            "command": " ".join(("repvgg-export", *self.step.arguments, "--json")),
            "applies": self.step.applies,
            "status": self.status.value,
            "reason": self.reason,
            "exit_code": self.exit_code,
            "seconds": self.seconds,
            "result": self.result,
        }


def run_steps(todo: Sequence[Step], run: Run) -> Iterator[Outcome]:
    """Every step's outcome, as soon as it is there."""
    passed: set[str] = set()
    results: dict[str, Mapping[str, Any]] = {}
    for step in todo:
        missing = [name for name in step.needs if name not in passed]
        if missing:
            reason = f"these did not pass: {', '.join(missing)}"
            yield Outcome(step=step, status=Status.SKIPPED, reason=reason)
            continue
        outcome, printed = _outcome(step, run([*step.arguments, "--json"]), results)
        if outcome.status is Status.PASSED:
            passed.add(step.name)
            results[step.name] = printed
        yield outcome


def _outcome(
    step: Step, done: Finished, results: Mapping[str, Mapping[str, Any]]
) -> tuple[Outcome, Mapping[str, Any]]:
    try:
        printed = json.loads(done.stdout)
    except ValueError:
        printed = {}
    if not isinstance(printed, dict):
        printed = {}
    status, reason = Status.PASSED, None
    if done.exit_code != 0:
        status = Status.LACKING if done.exit_code == 3 else Status.FAILED
        words = done.stderr.strip().splitlines()
        reason = printed.get("error") or (words[-1] if words else "it says nothing")
    elif not printed:
        status, reason = Status.FAILED, "it ended with 0 and printed no JSON object"
    else:
        try:
            status, reason = step.judge(printed, results)
        except (KeyError, TypeError, StopIteration) as error:
            status, reason = Status.FAILED, f"its result lacks what was to be judged: {error!r}"
    kept = {key: printed[key] for key in step.keep if key in printed}
    outcome = Outcome(
        step=step,
        status=status,
        reason=reason,
        exit_code=done.exit_code,
        seconds=round(done.seconds, 3),
        result=kept or None,
    )
    return outcome, printed


def document(outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file."""
    return {
        "created": created(),
        "passed": all(outcome.is_fine for outcome in outcomes),
        "counts": {
            status.value: sum(outcome.status is status for outcome in outcomes) for status in Status
        },
        **facts,
        "steps": [outcome.to_json() for outcome in outcomes],
    }


def command_runner(work: Path) -> Run:
    """Runs the command of this environment, its caches inside ``work``."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(work / "cache")}

    def run(arguments: Sequence[str]) -> Finished:
        start = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "exporter", *arguments],
                capture_output=True,
                text=True,
                env=environment,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            words = f"it did not end within {TIMEOUT_S:g} s"
            return Finished(exit_code=-1, stdout="", stderr=words, seconds=TIMEOUT_S)
        return Finished(
            exit_code=done.returncode,
            stdout=done.stdout,
            stderr=done.stderr,
            seconds=time.perf_counter() - start,
        )

    return run


def machine_facts() -> dict[str, Any]:
    """Device, driver and library versions; null where nobody says."""
    cuda = {}
    for name in ("cuda-python", "cuda-bindings", "pycuda"):
        try:
            cuda[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            cuda[name] = None
    return {
        "device": {"name": device_name(), "compute_capability": device_target(), **_smi()},
        "system": {"platform": platform.platform(), "machine": platform.machine()},
        "versions": {**versions(), **cuda},
    }


def _smi() -> dict[str, str | None]:
    """What only NVIDIA's tool tells; Jetsons have none that does."""
    fields = ("driver_version", "memory.total", "clocks.max.sm", "power.limit")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=False))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON file")
    parser.add_argument("--precisions", default="fp16,int8")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each batch size")
    options = parser.parse_args(arguments)
    lack, target = driver_lack(), device_target()
    if lack is not None or target is None:
        reason = lack or "the driver does not name the GPU's compute capability"
        print(f"gpu-test: {reason}; nothing was run or written", file=sys.stderr)
        return 3
    bundled = bundled_weights("A0")
    assert bundled is not None
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as folder:
        todo = steps(
            Machine(target=target, rtx_targets=TARGETS),
            Path(folder),
            bundled.test_images,
            precisions=options.precisions.split(","),
            seconds=options.seconds,
        )
        for outcome in run_steps(todo, command_runner(Path(folder))):
            outcomes.append(outcome)
            words = [f"{outcome.step.name}: {outcome.status.value}", outcome.reason]
            print("; ".join(word for word in words if word), flush=True)
    found = document(outcomes, machine_facts())
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{options.out}: {'passed' if found['passed'] else 'not passed'}")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
