"""What a person is told of an export."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from exporter.console import print_stages
from exporter.stage_cache import StageUse


def use(stage: str, seconds: float, *, reused: bool = False, made_in: float | None = None):
    return StageUse(
        stage=stage, reused=reused, seconds=seconds, made_in=made_in or seconds, reason="off"
    )


def rows(text: str) -> list[list[str]]:
    """The cells of a table without its headings."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.mark.parametrize("reused", [False, True])
def test_explain_counts_no_second_twice(capsys, reused):
    """The float graph is made within the draft; the rows add up to the whole export."""
    stages = (use("float", 3.0, reused=reused, made_in=5.0), use("draft", 10.0), use("engine", 2.0))
    seconds = {"load": 1.0, "simplify": 3.0, "evidence": 6.0, "engine": 2.0, "publish": 0.5}
    print_stages(SimpleNamespace(stages=stages, seconds=seconds))
    shown = capsys.readouterr().out
    assert [
        ["float graph", "reused" if reused else "made", "3.00", "5.00"],
        ["graphs and evidence", "made", "7.00", "7.00"],
        ["engine", "made", "2.00", "2.00"],
        ["publishing", "made", "0.50", "0.50"],
    ] == [row[:4] for row in rows(shown)]
    assert shown.endswith("up to the builder: 10.00 s, 10.00 s when it was made\n")
    assert 12.5 == sum(seconds.values()) == sum(float(row[2]) for row in rows(shown))


def test_explain_has_a_row_for_what_is_never_kept(capsys):
    """Publishing, and the engine of a builder that times the kernels of this GPU."""
    seconds = {"engine": 4.0, "publish": 0.5}
    print_stages(
        SimpleNamespace(stages=(use("draft", 0.1, reused=True, made_in=9.0),), seconds=seconds)
    )
    assert [
        ["graphs and evidence", "reused", "0.10", "9.00", "nothing has changed"],
        ["engine", "made", "4.00", "4.00", "is never kept"],
        ["publishing", "made", "0.50", "0.50", "is never kept"],
    ] == rows(capsys.readouterr().out)
