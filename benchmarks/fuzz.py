"""A fuzz campaign on everything that the command reads: what breaks it, if anything does.

    make fuzz

Files of every kind are made wrong (`corruption` and its kin) and given to the real command, each in
a process of its own (`fuzz_server`), and every ending is judged (`fuzz_judge`): exit code 0 to 3, a
sentence and no traceback, no code of a file run, less than 60 s of processor time and less than
1 GB above what a file in order takes, nothing published in part. The exit code is 1 if anything
failed. ``--case N`` runs one case of a seed and of ``--kinds`` again and keeps its files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz_cases import KINDS, Case, make_case, placed
from fuzz_judge import GIGABYTE, PATIENCE_S, Ending, ending, faults
from fuzz_seeds import Seeds, make_seeds

_SERVER = Path(__file__).with_name("fuzz_server.py")
_MARGIN = 30  # seconds beyond the command's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One case and what it came to."""

    number: int
    case: Case
    end: Ending
    faults: list[str]

    def to_json(self) -> dict[str, Any]:
        """What repeats it and what went wrong."""
        return {
            "case": self.number,
            "kind": self.case.kind,
            "corruption": self.case.corruption,
            "command": self.case.arguments[0],
            "faults": self.faults,
            "stderr": self.end.stderr[-400:],
        }


