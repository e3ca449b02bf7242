"""The command `matrix`, on this machine and on a Ray cluster of two nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

SMALL = """
calibration_images = 16
evaluation_images = 16
image_size = 32
"""
MODELS = os.environ.get("MATRIX_MODELS", "A0 A1").split()
"""Docs/reliability.md tells of four: MATRIX_MODELS="A0 A1 A2 B0"."""
CONFIG = f"""
[matrix]
model = {json.dumps(MODELS)}
precision = ["fp16", "int8"]
target = ["sm86", "sm89"]
[defaults]
weights = "random"
{SMALL}
"""
NOT_THE_SAME = {
    "model.engine", "engine.json", "build.log", "report.html", "manifest.json", "SHA256SUMS",
}  # fmt: skip
"""Engines differ from build to build, and so do the files that name their size or hash."""


def environment(cache: Path) -> dict[str, str]:
    return {
        **os.environ,
        "REPVGG_EXPORT_CACHE": str(cache),
        "SOURCE_DATE_EPOCH": "1700000000",
    }


def matrix(folder: Path, text: str, *arguments: str, out: str, cache: str) -> subprocess.Popen[str]:
    (folder / "matrix.toml").write_text(text)
    return subprocess.Popen(
        [sys.executable, "-m", "exporter", "matrix", "matrix.toml", "--out", out, "--json",
         *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env=environment(folder / cache),
    )  # fmt: skip


def finished(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    out, err = process.communicate(timeout=1500)
    assert code == process.returncode, err
    result: dict[str, Any] = json.loads(out)
    return result


@pytest.mark.slow
def test_a_failed_cell_stops_no_other_and_a_rerun_makes_only_it(tmp_path: Path) -> None:
    """Its gate is beyond reach; when it is not, the other cell, which leads, is kept as it is."""
    text = f"""
        [matrix]
        model = ["A0"]
        precision = ["fp32", "fp16"]
        target = ["sm86"]
        [defaults]
        {SMALL}
        [[override]]
        when = {{ precision = "fp16" }}
        min_sqnr_db = GATE
        """
    first = matrix(tmp_path, text.replace("GATE", "190"), out="out", cache="cache")
    cells = {cell["name"]: cell for cell in finished(first, code=1)["cells"]}
    assert {"A0-fp16-sm86": "fail", "A0-fp32-sm86": "pass"} == {
        name: cell["status"] for name, cell in cells.items()
    }
    assert "required 190 dB" in cells["A0-fp16-sm86"]["message"]
    assert (tmp_path / "out" / "A0-fp16-sm86.failed.html").exists()
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'href="A0-fp32-sm86/report.html"' in page
    kept = (tmp_path / "out" / "A0-fp32-sm86" / "manifest.json").stat().st_mtime_ns
    second = matrix(tmp_path, text.replace("GATE", "60"), out="out", cache="cache")
    result = finished(second)
    assert ["pass", "pass"] == [cell["status"] for cell in result["cells"]]
    assert ["float"] == result["cells"][1]["reused"]
    assert kept == (tmp_path / "out" / "A0-fp32-sm86" / "manifest.json").stat().st_mtime_ns
    assert not (tmp_path / "out" / "A0-fp16-sm86.failed.html").exists()


def test_a_configuration_with_mistakes_begins_nothing(tmp_path: Path) -> None:
    process = matrix(tmp_path, '[matrix]\nmodel = ["A9"]', out="out", cache="cache")
    _, err = process.communicate(timeout=60)
    assert 2 == process.returncode
    assert "unknown model 'A9'" in err
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there_is_an_environment_lack(tmp_path: Path) -> None:
    text = '[matrix]\nmodel = ["A0"]'
    process = matrix(tmp_path, text, "--ray", "127.0.0.1:1", out="out", cache="cache")
    _, err = process.communicate(timeout=120)
    assert 3 == process.returncode, err
    assert "no Ray cluster at 127.0.0.1:1" in err


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two nodes of one core, each with a stage cache of its own."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("nodes")
    made = Cluster()
    for name in ("one", "two"):
        variables = {
            name: value
            for name, value in environment(folder / name).items()
            if name.startswith(("REPVGG", "SOURCE", "PYTHONPATH"))
        }
        made.add_node(num_cpus=1, include_dashboard=False, env_vars=variables)
    yield made.address
    made.shutdown()


def kill_one_worker(killed: list[int]) -> None:
    """The first process below this one that runs a cell, some seconds after it began."""
    own = psutil.Process()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        # Elsewhere on the machine another test may have a cluster.
        for process in own.children(recursive=True):
            try:
                words = process.cmdline()
            except psutil.Error:  # it has ended
                continue
            if "ray::run_remotely" in " ".join(words):
                time.sleep(3)
                os.kill(process.pid, signal.SIGKILL)
                killed.append(process.pid)
                return
        time.sleep(0.2)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_makes_the_bundles_of_this_machine(
    tmp_path: Path, cluster: str
) -> None:
    """Variants x 2 precisions x 2 targets; only engines and what names them may differ."""
    local = finished(
        matrix(tmp_path, CONFIG, "--jobs", "2", "--threads", "1", out="out", cache="cache")
    )
    (tmp_path / "out").rename(tmp_path / "local")
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_worker, args=(killed,))
    killer.start()
    remote = finished(matrix(tmp_path, CONFIG, "--ray", cluster, out="out", cache="driver"))
    killer.join()
    assert 1 == len(killed)
    for cells in (local["cells"], remote["cells"]):
        assert ["pass"] * 4 * len(MODELS) == [cell["status"] for cell in cells]
        # The second target of each takes everything but the engine from the first.
        assert [cell["reused"] for cell in cells[1::2]] == [["draft"]] * 2 * len(MODELS)
    require_same_bundles(tmp_path / "local", tmp_path / "out")


def require_same_bundles(expected: Path, found: Path) -> None:
    """Byte for byte, but for engines and what names them."""
    bundles = sorted(expected.glob("*/"))
    assert bundles
    for bundle in bundles:
        twin = found / bundle.name
        assert {path.name for path in bundle.iterdir()} == {path.name for path in twin.iterdir()}
        for path in bundle.iterdir():
            if path.name not in NOT_THE_SAME:
                assert path.read_bytes() == (twin / path.name).read_bytes(), path
        texts = [(folder / "manifest.json").read_text() for folder in (bundle, twin)]
        manifests = [json.loads(text) for text in texts]
        for manifest in manifests:
            manifest["files"] = {
                name: file for name, file in manifest["files"].items() if name not in NOT_THE_SAME
            }
        assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_shards_change_no_byte_on_this_machine_and_on_a_cluster(
    tmp_path: Path, cluster: str
) -> None:
    """64 images in two and in three parts; four batches, so that one part has two."""
    text = f"""
        [matrix]
        model = ["A0"]
        precision = ["fp16", "int8"]
        target = ["sm86"]
        [defaults]
        weights = "random"
        {SMALL.replace("16", "64")}
        """
    runs = {
        "whole": ("--jobs", "1", "--threads", "1"),
        "three": ("--jobs", "1", "--threads", "1", "--shards", "3"),
        "cluster": ("--ray", cluster, "--shards", "2"),
    }
    for name, arguments in runs.items():
        ended = finished(matrix(tmp_path, text, *arguments, "--no-cache", out="out", cache=name))
        assert ["pass", "pass"] == [cell["status"] for cell in ended["cells"]]
        (tmp_path / "out").rename(tmp_path / name)
        require_same_bundles(tmp_path / "whole", tmp_path / name)


@pytest.mark.slow
def test_a_shard_says_what_one_process_says_of_a_broken_image(tmp_path: Path, cluster: str) -> None:
    """The same sentence and exit code, here and from a node."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(40):
        name = folder / f"{index:02}.png"
        Image.effect_noise((32, 32), 64 + index).convert("RGB").save(name)
    name.write_bytes(name.read_bytes()[:-100])
    text = f"""
        [matrix]
        model = ["A0"]
        precision = ["fp32"]
        [defaults]
        weights = "random"
        evaluation = "{folder}"
        image_size = 32
        """
    said = set()
    for arguments in ((), ("--shards", "2"), ("--ray", cluster, "--shards", "2")):
        process = matrix(tmp_path, text, *arguments, out="out", cache="cache")
        (cell,) = finished(process, code=2)["cells"]
        said.add((cell["exit_code"], cell["message"]))
    ((code, message),) = said
    assert 2 == code
    assert "39.png cannot be decoded" in message
