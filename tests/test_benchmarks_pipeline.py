"""The comparison with the peers' whole road: what it measures, stops and says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calibration.images import ImageFolder, Preprocess, load_image

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
HOLDS_MEMORY = "x = b'1' * (200 << 20); import time; time.sleep(0.5)"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    """Scripts in one folder import one another by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield


@pytest.fixture(scope="module")
def processes(on_path: None) -> ModuleType:
    return import_module("measured_process")


@pytest.fixture(scope="module")
def tables(on_path: None) -> ModuleType:
    return import_module("pipeline_table")


def measured(processes: ModuleType, code: str, memory_mib: float = 4096, seconds: float = 60):
    """What Python takes to run ``code``."""
    limits = processes.Limits(memory_mib=memory_mib, seconds=seconds)
    return processes.measure([sys.executable, "-c", code], limits, os.environ)


def test_memory_of_what_a_command_starts_counts(processes):
    """200 MiB in a child's child belong to the command, and not to its first process."""
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDS_MEMORY!r}])"
    usage = measured(processes, code)
    assert usage.stopped is None
    assert usage.peak_mib > 200
    assert usage.own_peak_mib < 100


def test_processor_time_of_what_a_command_starts_counts(processes):
    """A child's child works for half a second while the command waits."""
    works = "import time\nwhile time.process_time() < 0.5: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {works!r}])"
    usage = measured(processes, code)
    assert 0.5 <= usage.cpu_s
    assert 0.5 <= usage.wall_s


def test_a_command_over_its_memory_is_stopped_with_all_it_started(processes, tmp_path):
    """Its figures are those until then; nothing that it started lives on."""
    late = tmp_path / "late"
    child = f"x = b'1' * (200 << 20); import time; time.sleep(2); open({str(late)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    usage = measured(processes, code, memory_mib=150)
    assert processes.MEMORY == usage.stopped
    assert usage.peak_mib > 150
    assert measured(processes, "import time; time.sleep(2.5)").stopped is None
    assert not late.exists()


def test_a_command_over_its_time_is_stopped(processes):
    """After the limit, not at its own end."""
    usage = measured(processes, "import time; time.sleep(60)", seconds=0.3)
    assert processes.TIME == usage.stopped
    assert 0.3 <= usage.wall_s < 30


def test_a_command_that_fails_is_a_row_without_figures(processes):
    """The reason is its last words."""
    failure = measured(processes, "raise SystemExit('no such image')")
    assert "no such image" == failure.reason


def row(method: str, wall_s: float, peak_mib: float, **more: Any) -> dict[str, Any]:
    figures = {"cpu_s": 2 * wall_s, "own_peak_mib": peak_mib - 50, "others": 0.01}
    return {
        "variant": "A0", "images": 512, "method": method, "limit_gib": 18, "wall_s": wall_s,
        "peak_mib": peak_mib, "stopped": None, **figures, **more,
    }  # fmt: skip


@pytest.fixture
def result(tables) -> dict[str, Any]:
    """A peer that was stopped at its memory, another that failed."""
    rows = [
        row(tables.OURS, 10.0, 1000.0, stages={"load": 1.0, "engine": 2.0}),
        row(tables.ENTROPY, 25.0, 6000.0, stopped="memory"),
        {"variant": "A0", "images": 512, "method": "modelopt entropy", "limit_gib": 18,
         "failure": "not installed"},
    ]  # fmt: skip
    machine = {
        "processor": "P", "cores": 2, "memory_gib": 24,
        "torch": "1", "onnxruntime": "2", "onnxsim": "3", "modelopt": "4",
    }  # fmt: skip
    return {
        "commands": ["python benchmarks/pipeline.py"], "machine": machine, "size": 224,
        "repeats": 1, "limit_s": 900, "rows": rows,
    }  # fmt: skip


def test_ratios_are_to_ours_and_say_where_they_are_lower_bounds(tables, result):
    """Twice the figure is 2.00; a side that was stopped has >; one that failed its reason."""
    ours, without_builder, peer, failed = tables.comparison(result, "A0", 512).rows
    assert (tables.OURS, "10.0", "20.0", "1000", "1.00", "1.00", "0.01") == ours
    assert (tables.FLOAT_PART, "8.0", "", "950", "0.80", "0.95", "0.01") == without_builder
    assert (tables.ENTROPY, ">25.0", ">50.0", ">6000", ">2.50", ">6.00", "0.01") == peer
    assert "not installed" == failed[1]


