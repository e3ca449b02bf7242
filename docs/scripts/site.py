"""mkdocs hook: pages and files that live outside docs/ become part of the site, with their links.

Links are written for the repository, where people read these files too: ``../benchmarks/paper.py``
from a page of docs/. A link into docs/ stays; one to a file of `PAGES` leads to the page made of
it; any other leads to a copy of the file under ``source/``. So the site needs no network, and
``mkdocs build --strict`` sees every link.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "models/weights/a0_digits.md": "bundled_network.md",
}
"""Markdown outside docs/, by its path in the repository -> its path in the site."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `PAGES`, and a copy of every file that a page links to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    linked = {
        path
        for file in files.documentation_pages()
        for path in _links(Path(file.abs_src_path).read_text("utf-8"), file.src_uri)
    }
    for path in sorted(linked):
        uri = _site_path(path)
        if files.get_file_from_path(uri) is None and (ROOT / path).is_file():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links as they are in the site."""
    here = page.file.src_uri

    def moved(match: re.Match[str]) -> str:
        target = _site_path(_repository_path(match[1], here))
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def _links(markdown: str, here: str) -> Iterator[str]:
    for match in _LINK.finditer(markdown):
        yield _repository_path(match[1], here)


def _repository_path(link: str, here: str) -> str:
    """What ``link`` means on the page ``here`` of the site, from the repository's root."""
    origin = next((path for path, uri in PAGES.items() if uri == here), f"docs/{here}")
    return posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))


def _site_path(path: str) -> str:
    """Where the repository's ``path`` is in the site; a folder is its README."""
    if (ROOT / path / "README.md").is_file():
        path = posixpath.normpath(f"{path}/README.md")
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}"
