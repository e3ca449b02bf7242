"""What `gpu_test` does on a machine with a GPU: one command a step, and how its result is judged.

A step passes if its command ends with 0 and its result holds what the step is about: `verify` must
have run the engine, a warm start must have been warm. Otherwise its status says what happened, and
its reason is the command's own sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

LARGEST_TOP1_DIFFERENCE = 0.01
"""Of the engine from ONNX Runtime on the same graph and images: one point."""


class Status(str, Enum):
    """How a step ended.

    LACKING: the machine lacks something (exit code 3). SKIPPED: a step before it did not pass.
    NOT_APPLICABLE: this library has no such thing.
    """

    PASSED = "passed"
    FAILED = "failed"
    LACKING = "lacking"
    SKIPPED = "skipped"
    NOT_APPLICABLE = "not applicable"


Verdict = tuple[Status, str | None]
Results = Mapping[str, Mapping[str, Any]]
"""What the steps until now printed, by name."""

Judge = Callable[[Mapping[str, Any], Results], Verdict]
PASSED: Verdict = (Status.PASSED, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """``arguments`` of `repvgg-export`, run if all of ``needs`` passed.

    With ``applies`` false it is run and recorded, and its failure is no failure of the whole: what
    it asks is known to be impossible on this GPU, and its sentence is of interest.
    """

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    judge: Judge = lambda _result, _earlier: PASSED
    keep: tuple[str, ...] = ()
    applies: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What decides which steps there are: the GPU's compute capability and who can build for it."""

    target: str
    rtx_targets: Sequence[str]


def engine_ran(result: Mapping[str, Any], _earlier: Results) -> Verdict:
    """`verify`: the engine's row passed."""
    row = next(row for row in result["parity"]["stages"] if row["stage"] == "engine")
    if row["status"] == "pass":
        return PASSED
    failed = row["status"] == "fail"
    return (Status.FAILED if failed else Status.LACKING), str(row["reason"])


def cache_was(state: str) -> Judge:
    """`benchmark`: the start was ``state``."""

    def judge(result: Mapping[str, Any], _earlier: Results) -> Verdict:
        found = result["runtime_cache"]
        if found is None:
            return Status.NOT_APPLICABLE, f"{result['library']} has no runtime cache"
        if found == state:
            return PASSED
        return Status.FAILED, f"the start was {found}, not {state}: {result['note']}"

    return judge


def as_accurate_as(step: str) -> Judge:
    """`evaluate`: the top-1 of the earlier ``step``, within a point."""

    def judge(result: Mapping[str, Any], earlier: Results) -> Verdict:
        own, other = result["top1"], earlier[step]["top1"]
        if abs(own - other) <= LARGEST_TOP1_DIFFERENCE:
            return PASSED
        return Status.FAILED, f"top-1 is {100 * own:.2f} %, ONNX Runtime's {100 * other:.2f} %"

    return judge


def is_built(result: Mapping[str, Any], _earlier: Results) -> Verdict:
    """`engine`: the engine is there and not deferred."""
    engine = result["engine"]
    if engine.get("status") == "deferred":
        return Status.LACKING, f"deferred: {engine['reason']}"
    return PASSED


def steps(
    machine: Machine, work: Path, data: Path, *, precisions: Sequence[str], seconds: float
) -> tuple[Step, ...]:
    """All steps in their order; bundles go to ``work``, ``data`` are labelled images."""
    known = machine.target in machine.rtx_targets
    made: list[Step] = []
    for precision in precisions:
        # TensorRT-RTX builds neither int8 nor anything but half for Turing.
        able = machine.target != "sm75" or precision == "fp16"
        made += _of_bundle(machine, work, data, precision, seconds=seconds, applies=able)
        made += _portable(work, precision, applies=known and able)
    if {"fp16", "int8"} <= set(precisions):
        made += _side_by_side(machine, work, seconds)
    return tuple(made)


_TIMES = (
    "library", "cuda_graph", "runtime_cache", "load_ms", "first_run_ms", "cold_load_ms",
    "cold_first_run_ms", "rows", "note",
)  # fmt: skip


