"""The ready-made CI files: their YAML, and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from exporter.cases.request_keys import KEYS
from exporter.cli import build_parser
from exporter.parity_run import Margins
from exporter.parity_run.margins import KINDS

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "ci"


def load(name: str) -> dict[str, Any]:
    """The parsed file."""
    return yaml.safe_load((FOLDER / name).read_text())


def github_job() -> dict[str, Any]:
    """The only job of the workflow."""
    (job,) = load("github-actions.yml")["jobs"].values()
    return job


def commands(name: str) -> list[str]:
    """Every shell line of the file."""
    if name == "github-actions.yml":
        return [step["run"] for step in github_job()["steps"] if "run" in step]
    job = load(name)["parity"]
    return [*job["before_script"], *job["script"]]


@pytest.mark.parametrize("name", ["github-actions.yml", "gitlab-ci.yml"])
def test_every_command_exists_with_its_options(name):
    """repvgg-export reads its line; pip installs extras that the project has; files exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    programs = set()
    for line in commands(name):
        words = shlex.split(line)
        programs.add(words[0])
        if words[0] == "repvgg-export":
            options = build_parser().parse_args(words[1:])
            assert (ROOT / options.config).is_file()
            assert (ROOT / options.baseline).is_file()
        else:
            assert ["python", "-m", "pip", "install", "--constraint"] == words[:5]
            assert (ROOT / words[5]).is_file()
            extras = re.fullmatch(r"\.\[(.*)\]", words[6])[1].split(",")
            assert set(extras) <= set(project["optional-dependencies"])
    assert {"python", "repvgg-export"} == programs


def test_the_results_are_kept_where_the_command_writes_them():
    """Both files keep the folder of --results, also after a failure, and GitLab reads junit.xml."""
    upload = github_job()["steps"][-1]
    assert ("always()", "results") == (upload["if"], upload["with"]["path"])
    artifacts = load("gitlab-ci.yml")["parity"]["artifacts"]
    assert ("always", ["results"]) == (artifacts["when"], artifacts["paths"])
    assert "results/junit.xml" == artifacts["reports"]["junit"]
    for name in ("github-actions.yml", "gitlab-ci.yml"):
        (line,) = [line for line in commands(name) if line.startswith("repvgg-export")]
        assert Path("results") == build_parser().parse_args(shlex.split(line)[1:]).results


def test_python_is_one_that_the_project_takes():
    """And pip's downloads are cached by constraints.txt."""
    setup = next(s for s in github_job()["steps"] if "setup-python" in s.get("uses", ""))
    assert ("3.12", "pip") == (setup["with"]["python-version"], setup["with"]["cache"])
    assert (ROOT / setup["with"]["cache-dependency-path"]).is_file()
    job = load("gitlab-ci.yml")["parity"]
    assert "python:3.12" == job["image"]
    assert all((ROOT / name).is_file() for name in job["cache"]["key"]["files"])


def test_the_documentations_keys_and_margins_are_those_of_the_code():
    """The table of docs/ci.md is complete; its commands are held by test_docs_commands.py."""
    text = (ROOT / "docs" / "ci.md").read_text()
    table = {}
    for kinds, default in re.findall(
        r"^\| (`.*?`) \|.*\| ([\d.]+)[^|]*\|$", text, flags=re.MULTILINE
    ):
        table |= dict.fromkeys(re.findall(r"`(\w+)`", kinds.split(" | ")[0]), float(default))
    assert Margins().to_json() == table
    sample = tomllib.loads(re.search(r"```toml\n(.*?)```", text, flags=re.DOTALL)[1])
    keys = {*sample["defaults"], *sample["case"][0]} - {"name", "margins"}
    assert keys <= set(KEYS)
    assert set(sample["margins"]) <= set(KINDS)
