"""Did the command end as it should? What is expected of every run, whatever it was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_cases import Case
from safetensors import safe_open

from exporter.bundle import UNLISTED, Bundle

CPU_SECONDS = 60
PATIENCE_S = 240
"""On the clock: a shared machine is slow, and what hangs takes no time of a processor."""
GIGABYTE = 1 << 30
_MOST_LINES = 3
_MOST_CHARACTERS = 4000
_STARTS = ("repvgg-export: ", "the report of the failure: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a case ended; ``memory`` is in bytes, above that of the same command on a right file.

    ``cpu_seconds`` are those of all cores together.
    """

    code: int | None
    signal: int | None
    timed_out: bool
    seconds: float
    cpu_seconds: float
    memory: int
    stderr: str
    stdout: str = ""


def ending(answer: Mapping[str, Any], folder: Path, usual_peak: int) -> Ending:
    """The server's answer as an Ending."""
    return Ending(
        code=answer["code"],
        signal=answer["signal"],
        timed_out=answer["timed_out"],
        seconds=answer["seconds"],
        cpu_seconds=answer["cpu_seconds"],
        memory=max(0, answer["peak_bytes"] - usual_peak),
        stderr=(folder / "stderr").read_bytes().decode("utf-8", "backslashreplace"),
        stdout=(folder / "stdout").read_bytes().decode("utf-8", "backslashreplace"),
    )


def faults(case: Case, end: Ending, canary: Path) -> list[str]:
    """Everything that is wrong with this ending; empty if it is as promised."""
    return [*_process_faults(end), *_word_faults(end), *_output_faults(case, end, canary)]


def _process_faults(end: Ending) -> Iterator[str]:
    if end.timed_out:
        yield f"did not end in {PATIENCE_S} s"
    elif end.cpu_seconds > CPU_SECONDS:
        yield f"took {end.cpu_seconds:.0f} s"
    elif end.signal is not None:
        yield f"died of signal {end.signal}"
    elif end.code not in (0, 1, 2, 3):
        yield f"exit code {end.code}"
    if end.memory > GIGABYTE:
        yield f"took {end.memory / GIGABYTE:.1f} GB"


def _word_faults(end: Ending) -> Iterator[str]:
    if "Traceback" in end.stderr or "internal error" in end.stderr:
        yield f"traceback: {end.stderr.strip().splitlines()[-1][:200]}"
        return
    if "\x1b" in end.stderr + end.stdout:
        yield "the file's escape sequences on the terminal"
    if end.code not in (1, 2, 3):
        return
    lines = end.stderr.removesuffix("\n").split("\n")
    if not 1 <= len(lines) <= _MOST_LINES:
        yield f"{len(lines)} lines on standard error"
    elif not all(line.startswith(_STARTS) for line in lines):
        yield f"standard error starts with {lines[0][:60]!r}, not with the command's name"
    if len(end.stderr) > _MOST_CHARACTERS:
        yield f"{len(end.stderr)} characters on standard error"


def _output_faults(case: Case, end: Ending, canary: Path) -> Iterator[str]:
    if canary.exists():
        yield "code in the file ran"
    if case.out is None:
        return
    beside = {path.name for path in case.out.parent.iterdir()}
    told = {"out.failed.html", "out.failed.json"} if end.code == 1 else set()
    if left := beside - told - {case.out.name}:
        yield f"left {sorted(left)} beside OUT"
    if case.out.exists() != (end.code == 0):
        yield f"exit code {end.code}, and OUT is {'there' if case.out.exists() else 'not there'}"
    elif case.out.exists() and not _is_whole(case.out):
        yield "OUT is not whole"


def _is_whole(out: Path) -> bool:
    if out.is_file():
        with safe_open(out, "pt") as file:
            return bool(file.keys())
    bundle = Bundle.load(out)
    names = {path.name for path in out.iterdir()}
    return not bundle.damaged_files() and names - UNLISTED == bundle.manifest["files"].keys()
