"""SIGKILL at random moments of exports: what is at OUT, what lies beside it, and who still runs.

    python benchmarks/kill.py --kills 400

After each kill OUT must be a whole bundle, the old one or the new one, or absent; absent only where
it was absent or the system cannot swap two names. Beside it and in the system's temporary folder
lies at most one folder, and no program that the export had started is alive. After the next run
that is left alone nothing lies there at all, and OUT is no longer absent if it had not been before.

Kills are spread over phases. ``whole run`` is any moment from start to end; ``simplify`` and
``engine`` are moments at which another program works; ``publish`` is the writing of the last files
and the replacement of OUT. Each of these exports is a forked process that has imported everything
before; a small network takes the road with the real engine builder, and with the real onnxsim, most
of whose time is its start, in ``simplify`` and every fourth ``whole run``. Then ``file step`` kills
the writing of a bundle, without an export, at its first file operation, its second, and so on to
its last. Every second run has no system call that swaps two names, as on a network file system.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kill_child import FILE_STEP, Run, in_child, write_bundle

from exporter.bundle import MANIFEST, UNLISTED, Bundle
from exporter.bundle.writer import BundleWriter

SHARES = {"whole run": 0.5, "simplify": 0.05, "engine": 0.2, "publish": 0.25}
"""Of the kills of exports."""
_ORPHAN_WAIT_S = 5.0
_OF_ONNXRUNTIME = (".ses", ".cache")
"""Two that it makes on its first start, with or without us, and keeps."""
_GROUP_SHARE = 0.25
"""Of the kills reach the programs that the export has started, too."""
_ALONE_EVERY = 25


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
        names = {path.name for path in self.out.iterdir()} - UNLISTED
        if bundle.damaged_files() or names != set(bundle.manifest["files"]):
            return f"damaged: {bundle.damaged_files()}, {sorted(names)}"
        return str((self.out / MANIFEST).stat().st_ino)


def started(run: Run, place: Place) -> tuple[int, int]:
    """The process and the descriptor on which it tells its stages."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        in_child(run, place.out, place.temporary, place.home, writing)
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


def measured(place: Place, *, simplifier: bool = True) -> dict[str, float]:
    """Seconds of a run that is left alone: of the whole, and of each stage."""
    start = time.monotonic()
    pid, reading = started(Run(phase="none", after=0, simplifier=simplifier), place)
    began = {stage: time.monotonic() for stage in stages_of(reading, start + 300)}
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise SystemExit("the export that is left alone fails")
    moments = [*began.values(), time.monotonic()]
    pairs = zip(began.items(), moments[1:], strict=True)
    seconds = {stage: end - begin for (stage, begin), end in pairs}
    return {**seconds, "whole run": moments[-1] - start}


def killed(run: Run, place: Place, tally: Tally) -> bool:
    """Start, wait for the moment, kill, wait; false if the run had ended before."""
    pid, reading = started(run, place)
    if run.phase == "whole run":
        time.sleep(run.after)
    elif run.phase != FILE_STEP:
        for stage in stages_of(reading, time.monotonic() + 300):
            if stage == run.phase:
                time.sleep(run.after)
                break
    if run.phase != FILE_STEP:
        # Not waited for yet, so the number is still its own.
        tally.programs_running += bool(session(pid))
        (os.killpg if run.group and os.getpgid(pid) == pid else os.kill)(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    require_no_orphans(run, pid, tally)
    return os.WIFSIGNALED(status)


def require_no_orphans(run: Run, pid: int, tally: Tally) -> None:
    """What the killed process had started ends by itself."""
    until = time.monotonic() + _ORPHAN_WAIT_S
    while orphans := session(pid):
        if time.monotonic() > until:
            tally.failures.append(f"{run}: {len(orphans)} programs work on")
            for orphan in orphans:
                os.kill(orphan, signal.SIGKILL)
            return
        time.sleep(0.02)


def check(run: Run, place: Place, before: str, tally: Tally) -> None:
    """Hold what is there against the promises, now and after the start of the next run."""
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
    with BundleWriter(place.out):
        pass
    after = place.state()
    tally.put_back += after != state
    if after not in (state, before) or (before != "absent" and after == "absent"):
        tally.failures.append(f"{run}: {before}, {state}, and after the next run {after}")
    if place.litter():
        tally.failures.append(f"{run}: the next run leaves {place.litter()}")


def one(run: Run, place: Place, tally: Tally) -> bool:
    """Kill one run and check; false if it had ended before."""
    if run.fresh:
        shutil.rmtree(place.out, ignore_errors=True)
    elif not place.out.exists():
        write_bundle(place.out)
    before = place.state()
    if not killed(run, place, tally):
        tally.finished_before += 1
        return False
    tally.kills[run.phase] += 1
    check(run, place, before, tally)
    return True


def exports(
    kills: int, slow: dict[str, float], quick: dict[str, float], dice: random.Random
) -> list[Run]:
    """The runs of `SHARES`, in a random order."""
    planned = []
    for phase, share in SHARES.items():
        for number in range(round(kills * share)):
            simplifier = phase == "simplify" or (phase == "whole run" and number % 4 == 0)
            seconds = (slow if simplifier else quick)[phase]
            planned.append(Run(
                phase=phase, after=dice.uniform(0, seconds), swap=number % 2 == 0,
                group=dice.random() < _GROUP_SHARE, simplifier=simplifier,
                fresh=dice.random() < 0.3,
            ))  # fmt: skip
    dice.shuffle(planned)
    return planned


def campaign(kills: int, seed: int) -> dict[str, Any]:
    """Kill about ``kills`` exports and the writing at every step; what was found."""
    dice, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        place = Place(Path(name))
        measured(place)
        slow, quick = measured(place), measured(place, simplifier=False)
        for number, run in enumerate(exports(kills, slow, quick, dice)):
            one(run, place, tally)
            if number % _ALONE_EVERY == 0:
                measured(place, simplifier=False)
                if place.litter() or place.state().startswith("damaged"):
                    tally.failures.append(f"after a whole run: {place.state()}, {place.litter()}")
        ended = tally.finished_before
        for swap in (True, False):
            for fresh in (True, False):
                step = 1
                while one(Run(phase=FILE_STEP, after=step, swap=swap, fresh=fresh), place, tally):
                    step += 1
        tally.finished_before = ended
    rounded = {stage: round(value, 2) for stage, value in slow.items()}
    return {"seed": seed, "seconds_of_a_run": rounded, **tally.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=400, help="of exports (default: 400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    result = json.dumps(campaign(args.kills, args.seed), indent=2) + "\n"
    print(result, end="")
    if args.results:
        args.results.write_text(result)


if __name__ == "__main__":
    main()
