"""The stage cache through the real command: what is reused, and that it is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Bundles = Callable[[str], tuple[Path, subprocess.CompletedProcess[str]]]
EXPORT = ("engine", "A0", "--precision", "int8", "--json")


class Exports:
    """Runs exports that share one cache."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            **os.environ,
            "REPVGG_EXPORT_CACHE": str(root / "cache"),
            "SOURCE_DATE_EPOCH": "1700000000",
            "COLUMNS": "160",
        }

    def start(self, *arguments: str, python: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *python, "-m", "exporter", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.root,
        )

    def run(self, *arguments: str) -> dict[str, Any]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=300)
        assert 0 == process.returncode, err
        result: dict[str, Any] = json.loads(out)
        return result

    def run_program(self, code: str, *arguments: str) -> dict[str, Any]:
        """What the command prints that the Python program ``code`` runs."""
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, env=self.environment, cwd=self.root, timeout=300,
            check=False,
        )  # fmt: skip
        assert 0 == process.returncode, process.stderr
        result: dict[str, Any] = json.loads(process.stdout)
        return result

    def export(self, out: str, *options: str) -> dict[str, bool]:
        """Which stages were reused."""
        result = self.run(*EXPORT, "--out", out, *options)
        return {stage["stage"]: stage["reused"] for stage in result["stages"]}


