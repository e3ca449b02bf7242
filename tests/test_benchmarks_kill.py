"""SIGKILL at random moments of real exports, two hundred at least: what OUT is afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def campaign(kills: int) -> dict:
    """What `benchmarks/kill.py` finds."""
    done = subprocess.run(
        [sys.executable, "benchmarks/kill.py", "--kills", str(kills), "--seed", "1"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_whatever_moment_a_run_is_killed_at_out_is_whole_or_absent():
    """One folder at most is left, no program works on, and the next run leaves nothing."""
    found = campaign(210)
    assert [] == found["failures"]
    phases = found["kills_by_phase"]
    # A run that is quicker than those before it ends before its kill.
    assert (
        sum(phases.values()) - phases["file step"]
        >= 200 - found["runs_that_ended_before_their_kill"]
    )
    assert phases["file step"] > 100
    assert {"old whole", "new whole", "absent"} == set(found["out_after_the_kill"])
    # The moments that the promises are about did occur.
    assert found["kills_while_another_program_ran"] > 10
    assert found["temporary_folders_left_and_removed"] > 100
    assert found["old_bundles_put_back"] >= 1


def test_the_committed_results_have_no_failure():
    """Those of docs/reliability.md."""
    found = json.loads((ROOT / "benchmarks" / "results" / "kill.json").read_text())
    assert [] == found["failures"]
    assert found["kills"] - found["kills_by_phase"]["file step"] >= 200
    page = (ROOT / "docs" / "reliability.md").read_text()
    for phase, kills in found["kills_by_phase"].items():
        assert f"| `{phase}` | {kills} |" in page
