"""SIGKILL at random moments of exports: what is at OUT, what lies beside it, and who still runs.

    python benchmarks/kill.py --kills 400

After each kill OUT must be a whole bundle, the old one or the new one, or absent where it was
absent; beside it and in the system's temporary folder lies at most one folder, and no program that
the export had started is alive. After the next run that is left alone nothing lies there at all.

Kills are spread over phases. ``whole run`` is any moment from start to end; ``simplify`` and
``engine`` are moments at which another program works; ``publish`` is the writing of the last files
and the replacement of OUT; ``file step`` comes exactly at the n-th file operation from there on,
for every n in turn. Each export is a forked process that has imported everything before; a small
network takes the whole road, with the real onnxsim and engine builder. Every second run of a phase
has no system call that swaps two names, as on a network file system.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter import export, pipeline, replacing
from exporter.bundle import MANIFEST, Bundle
from models import RepVGG, Variant

SHARES = {"whole run": 0.4, "simplify": 0.1, "engine": 0.1, "publish": 0.2, "file step": 0.2}
"""Of all kills."""
_STEPS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod",
                    "os.listdir", "shutil.rmtree", "tempfile.mkdtemp", "ctypes.dlsym"})  # fmt: skip
"""Audit events at which `file step` kills; ``ctypes.dlsym`` stands before the swap."""
_ORPHAN_WAIT_S = 5.0
_OF_ONNXRUNTIME = (".ses", ".cache")
"""Two that it makes on its first start, with or without us, and keeps."""
_GROUP_SHARE = 0.25
"""Of the kills reach the programs that the export has started, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One export to be killed: ``after`` is seconds into the phase, or a number of steps."""

    phase: str
    after: float
    swap: bool
    group: bool


@dataclass(slots=True)
class Tally:
    """What was found."""

    kills: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    programs_running: int = 0
    folders_left: int = 0
    put_back: int = 0
    finished_before: int = 0
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "kills": sum(self.kills.values()),
            "kills_by_phase": dict(self.kills),
            "out_after_the_kill": dict(self.found),
            "kills_while_another_program_ran": self.programs_running,
            "temporary_folders_left_and_removed": self.folders_left,
            "old_bundles_put_back": self.put_back,
            "runs_that_ended_before_their_kill": self.finished_before,
            "failures": self.failures,
        }


class Place:
    """The folder around OUT, and a temporary folder and a home of its own."""

    def __init__(self, root: Path) -> None:
        self.out = root / "place" / "bundle"
        self.temporary, self.home = root / "tmp", root / "home"
        for folder in (self.out.parent, self.temporary, self.home):
            folder.mkdir()

    def litter(self) -> list[Path]:
        """Everything but OUT."""
        folders = (self.out.parent, self.temporary, self.home)
        left = [path for folder in folders for path in folder.iterdir() if path != self.out]
        return [path for path in left if path.name not in _OF_ONNXRUNTIME]

    def state(self) -> str:
        """``absent``, ``damaged: ...``, or when the whole bundle was made, by its sha256s."""
        if not self.out.exists():
            return "absent"
        try:
            bundle = Bundle.load(self.out)
        except Exception as error:  # noqa: BLE001 - any of them is a finding
            return f"damaged: {error}"
        names = {path.name for path in self.out.iterdir()} - {MANIFEST}
        if bundle.damaged_files() or names != set(bundle.manifest["files"]):
            return f"damaged: {bundle.damaged_files()}, {sorted(names)}"
        return str((self.out / MANIFEST).stat().st_ino)


def network() -> RepVGG:
    """Eleven convolutions of 16 to 64 channels."""
    torch.manual_seed(0)
    variant = Variant(
        name="small", num_blocks=(2, 3, 4, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125)
    )
    return RepVGG(variant, num_classes=6).eval()


IMAGES = np.random.default_rng(0).normal(size=(16, 3, 32, 32)).astype(np.float32)


def export_in_child(run: Run | None, place: Place, told: int) -> None:
    """Never returns. Stages are told through the descriptor ``told``, one line each."""
    os.setsid()
    os.environ["HOME"] = str(place.home)
    os.environ["TMPDIR"] = tempfile.tempdir = str(place.temporary)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    if run is not None and not run.swap:
        replacing.exchange = lambda _first, _second: False
    real = pipeline.run

    def told_run(spec: Any, *_progress: Any, **options: Any) -> Any:
        def tell(stage: str, fraction: float) -> None:
            if fraction == 0.0:
                os.write(told, f"{stage}\n".encode())
                if stage == "publish" and run is not None and run.phase == "file step":
                    die_at_step(int(run.after))

        return real(spec, tell, **options)

    pipeline.run = told_run
    code = 1
    try:
        torch.set_num_threads(1)
        export(
            network(), example_input=torch.zeros(1, 3, 32, 32), evaluation=IMAGES,
            precision="fp16", targets="sm86", out=place.out,
        )  # fmt: skip
        code = 0
    finally:
        os._exit(code)


def die_at_step(number: int) -> None:
    """End this process by SIGKILL at its ``number``-th file operation from now on."""
    left = [number]

    def count(event: str, _arguments: tuple[Any, ...]) -> None:
        if event in _STEPS:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def started(run: Run | None, place: Place) -> tuple[int, int]:
    """The process and the descriptor on which it tells its stages."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        export_in_child(run, place, writing)
    os.close(writing)
    return pid, reading


