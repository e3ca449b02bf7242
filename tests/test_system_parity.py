"""`parity` as CI runs it: the project's own configuration, and one in which much goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
CONFIG, BASELINE = ROOT / "parity.toml", ROOT / "parity-baseline.json"


@pytest.mark.slow
def test_the_projects_exports_hold_their_baseline(command, tmp_path):
    """`make parity` passes on the committed baseline, and its results are complete."""
    done = command(
        "parity", str(CONFIG), "--baseline", str(BASELINE), "--results", str(tmp_path),
        "--out", str(tmp_path / "bundles"), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content == json.loads((tmp_path / "parity.json").read_text())
    assert ("pass", 0, None, []) == tuple(
        content[key] for key in ("verdict", "exit_code", "error", "regressions")
    )
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert ["A0-int8", "A0-fp16"] == [suite.get("name") for suite in root]
    assert ("0", "0") == (root.get("failures"), root.get("errors"))
    for case in ("A0-int8", "A0-fp16"):
        assert (tmp_path / "bundles" / case / "manifest.json").is_file()


@pytest.mark.slow
def test_a_doctored_baseline_fails_with_exit_code_1(command, tmp_path):
    """The sentence names case, stage, figure and both numbers; JUnit has the same."""
    baseline = json.loads(BASELINE.read_text())
    before = baseline["cases"]["A0-int8"]["int8"]["sqnr_db"]
    baseline["cases"]["A0-int8"]["int8"]["sqnr_db"] = before + 6
    baseline["cases"]["A0-fp16"]["engine contents"]["other_kernels"] = 9
    doctored = tmp_path / "doctored.json"
    doctored.write_text(json.dumps(baseline))
    results = tmp_path / "results"
    done = command(
        "parity", str(CONFIG), "--baseline", str(doctored), "--results", str(results), "--quiet"
    )
    assert 1 == done.returncode
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(
        f"repvgg-export: case A0-int8, stage int8: sqnr_db fell from {before + 6:.1f} to "
    )
    assert sentence.endswith(", more than the allowed 1.0")
    assert "1 worse" in done.stdout
    root = ElementTree.parse(results / "junit.xml").getroot()
    failure = root.find("testsuite[@name='A0-int8']/testcase[@name='int8']/failure")
    assert f"repvgg-export: {failure.get('message')}" == sentence
    improved = json.loads((results / "parity.json").read_text())["improvements"]
    assert 1 == len(improved)
    assert "other_kernels fell from 9 to" in improved[0]


@pytest.mark.slow
def test_a_case_that_fails_or_cannot_run_does_not_stop_the_others(command, tmp_path):
    """A failed gate decides the exit code; nothing is recorded as a baseline."""
    (tmp_path / "empty").mkdir()
    config = tmp_path / "parity.toml"
    config.write_text("""
        [defaults]
        model = "A0"
        target = "sm86"
        [[case]]
        name = "no-images"
        calibration = "empty"
        [[case]]
        name = "too-much"
        precision = "fp16"
        min_sqnr_db = 200
        [[case]]
        name = "fine"
        precision = "fp32"
    """)
    baseline = tmp_path / "baseline.json"
    done = command(
        "parity", str(config), "--baseline", str(baseline), "--update-baseline",
        "--results", str(tmp_path / "results"), "--quiet",
    )  # fmt: skip
    assert 1 == done.returncode
    first, second = done.stderr.splitlines()
    assert "case no-images: " in first
    assert "holds no image" in first
    assert "case too-much: parity failed at stage fp16" in second
    assert not baseline.exists()
    cases = json.loads((tmp_path / "results" / "parity.json").read_text())["cases"]
    assert [("error", 2), ("fail", 1), ("pass", 0)] == [
        (case["status"], case["exit_code"]) for case in cases
    ]
    root = ElementTree.parse(tmp_path / "results" / "junit.xml").getroot()
    assert ("1", "1") == (root.get("errors"), root.get("failures"))


def test_a_baseline_of_other_cases_is_refused_before_anything_runs(command, tmp_path):
    """Exit code 2, one sentence, no results."""
    baseline = json.loads(BASELINE.read_text())
    baseline["cases"]["A9-int8"] = baseline["cases"].pop("A0-fp16")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(baseline))
    done = command(
        "parity", str(CONFIG), "--baseline", str(other), "--results", str(tmp_path / "results")
    )
    assert (2, "") == (done.returncode, done.stdout)
    assert (
        f"repvgg-export: baseline {other} lacks A0-fp16 and has A9-int8, which the configuration "
        "does not: run with --update-baseline\n"
    ) == done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("absent.toml",), "configuration absent.toml cannot be read: No such file or directory"),
        (
            (str(CONFIG), "--update-baseline"),
            "--update-baseline needs --baseline FILE, the file to write",
        ),
        (
            (str(CONFIG), "--baseline", "absent.json"),
            "baseline absent.json cannot be read: No such file or directory; --update-baseline "
            "writes it",
        ),
    ],
)
def test_bad_usage_is_one_sentence(command, tmp_path, arguments, sentence):
    """Exit code 2."""
    done = command("parity", *arguments, cwd=tmp_path)
    assert (2, f"repvgg-export: {sentence}\n") == (done.returncode, done.stderr)


def test_a_configuration_with_mistakes_names_all_of_them(command, tmp_path):
    """Exit code 2 and nothing is exported."""
    config = tmp_path / "parity.toml"
    shutil.copy(CONFIG, config)
    config.write_text(config.read_text().replace('"A0"', '"A9"').replace("min_agreement", "agree"))
    done = command("parity", str(config))
    assert 2 == done.returncode
    assert "[[case]] 1 (A0-int8), agree: unknown (nearest: min_agreement)" in done.stderr
    assert "[defaults], model: unknown model 'A9'" in done.stderr
