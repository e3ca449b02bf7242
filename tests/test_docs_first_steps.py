"""A newcomer: a copy of the project's files, the README's first command, nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from exporter.bundle import Bundle

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
STAGE = re.compile(r"^│ (\w+) +│ (pass|not run) ", re.MULTILINE)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `git clone` would give, changes that are not committed yet included."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    home = tmp_path_factory.mktemp("fresh") / "repvgg-exporter"
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, home / name)
    return home


@pytest.mark.slow
def test_the_readmes_first_command_gives_what_the_readme_shows(clone):
    """It makes its own environment, then the bundle; stages, top-1 and files are as shown."""
    first = re.search(r"```sh\n(.*)\n", README)[1]
    assert "make engine MODEL=A0 PRECISION=int8" == first
    hidden = {"PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    # Nothing is run twice from there: compiling all of torch would only take time.
    environment |= {"PIP_NO_COMPILE": "1", "COLUMNS": "100"}
    done = subprocess.run(
        ["bash", "-c", first],
        cwd=clone, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert 0 == done.returncode, done.stderr
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1]
    assert STAGE.findall(shown) == STAGE.findall(done.stdout)
    assert ("int8", "pass") in STAGE.findall(shown)
    for line in ("22 convolutions (22 INT8, 0 half, 0 float)", "original top-1 98.89 %"):
        assert line in shown
        assert line in done.stdout + done.stderr
    bundle = Bundle.load(clone / "build" / "A0-int8")
    assert ("pass", ()) == (bundle.parity["verdict"], bundle.damaged_files())
    table = README[README.index("| file | what it is |") : README.index("`repvgg-export verify")]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
             for name in re.findall(r"`([\w.]+)`", row)} - {"model.fp16.onnx"}  # fmt: skip
    assert {*bundle.manifest["files"], "manifest.json", "SHA256SUMS"} == named
