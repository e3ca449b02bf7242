"""What the pages say is so: links, sentences of errors, tables of devices, the site itself."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from exporter import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")]
PAGES += [ROOT / "examples" / "README.md", ROOT / "models" / "weights" / "a0_digits.md"]
PAGES += sorted(DOCS.glob("*.md"))

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(page: Path) -> set[str]:
    """The headings of a page as addresses."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    """To a file of the project, and where it names a heading, to one of that page."""
    for path, anchor in _LINK.findall(_FENCE.sub("", page.read_text("utf-8"))):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def words(text: str) -> list[str]:
    """What a reader reads."""
    return re.findall(r"\w[\w./=-]*", text)


def test_the_first_result_takes_less_than_a_hundred_words():
    """From the README's top to the output of its first command, which is the first line of code."""
    text = (ROOT / "README.md").read_text("utf-8")
    before, _, result = text.partition("```text\n")
    assert "```sh\nmake engine MODEL=A0 PRECISION=int8\nmake test\n```" in before
    assert 50 < len(words(before)) < 100
    assert "│ int8            │ pass " in result.partition("```")[0]
    assert len(text.splitlines()) < 150


def rendered(node: ast.AST) -> str:
    """A string of the source, with … for what is computed."""
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(rendered(value) for value in node.values))
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return node.value if is_text else "…"


def sentences_of_the_code() -> dict[str, int | None]:
    """Every string of the three packages but docstrings, and the exit code of the error it makes.

    None where the string is no argument of an error of exporter.errors.
    """
    found: dict[str, int | None] = {}
    packages = ("exporter", "models", "calibration")
    for path in (path for name in packages for path in ROOT.glob(f"{name}/**/*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr | ast.Constant) and node not in docstrings:
                found.setdefault(rendered(node), None)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                kind = getattr(errors, node.func.id, None)
                if isinstance(kind, type) and issubclass(kind, errors.ExporterError):
                    found[rendered(node.args[0])] = kind.exit_code
    return found


def test_every_sentence_of_troubleshooting_is_in_the_code():
    """Word by word, with … where the code puts something in, under the exit code that it has."""
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    known = sentences_of_the_code()
    judged = 0
    for section in text.split("\n## ")[1:]:
        code = int(re.search(r"\(exit code (\d+)\)", section.splitlines()[0])[1])
        for sentence in re.findall(r"^### `(.+)`$", section, re.MULTILINE):
            matches = [string for string in known if sentence in string]
            assert matches, sentence
            codes = {known[string] for string in matches} - {None}
            assert codes <= {code}, sentence
            judged += bool(codes)
    assert judged >= 20
    assert len(re.findall(r"^### `.+`$", text, re.MULTILINE)) == text.count("\n### ") >= 35


def test_the_tables_of_devices_are_those_of_the_code():
    """`python docs/scripts/devices.py` would change nothing."""
    script = DOCS / "scripts" / "devices.py"
    specification = importlib.util.spec_from_file_location("docs_devices", script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    page = module.PAGE.read_text("utf-8")
    assert module.with_tables(page) == page
    assert "| `orin-nano` | Jetson Orin Nano | sm87 |" in page
    with pytest.raises(ValueError, match="needs the markers"):
        module.with_tables("no table")


def test_the_api_page_lists_every_name_and_argument():
    """The arguments of `export` in their order, with their defaults; the names of the package."""
    import exporter

    page = (DOCS / "api.md").read_text("utf-8")
    assert f"from exporter import {', '.join(exporter.__all__)}\n" in page
    rows = re.findall(r"^\| `(\*{0,2}\w+)` \|.*\| (.*?) \|$", page, re.MULTILINE)
    parameters = list(inspect.signature(exporter.export).parameters.values())[1:]
    assert [name.lstrip("*") for name, _ in rows] == [each.name for each in parameters]
    for (_, default), parameter in zip(rows[:-1], parameters[:-1], strict=True):
        wanted = repr(parameter.default).replace("'", '"')
        assert default.startswith(f"`{wanted}`"), parameter.name
    for name in re.findall(r"`bundle\.(\w+)", page):
        assert name in dir(exporter.Bundle), name


def test_every_page_is_in_the_navigation():
    """Once each; what lies outside docs/ is there under the name that the hook gives it."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    listed = re.findall(r"[\w-]+\.md", str(navigation))
    outside = re.findall(r'": "(\w+\.md)"', (DOCS / "scripts" / "site.py").read_text("utf-8"))
    assert sorted([*(path.name for path in DOCS.glob("*.md")), *outside]) == sorted(listed)


def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path):
    """`mkdocs build --strict`; no page loads a script, style, font or picture from elsewhere."""
    pytest.importorskip("material", reason="the extra docs is not installed; `make docs` builds")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert (0, False) == (done.returncode, "WARNING" in done.stderr), done.stderr
    loads = r"<(?:script|img|iframe|link|source)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//"
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 18
    for page in pages:
        text = page.read_text("utf-8")
        assert [] == re.findall(loads, text), page.name
    assert (tmp_path / "source" / "benchmarks" / "results" / "int8_quality.txt").is_file()
    assert 'href="source/benchmarks/int8_quality.py"' in (tmp_path / "int8.html").read_text()