class Server:
    """One process that runs commands, a case at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, case: Case, usual_peak: int) -> Ending:
        """Run the command of ``case``."""
        request = {
            "arguments": case.arguments, "cwd": str(case.folder), "seconds": PATIENCE_S,
            "stdout": str(case.folder / "stdout"), "stderr": str(case.folder / "stderr"),
            "canary": str(case.folder / "canary"),
        }  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return ending(json.loads(self._process.stdout.readline()), case.folder, usual_peak)

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=PATIENCE_S + _MARGIN)


class UsualPeaks:
    """The peak of each command on a file in order, measured when it is first asked for.

    The command must end well there: else a campaign would say nothing.
    """

    def __init__(self, seeds: Seeds, root: Path) -> None:
        self._seeds, self._root = seeds, root
        self._found: dict[tuple[str, ...], int] = {}
        self._locks: dict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)

    def of(self, case: Case, server: Server) -> int:
        """Bytes."""
        words = _words(case)
        with self._locks[words]:
            if words not in self._found:
                self._found[words] = self._measured(case, server)
            return self._found[words]

    def _measured(self, case: Case, server: Server) -> int:
        folder = Path(tempfile.mkdtemp(dir=self._root, prefix="right-"))
        source = self._seeds.of(case.kind)[-1]
        place = folder / "in" / ("0" if case.kind == "picture" else "")
        place.mkdir(parents=True)
        file = place / source.name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, file)
        right = placed(self._seeds, case.kind, case.command, "none", file=file, folder=folder)
        end = server.run(right, 0)
        if end.code != 0 and case.command[0] != "build":  # nobody builds for sm90 here
            raise RuntimeError(f"{right.arguments} fails on a right file: {end.stderr}")
        shutil.rmtree(folder)
        return end.memory


def _words(case: Case) -> tuple[str, ...]:
    """The command without what differs from case to case."""
    return (case.kind, *case.command)


class Campaign:
    """Cases of one seed, by several servers, until the time is up."""

    def __init__(self, seeds: Seeds, root: Path, seed: int, kinds: Sequence[str]) -> None:
        self.seeds, self.root, self.seed, self.kinds = seeds, root, seed, kinds
        self.peaks = UsualPeaks(seeds, root)
        self.outcomes: list[Outcome] = []
        self._next = 0
        self._lock = threading.Lock()

    def run_case(self, number: int, server: Server, *, keep: bool = False) -> Outcome:
        """Make and run the case ``number``."""
        random = Random(f"{self.seed}/{number}")
        kind = random.choices(self.kinds, [KINDS[kind].weight for kind in self.kinds])[0]
        folder = self.root / f"case-{number}"
        case = make_case(self.seeds, kind, random, folder)
        end = server.run(case, self.peaks.of(case, server))
        outcome = Outcome(
            number=number, case=case, end=end, faults=faults(case, end, folder / "canary")
        )
        if not keep:
            shutil.rmtree(folder)
        return outcome

    def work(self, server: Server, until: float) -> None:
        """Take the next number until the time is up."""
        while time.monotonic() < until:
            with self._lock:
                number, self._next = self._next, self._next + 1
            outcome = self.run_case(number, server)
            self.outcomes.append(outcome)
            if outcome.faults:
                words = json.dumps(outcome.to_json())
                print(f"case {number}: {words}", file=sys.stderr, flush=True)


def summary(outcomes: list[Outcome], seed: int, seconds: float) -> dict[str, Any]:
    """The figures, by kind of input."""
    kinds = defaultdict(list)
    for outcome in outcomes:
        kinds[outcome.case.kind].append(outcome)
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "inputs": len(outcomes),
        "kinds": {kind: _figures(kinds[kind]) for kind in KINDS if kinds[kind]},
        "failures": [outcome.to_json() for outcome in outcomes if outcome.faults],
    }


def _figures(outcomes: list[Outcome]) -> dict[str, Any]:
    times = [outcome.end.cpu_seconds for outcome in outcomes]
    return {
        "inputs": len(outcomes),
        "exit_codes": dict(sorted(Counter(str(outcome.end.code) for outcome in outcomes).items())),
        "failures": sum(bool(outcome.faults) for outcome in outcomes),
        "median_cpu_seconds": round(statistics.median(times), 2),
        "worst_cpu_seconds": round(max(times), 2),
        "worst_gigabytes": round(max(o.end.memory for o in outcomes) / GIGABYTE, 2),
    }


def table(result: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{'kind':12}{'inputs':>8}{'exit 0':>8}{'1':>6}{'2':>6}{'3':>6}{'failures':>10}"
             f"{'CPU s':>9}{'GB':>10}"]  # fmt: skip
    for kind, row in result["kinds"].items():
        codes = [row["exit_codes"].get(str(code), 0) for code in range(4)]
        lines.append(
            f"{kind:12}{row['inputs']:8}{codes[0]:8}{codes[1]:6}{codes[2]:6}{codes[3]:6}"
            f"{row['failures']:10}{row['worst_cpu_seconds']:9.1f}{row['worst_gigabytes']:10.2f}"
        )
    words = f"{result['inputs']} inputs in {result['seconds']} s, seed {result['seed']}"
    return "\n".join([*lines, f"{words}: {len(result['failures'])} failed"])


def main() -> int:
    """Run the campaign and return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="of the campaign, seeds apart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=Path, metavar="DIR", help="right files, kept for next time")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of input, by comma")
    parser.add_argument("--case", type=int, metavar="N", help="run one again, keep its files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    with tempfile.TemporaryDirectory(prefix="repvgg-fuzz-") as name:
        root = Path(name)
        right = options.seeds or root / "seeds"
        seeds = Seeds(root=right) if right.exists() else make_seeds(right)
        servers = [Server() for _ in range(1 if options.case is not None else options.workers)]
        if options.case is not None:
            kept = Path(tempfile.mkdtemp(prefix="repvgg-fuzz-case-"))
            outcome = Campaign(seeds, kept, options.seed, kinds).run_case(
                options.case, servers[0], keep=True
            )
            print(json.dumps({**outcome.to_json(), "arguments": outcome.case.arguments}, indent=2))
            return int(bool(outcome.faults))
        campaign = Campaign(seeds, root, options.seed, kinds)
        start = time.monotonic()
        with ThreadPoolExecutor(len(servers)) as pool:
            for done in [
                pool.submit(campaign.work, server, start + options.seconds) for server in servers
            ]:
                done.result()
        for server in servers:
            server.close()
        outcomes = sorted(campaign.outcomes, key=lambda outcome: outcome.number)
        result = summary(outcomes, options.seed, time.monotonic() - start)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(table(result))
    return int(bool(result["failures"]))


if __name__ == "__main__":
    sys.exit(main())
