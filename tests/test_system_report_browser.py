"""report.html in a real Chromium: nothing breaks, nothing is hidden, at every width and colour."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporter.report import ReportContent, html

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PHONE, DESK = (375, 812), (1400, 900)
SECTIONS = ("road", "parity", "recipes", "mixed", "layers", "ranges", "images", "engine", "inputs")
OVERLAP = """() => [...document.querySelectorAll("text, h1, h2, td, th, dd")]
    .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)
    .filter(e => !e.closest(".scroll")).map(e => e.textContent)"""
CONTRAST = """() => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = rgb(c).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor, a = rgb(c)[3];
    if (a === undefined || a > 0) return c; } return "rgb(255, 255, 255)"; };
  const seen = {};
  const written = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  for (const e of document.querySelectorAll("header *, nav *, main *:not(svg *)"))
    if (e.getClientRects().length && written(e)) {
      const [a, b] = [getComputedStyle(e).color, behind(e)].map(light);
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) seen[`${e.tagName}.${e.className}`] = ratio;
    }
  return seen; }"""


def _browser_or_reason() -> str:
    """Where the browser is; skips without one, but CI must have it."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        message = "no Chromium on this machine: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{message}; CI must not leave these tests out")
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One headless Chromium for the tests of this file."""
    executable = _browser_or_reason()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, in a container, Chromium's own sandbox does not start.
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Opened = Callable[..., "Page"]


@pytest.fixture
def opened(browser: Browser, report_content: ReportContent, tmp_path: Path) -> Iterator[Opened]:
    """Open a report; whatever the page complains about or asks for fails the test at its end."""
    troubles: list[str] = []
    pages: list[Page] = []

    def show(
        size: tuple[int, int] = DESK, scheme: str = "light", content: ReportContent | None = None
    ) -> Page:
        path = tmp_path / "report.html"
        path.write_text(html(content or report_content), encoding="utf-8")
        page = browser.new_page(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on(
            "request",
            lambda asked: (
                troubles.append(f"request: {asked.url[:80]}")
                if not asked.url.startswith(("data:", path.as_uri()))
                else None
            ),
        )
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()
    assert [] == troubles


@pytest.mark.parametrize("size", [PHONE, (768, 1024), DESK])
def test_every_section_is_visible_and_nothing_runs_over(
    opened: Opened, size: tuple[int, int]
) -> None:
    """At phone, tablet and desk width the page is as wide as the window."""
    page = opened(size)
    for section in SECTIONS:
        assert page.locator(f"#{section}").is_visible(), section
        assert page.locator(f"#{section} h2").first.is_visible(), section
    assert size[0] == page.evaluate("document.documentElement.scrollWidth")
    assert [] == page.evaluate(OVERLAP)


def test_the_pipeline_is_drawn_once_at_any_width(opened: Opened) -> None:
    """Across on a desk, from top to bottom on a phone."""
    for size, shown, hidden in ((DESK, "wide", "tall"), (PHONE, "tall", "wide")):
        page = opened(size)
        assert page.locator(f"svg.road.{shown}").is_visible()
        assert not page.locator(f"svg.road.{hidden}").is_visible()


def test_dark_mode_is_dark_and_everything_can_be_read(opened: Opened) -> None:
    """Every text has a contrast of at least 4.5 to what is behind it, in both modes."""
    grounds = []
    for scheme in ("light", "dark"):
        page = opened(scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert {} == page.evaluate(CONTRAST), scheme
    assert ["rgb(255, 255, 255)", "rgb(16, 21, 28)"] == grounds


def test_pictures_are_shown(opened: Opened) -> None:
    """Every thumbnail decodes."""
    widths = opened().evaluate("[...document.images].map(image => image.naturalWidth)")
    assert [64] * 8 == widths


def test_every_link_can_be_reached_and_followed_by_keyboard(opened: Opened) -> None:
    """Tab goes through the links in order, with a visible focus; Enter leads to the section."""
    page = opened()
    links = page.evaluate("[...document.links].map(link => link.hash)")
    reached = []
    for _ in links:
        page.keyboard.press("Tab")
        focus = "getComputedStyle(document.activeElement).outlineStyle"
        assert "none" != page.evaluate(focus)
        reached.append(page.evaluate("document.activeElement.hash"))
    assert links == reached
    page.keyboard.press("Enter")
    assert links[-1] == page.evaluate("location.hash")


def test_the_report_prints(opened: Opened, tmp_path: Path) -> None:
    """A PDF of a few pages, light even in dark mode, without the navigation."""
    page = opened(scheme="dark")
    pdf = page.pdf(format="A4", print_background=True)
    assert b"%PDF-" == pdf[:5]
    assert 2 <= pdf.count(b"/Type /Page\n") <= 12
    page.emulate_media(media="print")
    assert "rgb(255, 255, 255)" == page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert not page.locator("nav").is_visible()


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_layer_at_fault_is_in_the_first_screen(
    opened: Opened, report_content: ReportContent, size: tuple[int, int]
) -> None:
    """Without scrolling, on a phone too."""
    row = {"operator": "Conv", "explained_db": 144.0, "limit_db": 100.0}
    rows = [{**row, "name": f"l{n}", "sqnr_db": 9.0, "deviates": n == 3} for n in range(5)]
    found = {
        "stage": "int8", "reference": "simplified", "layer": "l3", "rule": "A rule.", "rows": rows,
        "sentence": "l3 deviates", "detail": "by 9 dB", "images": 4,
    }  # fmt: skip
    content = replace(
        report_content,
        parity={**report_content.parity, "verdict": "fail", "localization": found},
        failure="parity failed at stage int8: SQNR is 9 dB; l3 deviates; nothing was published",
    )
    box = opened(size, content=content).locator("#culprit").bounding_box()
    assert box is not None
    assert 0 <= box["y"] < box["y"] + box["height"] <= size[1]


def test_without_a_browser_ci_fails_and_others_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing Chromium can never pass for a tested page."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must not leave these tests out"):
        _browser_or_reason()
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no Chromium on this machine"):
        _browser_or_reason()