def stages_of(descriptor: int, deadline: float) -> Iterator[str]:
    """Names as they come, until the process ends or the time is over."""
    rest = b""
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        content = os.read(descriptor, 4096)
        if not content:
            return
        *lines, rest = (rest + content).split(b"\n")
        yield from (line.decode() for line in lines)


def session(pid: int) -> list[int]:
    """Living processes that ``pid`` started, and theirs."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != pid:
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == pid and fields[0] != "Z":
                found.append(int(path.name))
    return found


def measured(place: Place) -> dict[str, float]:
    """Seconds of a run that is left alone: of the whole, and of each stage."""
    start = time.monotonic()
    pid, reading = started(None, place)
    began = {stage: time.monotonic() for stage in stages_of(reading, start + 300)}
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit("the export that is left alone fails")
    moments = [*began.values(), time.monotonic()]
    seconds = {
        stage: end - begin for (stage, begin), end in zip(began.items(), moments[1:], strict=True)
    }
    return {**seconds, "whole run": moments[-1] - start}


def kill(run: Run, place: Place, tally: Tally) -> bool:
    """Start, wait for the moment, kill, wait; false if the run had ended before."""
    pid, reading = started(run, place)
    if run.phase == "whole run":
        time.sleep(run.after)
    else:
        for stage in stages_of(reading, time.monotonic() + 300):
            if stage == run.phase:
                time.sleep(run.after)
                break
    if run.phase != "file step":
        # Not waited for yet, so the number is still its own.
        tally.programs_running += bool(session(pid))
        (os.killpg if run.group and os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    until = time.monotonic() + _ORPHAN_WAIT_S
    while orphans := session(pid):
        if time.monotonic() > until:
            tally.failures.append(f"{run}: {len(orphans)} programs work on")
            for orphan in orphans:
                os.kill(orphan, signal.SIGKILL)
            break
        time.sleep(0.02)
    return os.WIFSIGNALED(status)


def check(run: Run, place: Place, before: str, tally: Tally) -> None:
    """Hold what is there against the promises."""
    state, litter = place.state(), place.litter()
    kind = "absent" if state == "absent" else "old whole" if state == before else "new whole"
    if state.startswith("damaged"):
        tally.failures.append(f"{run}: {state}")
        kind = "damaged"
    if kind == "absent" and before != "absent" and run.swap:
        tally.failures.append(f"{run}: OUT is absent although two names can be swapped")
    tally.found[kind] += 1
    tally.folders_left += len(litter)
    if len(litter) > 1 or not all(path.is_dir() for path in litter):
        tally.failures.append(f"{run}: left {[path.name for path in litter]}")


def runs(phase: str, count: int, seconds: float, dice: random.Random) -> Iterator[Run]:
    """``count`` runs of one phase; every second one has no swap."""
    for number in range(count):
        after = float(number // 2 + 1) if phase == "file step" else dice.uniform(0, seconds)
        yield Run(
            phase=phase, after=after, swap=number % 2 == 0, group=dice.random() < _GROUP_SHARE
        )


def campaign(kills: int, seed: int, *, alone_every: int = 25) -> dict[str, Any]:
    """Kill ``kills`` exports or a few fewer, and return what was found."""
    dice, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        place = Place(Path(name))
        measured(place)
        seconds = measured(place)
        planned = [
            run
            for phase, share in SHARES.items()
            for run in runs(phase, round(kills * share), seconds.get(phase, 0.0), dice)
        ]
        dice.shuffle(planned)
        for number, run in enumerate(planned, start=1):
            before = place.state()
            if kill(run, place, tally):
                tally.kills[run.phase] += 1
                check(run, place, before, tally)
            else:
                tally.finished_before += 1
            if number % alone_every == 0 or number == len(planned):
                absent = place.state() == "absent" and before != "absent"
                measured(place)
                tally.put_back += absent
                if place.litter() or place.state().startswith("damaged"):
                    tally.failures.append(f"after a whole run: {place.state()}, {place.litter()}")
    rounded = {stage: round(value, 2) for stage, value in seconds.items()}
    return {"seed": seed, "seconds_of_a_run": rounded, **tally.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    result = json.dumps(campaign(args.kills, args.seed), indent=2) + "\n"
    print(result, end="")
    if args.results:
        args.results.write_text(result)


if __name__ == "__main__":
    main()
