"""What is installed: pinned, under licences that allow its use, audited where that can be done."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tomllib
from packaging.requirements import Requirement

from exporter.bundle.sbom import PROJECT, Installed, installed, needs

ROOT = Path(__file__).parent.parent
AUDIT = ROOT / ".ci" / "audit.py"
AT_RUN_TIME = ("export", "rtx", "sign")
"""Extras that users install here; the others are for development, or for a device."""
ALLOWED = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT",
    "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Zlib",
    "Apache-2.0 WITH LLVM-exception",
    # The names of classifiers and of older fields.
    "3-Clause BSD License", "Apache Software License", "BSD License", "ISC License (ISCL)",
    "MIT License", "Mozilla Public License 2.0 (MPL 2.0)",
    "Python Software Foundation License",
}  # fmt: skip
"""Permissive, or reciprocal for the files of the dependency alone."""
NVIDIA = re.compile(r"tensorrt(-rtx)?(-cu\d+)?(-bindings|-libs)?")
"""Proprietary, with a licence of its own; it comes with the extra of its name only."""


def at_run_time() -> dict[str, Installed]:
    """What the extras of users pull in, everything that it needs included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    asked += [text for extra in AT_RUN_TIME for text in project["optional-dependencies"][extra]]
    own = Installed(name=PROJECT, version=None, requires=tuple(map(Requirement, asked)))
    found = {**installed(), PROJECT: own}
    graph = needs(found)
    reached, waiting = {PROJECT}, [PROJECT]
    while waiting:
        fresh = graph[waiting.pop()] - reached
        reached |= fresh
        waiting += fresh
    return {name: found[name] for name in reached - {PROJECT}}


def parts(expression: str) -> set[str]:
    """The licences of an SPDX expression; each must be allowed, also where one may choose."""
    return set(re.split(r" AND | OR ", re.sub(r"[()]", "", expression)))


def test_run_time_dependencies_have_allowed_licenses():
    """Every one states a licence, and each licence is on the list."""
    found = at_run_time()
    assert {"numpy", "torch", "onnx", "cryptography"} <= found.keys()
    assert not {"pytest", "mkdocs", "pip-audit"} & found.keys()
    stated = {name: {part for text in each.licenses for part in parts(text)}
              for name, each in found.items() if not NVIDIA.fullmatch(name)}  # fmt: skip
    assert {} == {name: texts - ALLOWED for name, texts in stated.items()
                  if not texts or texts - ALLOWED}  # fmt: skip


def test_every_line_of_the_constraints_is_a_pin():
    """One exact version each, none twice, in order; comments aside."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [] == [line for line in pins if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)]
    names = [line.split("==")[0].lower() for line in pins]
    assert len(names) == len(set(names))
    assert sorted(pins, key=str.lower) == pins


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", AUDIT)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def row(name: str, *ids: str) -> dict[str, object]:
    vulns = [{"id": each, "fix_versions": ["2"], "aliases": [], "description": ""} for each in ids]
    return {"name": name, "version": "1", "vulns": vulns}


SKIPPED = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        ([row("a"), row("b")], 0, ["2 distributions audited, 0 known vulnerabilities"]),
        (
            [row("a", "PYSEC-1", "PYSEC-2"), row("b"), SKIPPED],
            1,
            [
                "a 1: PYSEC-1, fixed in 2",
                "a 1: PYSEC-2, fixed in 2",
                "2 distributions audited, 2 known vulnerabilities",
                "NOT AUDITED, unknown to the service: c",
            ],
        ),
        (
            [SKIPPED],
            0,
            ["NOT AUDITED: the vulnerability service knows none of 1 distributions"],
        ),
    ],
)
def test_a_known_vulnerability_fails_the_audit(audit: ModuleType, rows, code, words):
    """What the service does not know is said, and is never counted as audited."""
    assert (code, words) == audit.judged(json.dumps({"dependencies": rows, "fixes": []}), "")


def test_only_the_network_excuses_an_audit_that_did_not_run(audit: ModuleType):
    """Anything else that keeps pip-audit from its work is a failure."""
    errors = "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed\nERROR: Tip"
    code, (words,) = audit.judged("", errors)
    assert (0, True) == (code, words.startswith("NOT AUDITED: the vulnerability service cannot be"))
    assert (1, ["pip-audit failed: ERROR: x is not pinned"]) == audit.judged(
        "", "ERROR: x is not pinned"
    )
    assert (1, ["pip-audit failed: pip-audit said nothing"]) == audit.judged("", "")


def test_without_a_network_the_audit_passes_and_says_that_it_did_not_happen(tmp_path: Path):
    """pip-audit itself, towards a port that nobody listens on; then a file that it refuses."""
    pinned, open_ended = tmp_path / "pinned.txt", tmp_path / "open.txt"
    pinned.write_text("numpy==2.4.6\n")
    open_ended.write_text("numpy>=2\n")
    nowhere = "http://127.0.0.1:9"
    settings = {**os.environ, "HTTPS_PROXY": nowhere, "https_proxy": nowhere,
                "XDG_CACHE_HOME": str(tmp_path)}  # fmt: skip
    settings.pop("NO_PROXY", None)
    settings.pop("no_proxy", None)

    def run(path: Path) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, AUDIT, path], env=settings, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    code, words = run(pinned)
    assert (0, True) == (code, words.startswith("NOT AUDITED: "))
    code, words = run(open_ended)
    assert 1 == code
    assert "not pinned to an exact version" in words


def test_ci_audits_after_lint():
    """`make audit` audits the file that the environment is made from."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines.index("make lint") + 1 == lines.index("make audit")
    made = subprocess.run(
        ["make", "--dry-run", "audit"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert ".ci/audit.py constraints.txt" in made.stdout