def _of_bundle(
    machine: Machine, work: Path, data: Path, precision: str, *, seconds: float, applies: bool
) -> list[Step]:
    """Export, build, verify, evaluate and time the default network on this GPU."""
    bundle = str(work / f"A0-{precision}")
    timed = ("benchmark", bundle, "--backend", "engine", "--seconds", str(seconds))
    exported, built = (f"export {precision}",), (f"build {precision}",)

    def step(name: str, *arguments: str, **rest: Any) -> Step:
        return Step(
            name=f"{name} {precision}",
            arguments=arguments,
            **{"needs": built, "applies": applies, **rest},
        )

    return [
        step(
            "export", "engine", "A0", "--precision", precision, "--target", machine.target,
            "--out", bundle, needs=(), keep=("verdict", "engine", "notes", "seconds"),
        ),
        # Also where the export built an engine: this is what a device does with a deferred one.
        step("build", "build", bundle, needs=exported, keep=("engine",)),
        step("inspect", "inspect", bundle, needs=exported, keep=("engine", "damaged_files")),
        step("cold start", *timed, judge=cache_was("cold"), keep=_TIMES),
        step("warm start", *timed, judge=cache_was("warm"), keep=_TIMES),
        step("no runtime cache", *timed, "--no-runtime-cache", judge=cache_was("off"), keep=_TIMES),
        step("CUDA graph", *timed, "--cuda-graph", keep=_TIMES),
        step("verify", "verify", bundle, judge=engine_ran, keep=("parity",)),
        step(
            "evaluate on the CPU", "evaluate", bundle, "--data", str(data), "--backend",
            "onnxruntime", needs=exported, keep=("library", "images", "top1", "images_per_second"),
        ),
        step(
            "evaluate", "evaluate", bundle, "--data", str(data), "--backend", "engine",
            needs=(*built, f"evaluate on the CPU {precision}"),
            judge=as_accurate_as(f"evaluate on the CPU {precision}"),
            keep=("library", "images", "top1", "images_per_second", "note"),
        ),
    ]  # fmt: skip


def _portable(work: Path, precision: str, *, applies: bool) -> list[Step]:
    """One plan of TensorRT-RTX for all its targets, tried here whether it knows this GPU or not."""
    bundle = str(work / f"A0-{precision}-portable")
    export = f"export portable {precision}"
    return [
        Step(
            name=export,
            arguments=(
                "engine", "A0", "--precision", precision, "--backend", "tensorrt-rtx", "--out",
                bundle,
            ),
            judge=is_built,
            keep=("verdict", "engine", "notes", "seconds"),
            applies=applies,
        ),
        Step(
            name=f"verify portable {precision}",
            arguments=("verify", bundle),
            needs=(export,),
            judge=engine_ran,
            keep=("parity",),
            applies=applies,
        ),
    ]  # fmt: skip


def _side_by_side(machine: Machine, work: Path, seconds: float) -> list[Step]:
    """int8 against fp16 in turns, as bundled and at the size of ImageNet's networks."""
    applies = machine.target != "sm75"
    made = []
    for size in ("", "-224"):
        bundles = [str(work / f"A0-{precision}{size}") for precision in ("fp16", "int8")]
        needs = ["build fp16", "build int8"]
        if size:
            needs = [f"export {precision}{size}" for precision in ("fp16", "int8")]
            made += [
                Step(
                    name=name,
                    arguments=(
                        "engine", "A0", "--precision", precision, "--image-size", "224",
                        "--target", machine.target, "--out", bundle,
                    ),
                    judge=is_built,
                    keep=("verdict", "engine", "notes", "seconds"),
                    applies=applies or precision == "fp16",
                )
                for name, precision, bundle in zip(needs, ("fp16", "int8"), bundles, strict=True)
            ]  # fmt: skip
        for graph in ((), ("--cuda-graph",)):
            made.append(
                Step(
                    name=" ".join(("int8 / fp16" + size, *graph)),
                    arguments=(
                        "benchmark", bundles[0], "--compare", bundles[1], "--backend", "engine",
                        "--seconds", str(seconds), *graph,
                    ),
                    needs=tuple(needs),
                    keep=("ratios", "first", "second"),
                    applies=applies,
                )
            )  # fmt: skip
    return made