def test_the_summary_says_what_was_not_reached(tables, result):
    """2.5 times is not the 3 that were wanted; 6 times is more than 5."""
    (line,) = tables.summary(result)
    assert "at least 2.5 times as fast (wanted 3: not reached)" in line
    assert "at least 6.0 times as small (wanted 5: reached)" in line


def test_growth_is_to_the_side_s_own_first_case(tables, result):
    """Four times the images in twice the processor time and the same memory."""
    more = row(tables.OURS, 20.0, 1000.0) | {"images": 2048}
    grown = tables.growth({**result, "rows": [*result["rows"], more]})
    assert ("side", "A0 2048: CPU", "A0 2048: memory") == grown.header
    assert (tables.OURS, "2.0", "1.0") == grown.rows[0]


def test_cases_that_are_not_measured_again_can_be_kept(result, tmp_path):
    """The rows of the case to be measured go, those of others stay, and so does the rest."""
    pipeline = import_module("pipeline")
    other = {**result["rows"][0], "images": 64}
    pipeline.write({**result, "rows": [other, *result["rows"]]}, tmp_path)
    assert {**result, "rows": [other]} == pipeline.kept(tmp_path, [("A0", 512)])


def test_a_case_with_another_limit_is_named(tables, result):
    """What stopped a side is the limit of its own run."""
    assert "18 GiB or 900 s" == tables.limits(result)
    other = {**result["rows"][0], "images": 2048, "limit_gib": 14.0}
    result["rows"].append(other)
    assert "18 GiB (A0 2048: 14) or 900 s" == tables.limits(result)
    assert "a side is stopped at 18 GiB (A0 2048: 14) or 900 s" in tables.text(result)


def test_the_page_is_made_from_the_committed_result(tables):
    """docs/speed.md and pipeline.txt hold the figures of pipeline.json."""
    found = json.loads((BENCHMARKS / "results" / "pipeline.json").read_text())
    assert tables.page(found) == (ROOT / "docs" / "speed.md").read_text("utf-8")
    assert tables.text(found) == (BENCHMARKS / "results" / "pipeline.txt").read_text("utf-8")


def test_the_images_are_files_that_every_side_decodes_alike(tmp_path):
    """Made once; a peer's batches are what our own loader reads, in its order."""
    files = import_module("textures_files").folder(tmp_path, 20, 32)
    names = [path.name for path in ImageFolder.open(files).files]
    assert [f"{index:05}.png" for index in range(20)] == names
    made = (files / names[0]).stat().st_mtime_ns
    assert files == import_module("textures_files").folder(tmp_path, 20, 32)
    assert made == (files / names[0]).stat().st_mtime_ns
    with Image.open(files / names[0]) as image:
        assert (32, 32) == image.size
    road = import_module("pipeline_child").Road(
        method="", variant="A0", weights="", images=str(files), count=10, size=28, folder=""
    )
    first = next(iter(road.batches()))
    assert (10, 3, 28, 28) == first.shape
    own = load_image(ImageFolder.open(files).take(10).files[1], Preprocess(image_size=(28, 28)))
    np.testing.assert_array_equal(own, first[1])


@pytest.mark.slow
def test_the_quick_comparison_writes_both_results(tables, tmp_path):
    """Every side has figures, the second road of ours took its network from the cache."""
    pipeline = import_module("pipeline")
    assert 0 == pipeline.main(["--quick", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "pipeline.json").read_text())
    ours, again, peer = found["rows"]
    assert [tables.OURS, tables.AGAIN, tables.ENTROPY] == [r["method"] for r in found["rows"]]
    assert all(one["peak_mib"] > 50 and one["wall_s"] > 0 for one in (ours, again, peer))
    assert "quantize" in ours["stages"]
    assert "quantize" not in again["stages"]
    assert (tmp_path / "pipeline.txt").read_text().startswith("$ python benchmarks/pipeline.py")
