"""The SBOM: valid CycloneDX, complete, the same every time, and cheap."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from exporter.bundle import sbom as module
from exporter.bundle.sbom import PROJECT, Installed, canonical, installed, needs, sbom

MOMENT = "2026-11-28T01:02:03+00:00"
Distribute = Callable[..., metadata.Distribution]


class Fake(metadata.Distribution):
    """A distribution of these header lines."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def read_text(self, filename: str) -> str | None:
        return "\n".join(self.lines) if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        return Path(str(path))


def environment(monkeypatch: pytest.MonkeyPatch, *distributions: Fake) -> None:
    monkeypatch.setattr(module.metadata, "distributions", lambda: iter(distributions))


def fake(name: str, version: str = "1", *more: str) -> Fake:
    return Fake(f"Name: {name}", f"Version: {version}", *more)


def test_this_environments_sbom_is_valid_cyclonedx():
    """By the library's own schema of 1.6, strictly."""
    document = sbom(MOMENT)
    assert None is JsonStrictValidator(SchemaVersion.V1_6).validate_str(document)
    content = json.loads(document)
    assert ("CycloneDX", "1.6") == (content["bomFormat"], content["specVersion"])
    assert MOMENT == content["metadata"]["timestamp"]


def test_every_installed_distribution_is_a_component():
    """With name, version and purl; this project is what the document is about."""
    content = json.loads(sbom(MOMENT))
    root = content["metadata"]["component"]
    assert (PROJECT, "application") == (root["name"], root["type"])
    rows = {row["purl"]: row for row in content["components"] if "purl" in row}
    expected = {
        f"pkg:pypi/{canonical(each.metadata['Name'])}@{each.version.replace('+', '%2B')}"
        for each in metadata.distributions()
        if canonical(each.metadata["Name"]) != PROJECT
    }
    assert expected == rows.keys()
    (python,) = (row for row in content["components"] if "purl" not in row)
    assert "platform" == python["type"]
    assert [{"expression": "Apache-2.0 OR BSD-2-Clause"}] == next(
        row["licenses"] for row in rows.values() if row["name"] == "packaging"
    )


def test_the_graph_says_what_needs_what():
    """Every reference is a component's; direct dependencies of this project among them."""
    content = json.loads(sbom(MOMENT))
    names = {row["bom-ref"]: row["name"] for row in content["components"]}
    root = content["metadata"]["component"]["bom-ref"]
    graph = {row["ref"]: row.get("dependsOn", []) for row in content["dependencies"]}
    assert {*names, root} == {*graph, *(ref for others in graph.values() for ref in others)} | {
        ref for ref, name in names.items() if name in ("CPython", "PyPy")
    }
    jinja = next(ref for ref, name in names.items() if name == "Jinja2")
    assert ["MarkupSafe"] == [names[ref] for ref in graph[jinja]]


def test_the_same_environment_gives_the_same_bytes():
    """In other processes, whose hashes of strings differ; neither torch nor onnx is imported."""
    code = (
        "import sys; from exporter.bundle.sbom import sbom; print(sbom(sys.argv[1]), end=''); "
        "assert not {'torch', 'onnx', 'onnxruntime', 'jsonschema'} & set(sys.modules)"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code, MOMENT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert {sbom(MOMENT)} == made
    assert "serialNumber" not in sbom(MOMENT)


def test_without_being_installed_the_project_is_there_without_a_version(monkeypatch):
    """Run from its folder, nothing says what it needs; the library warns of that."""
    environment(monkeypatch, fake("numpy", "2"))
    with pytest.warns(UserWarning, match="has no defined dependencies"):
        document = sbom(MOMENT)
    assert None is JsonStrictValidator(SchemaVersion.V1_6).validate_str(document)
    assert "version" not in json.loads(document)["metadata"]["component"]


def test_of_two_distributions_with_one_name_the_imported_one_counts(monkeypatch):
    """The first on the path; a broken one without a name is left out."""
    environment(monkeypatch, fake("My.Name", "2"), fake("my_name", "1"), Fake("Summary: broken"))
    assert {"my-name": "2", PROJECT: None} == {n: e.version for n, e in installed().items()}


def test_needs_follow_markers_and_the_extras_that_somebody_asks_for(monkeypatch):
    """An extra counts where a requirement names it, and all of this project's own do."""
    environment(
        monkeypatch,
        fake(
            PROJECT, "1",
            "Provides-Extra: export",
            "Requires-Dist: a[fast]",
            "Requires-Dist: b; extra == 'export'",
            "Requires-Dist: missing",
        ),
        fake(
            "a", "1",
            "Requires-Dist: c; extra == 'fast'",
            "Requires-Dist: d; extra == 'slow'",
            "Requires-Dist: d; python_version < '3'",
            "Requires-Dist: no version (of today",
        ),
        fake("b", "1", "Requires-Dist: a", "Requires-Dist: B"),
        fake("c"),
        fake("d", "1", "Requires-Dist: a[slow]"),
    )  # fmt: skip
    found = installed()
    assert {PROJECT: {"a", "b"}, "a": {"c", "d"}, "b": {"a"}, "c": set(), "d": {"a"}} == needs(
        found
    )
    del found["d"]
    assert {"c"} == needs(found)["a"]


@pytest.mark.parametrize(
    ("lines", "licenses"),
    [
        (["License-Expression: MIT OR ISC", "License: other"], ("MIT OR ISC",)),
        (["License: mit", "Classifier: License :: OSI Approved :: BSD License"], ("MIT",)),
        (
            [
                "License: BSD 3-Clause",
                "Classifier: License :: OSI Approved :: BSD License",
                "Classifier: License :: OSI Approved",
                "Classifier: License :: Other/Proprietary License",
                "Classifier: Topic :: Software Development",
            ],
            ("BSD License", "Other/Proprietary License"),
        ),
        (["License: 3-Clause BSD License"], ("3-Clause BSD License",)),
        (["License: UNKNOWN"], ()),
        (["License: Copyright (c) Somebody", "        All rights reserved."], ()),
        ([], ()),
    ],
)
def test_a_license_is_what_the_distribution_states(lines: list[str], licenses: tuple[str, ...]):
    """An SPDX expression first; the text of a licence is no name of it."""
    found = Installed.of(fake("x", "1", *lines))
    assert found is not None
    assert licenses == found.licenses