@pytest.fixture(scope="module")
def filled(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """A cache that holds one export for sm86, which replaced a bundle for every target."""
    made = Exports(tmp_path_factory.mktemp("exports"))
    shutil.copytree(bundles("int8")[0], made.root / "first")
    process = made.start(*EXPORT, "--out", "first", "--target", "sm86", "--quiet")
    out, err = process.communicate(timeout=300)
    assert (0, "") == (process.returncode, err)
    assert {"float": False, "draft": False, "engine": False} == {
        stage["stage"]: stage["reused"] for stage in json.loads(out)["stages"]
    }
    return made


@pytest.fixture
def exports(filled: Exports, tmp_path: Path) -> Exports:
    """A copy of that cache and bundle, which no other test has exported into."""
    return Exports(Path(shutil.copytree(filled.root, tmp_path / "exports")))


def test_a_second_run_replaces_the_bundle_and_repeats_its_figures(
    bundles: Bundles, filled: Exports
) -> None:
    """Two runs into one OUT leave one bundle with byte-identical graphs and table."""
    first, out = bundles("int8")[0], filled.root / "first"
    assert {"cache", "first"} == {path.name for path in filled.root.iterdir()}
    for name in ("model.onnx", "model.int8.onnx", "calibration.json", "calibration.cache"):
        assert (first / name).read_bytes() == (out / name).read_bytes(), name
    assert ["sm86"] == json.loads((out / "engine.json").read_text())["targets"]


def test_fp32_is_judged_on_all_images_also_where_another_precision_made_its_graph(
    tmp_path: Path,
) -> None:
    """To the others the float graph only leads, so that a few images did for it."""
    code = (
        "import sys; from exporter import cli; from exporter.stages import judged_images;"
        "judged_images.PIXELS_ON_THE_WAY = 16 * 64 * 64; sys.exit(cli.main(sys.argv[1:]))"
    )
    exports = Exports(tmp_path)
    rows = {}
    for precision, reused in (("fp16", False), ("fp32", True)):
        found = exports.run_program(
            code, "engine", "A0", "--precision", precision, "--evaluation-images", "40",
            "--target", "orin", "--json", "--out", precision,
        )  # fmt: skip
        assert reused == {s["stage"]: s["reused"] for s in found["stages"]}["float"]
        parity = json.loads((tmp_path / precision / "parity.json").read_text())
        rows[precision] = {row["stage"]: row for row in parity["stages"]}
    assert (16, None) == tuple(rows["fp16"]["simplified"][key] for key in ("images", "top1"))
    built = rows["fp32"]["simplified"]
    assert 40 == built["images"]
    assert built["top1"] is not None


def test_another_target_builds_the_engine_only(exports: Exports) -> None:
    """Torch and onnx are not even loaded, and everything but the engine is the same."""
    code = (
        "import sys; from exporter import cli; code = cli.main(sys.argv[1:]);"
        "assert not {'torch', 'onnx', 'onnxruntime'} & sys.modules.keys(); sys.exit(code)"
    )
    found = exports.run_program(code, *EXPORT, "--out", "second", "--target", "sm89")
    draft, engine = found["stages"]
    assert (True, False) == (draft["reused"], engine["reused"])
    assert {"target": ["sm86", "sm89"]} == engine["changed"]
    first, second = exports.root / "first", exports.root / "second"
    for name in ("model.onnx", "model.int8.onnx", "calibration.json", "calibration.cache",
                 "reference.npz", "parity.json"):  # fmt: skip
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert ["sm89"] == json.loads((second / "manifest.json").read_text())["targets"]


def test_an_export_tells_what_the_bundle_that_it_replaced_held(exports: Exports) -> None:
    """An engine was built, the new one waits for its device; nothing is told of less."""
    told = []
    for target in ("sm86", "orin", "orin"):
        result = exports.run(*EXPORT, "--out", "again", "--target", target)
        told.append([note for note in result["notes"] if note.startswith("replaced")])
    out = exports.root / "again"
    assert [[], ["replaced again, which held an engine for sm86"], []] == told
    assert "replaced" not in (out / "manifest.json").read_text()


def test_a_repeated_export_is_the_same_bundle(exports: Exports) -> None:
    """Engine included; only the report tells other times of the engine and of publishing."""
    exports.export("first", "--target", "sm86")
    before = {p.name: p.read_bytes() for p in (exports.root / "first").iterdir()}
    found = exports.export("first", "--target", "sm86")
    assert {"draft": True, "engine": True} == found
    after = {p.name: p.read_bytes() for p in (exports.root / "first").iterdir()}
    assert before.keys() == after.keys()
    differ = {name for name in before if before[name] != after[name]}
    assert differ <= {"report.html", "manifest.json"}


def test_explain_names_what_has_changed(exports: Exports) -> None:
    process = exports.start("engine", "A0", "--out", "third", "--target", "sm120", "--explain")
    out, err = process.communicate(timeout=300)
    assert 0 == process.returncode, err
    assert "graphs and evidence │ reused" in out
    assert "sm120" in out.split("│ engine")[-1]
    assert "up to the builder: " in out


def test_the_cache_is_listed_and_emptied(exports: Exports) -> None:
    """Every entry is removed and counted; a cache that is not there is an empty one."""
    listed = exports.run("cache", "ls", "--json")
    assert {"float", "draft", "engine"} == {entry["stage"] for entry in listed["entries"]}
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"])
    assert len(listed["entries"]) == exports.run("cache", "clear", "--json")["removed"]
    assert [] == exports.run("cache", "ls", "--json")["entries"]
    shutil.rmtree(exports.root / "cache")
    assert [] == exports.run("cache", "ls", "--json")["entries"]
    assert 0 == exports.run("cache", "clear", "--json")["removed"]


@pytest.mark.slow
def test_recipes_share_the_float_graph_and_give_the_same_as_without_a_cache(
    exports: Exports,
) -> None:
    """The ledger of a reused float graph goes on where it stopped; no simplifier is started."""
    code = (
        "import sys; from exporter import cli, simplify; simplify.started_simplifier = None;"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    found = exports.run_program(
        code, *EXPORT, "--out", "mse", "--target", "sm86", "--recipe", "mse"
    )
    assert {"float": True, "draft": False, "engine": False} == {
        stage["stage"]: stage["reused"] for stage in found["stages"]
    }
    exports.export("anew", "--target", "sm86", "--recipe", "mse", "--no-cache")
    mse, anew = exports.root / "mse", exports.root / "anew"
    for name in ("model.onnx", "model.int8.onnx", "calibration.json", "reference.npz"):
        assert (mse / name).read_bytes() == (anew / name).read_bytes(), name
    rows = [json.loads((path / "parity.json").read_text()) for path in (mse, anew)]
    for row in rows:
        del row["ladder"]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_two_exports_at_once_make_a_draft_once(tmp_path: Path) -> None:
    exports = Exports(tmp_path)
    pair = [
        exports.start("engine", "A0", "--precision", "fp32", "--json", "--out", name)
        for name in "ab"
    ]
    results = [json.loads(process.communicate(timeout=300)[0]) for process in pair]
    drafts = [
        stage["reused"] for result in results for stage in result["stages"]
        if stage["stage"] == "draft"
    ]  # fmt: skip
    assert [False, True] == sorted(drafts)


@pytest.mark.slow
def test_a_damaged_entry_is_made_anew(tmp_path: Path) -> None:
    exports = Exports(tmp_path)
    options = ("--precision", "fp32", "--target", "sm86")
    exports.export("a", *options)
    for path in (tmp_path / "cache").glob("v1/draft/*/model.onnx"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert {"float": True, "draft": False, "engine": True} == exports.export("b", *options)
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (
        tmp_path / "b" / "model.onnx"
    ).read_bytes()
