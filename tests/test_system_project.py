"""The promises of the project's own files: wheel, Makefile, README's table of variables."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from exporter import __version__
from exporter.engine import tensorrt, tensorrt_rtx
from exporter.request import ExportRequest
from exporter.spec import Precision
from models import VARIANTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = ("exporter", "models", "calibration")
_MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", " ")
TARGETS = sorted({*re.search(r"^\.PHONY:(.*)$", _MAKEFILE, re.MULTILINE)[1].split()} - {"clean"})


def test_the_wheel_holds_exactly_the_three_packages_with_weights_and_template(tmp_path):
    """Every file of the packages is in the wheel, and nothing else."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"repvgg_exporter-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    found = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected == found
    assert {
        "models/weights/a0_digits.safetensors",
        "models/weights/registry.json",
        "exporter/report/templates/report.html.j2",
    } <= found


def test_the_extras_demand_what_the_backends_accept():
    """No release that a backend drives is shut out, and none that it refuses is let in."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for extra, backend in (("tensorrt", tensorrt), ("rtx", tensorrt_rtx)):
        oldest = ".".join(map(str, backend._OLDEST))
        assert f"{backend.MODULE.replace('_', '-')}>={oldest}" == extras[extra][0]
    assert "pycuda" in extras["tensorrt"]


def make(*arguments: str, **environment: str) -> str:
    """What `make` would run."""
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *arguments],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    return " ".join(done.stdout.replace("\\\n", " ").split())


def test_make_engine_hands_every_variable_to_the_command():
    """Paths with spaces survive; what is not given is not passed."""
    line = make(
        "engine", "MODEL=B0", "PRECISION=fp16", "WEIGHTS=my weights.pth", "CALIB=c d",
        "TARGET=sm86", "BACKEND=auto", "BATCH=1:2:4", "IMAGE_SIZE=96", "OUT=o p", "ARGS=--json",
    )  # fmt: skip
    assert (
        "repvgg-export engine 'B0' --precision 'fp16' --weights 'my weights.pth' --calib 'c d' "
        "--target 'sm86' --backend 'auto' --batch '1:2:4' --image-size '96' --out 'o p' --json"
    ) in line
    assert "engine 'A0' --precision 'int8' --out 'build/A0-int8'" in make("engine")


@pytest.mark.parametrize("target", TARGETS)
def test_every_make_target_makes_its_environment_first(target):
    """The environment is installed under the constraints before anything else runs."""
    line = make(target)
    assert "--constraint constraints.txt" in line
    assert line.index("pip install") < line.rindex(".venv/bin/")


def test_make_parity_runs_the_committed_configuration_or_one_bundle():
    """Without variables the cases; with any variable of the engine that bundle, then verify.

    A variable of the environment is nobody's request: a CI job has many.
    """
    cases = make("parity")
    assert cases == make("parity", TARGET="sm86", MODEL="B0", OUT="elsewhere", ARGS="--quiet")
    assert "repvgg-export parity 'parity.toml' --baseline 'parity-baseline.json'" in cases
    assert "repvgg-export engine" not in cases
    assert "repvgg-export parity 'c.toml'" in make("parity", "CONFIG=c.toml", "BASELINE=")
    for variables in (["MODEL=A0", "PRECISION=int8"], ["TARGET=sm86"], ["ARGS=--quiet"]):
        one = make("parity", *variables)
        assert one.index("repvgg-export engine 'A0'") < one.index("verify 'build/A0-int8'")
        assert "repvgg-export parity" not in one


def test_the_readme_lists_every_variant_and_precision():
    """The table of variables is complete."""
    assert f"| {' '.join(VARIANTS)} |" in README
    for precision in Precision:
        assert f"`{precision}`" in README


def test_request_defaults_are_those_of_the_command_line():
    """`engine A0` without options is ExportRequest(model="A0")."""
    from exporter.cli import build_parser

    options = vars(build_parser().parse_args(["engine", "A0"]))
    names = ExportRequest.__dataclass_fields__
    assert ExportRequest(model="A0") == ExportRequest(**{name: options[name] for name in names})


def test_everything_the_environment_installs_is_pinned():
    """constraints.txt names every distribution of this environment, at its version."""
    from importlib import metadata

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().split()
        if "==" in line and not line.startswith("#")
    )
    pins = {canonical(name): version for name, version in pins.items()}
    installed = {
        canonical(d.metadata["Name"]): d.version.split("+")[0] for d in metadata.distributions()
    }
    for unpinned in ("pip", "setuptools", "repvgg-exporter"):
        installed.pop(unpinned, None)
    assert {} == {n: v for n, v in installed.items() if pins.get(n, "").split("+")[0] != v}
