"""report.html: what is in it, that it is well-formed, and that nothing from outside is code."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.images import Preprocess
from exporter.console import print_ledger
from exporter.report import ReportContent, html, junit_xml, thumbnails
from exporter.report.numbers import decibel, points, seconds, significant, size, times
from exporter.report.plots import linear, logarithmic
from exporter.report.road import stations

SECTIONS = (
    "road", "parity", "recipes", "mixed", "layers", "ranges", "images", "engine", "inputs",
    "cost", "again",
)  # fmt: skip
VOID = {"meta", "link", "img", "br", "input", "hr"}
HOSTILE = """</style></title><script>alert("x")</script><img src=x onerror='y'>"""


class Page(HTMLParser):
    """Every start tag must be closed, in order; remembers ids, links and heading levels."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert [] == self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()


def test_every_section_is_there_and_linked(report_content: ReportContent) -> None:
    """Ids are unique, and every link of the page leads to one of them."""
    page = Page(html(report_content))
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert {f"#{section}" for section in SECTIONS} <= set(links)
    assert {str(link).removeprefix("#") for link in links} <= set(page.ids)


def test_headings_step_down_by_one_and_figures_have_words(report_content: ReportContent) -> None:
    """One h1; every picture and drawing says what it shows, or is decoration."""
    page = Page(html(report_content))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert (1, 1) == (levels[0], levels.count(1))
    assert max(b - a for a, b in pairwise(levels)) <= 1
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    for tag, a in page.tags:
        if tag == "svg":
            assert a.get("aria-hidden") or a.get("aria-label") or a.get("aria-labelledby")


def test_the_page_asks_for_nothing_outside_itself(report_content: ReportContent) -> None:
    """No address, no script; sources are data or places in the page."""
    text = html(report_content)
    assert "http" not in text
    assert not re.search(r"<script|@import|url\(", text)
    for _, attributes in Page(text).tags:
        for name in ("src", "href"):
            if name in attributes:
                assert str(attributes[name]).startswith(("data:", "#"))


def hostile(value: Any) -> Any:
    """The same document with every text from outside turned into an attack."""
    if isinstance(value, Mapping):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    keep = ("pass", "fail", "not_run", "int8", "half", "A0", "original")
    return HOSTILE if isinstance(value, str) and value not in keep else value


def test_hostile_names_are_only_text(report_content: ReportContent) -> None:
    """Class names, paths, notes, reasons, versions: all of them at once."""
    spec = {**report_content.manifest["spec"], "name": HOSTILE, "out": HOSTILE}
    manifest = {**hostile(report_content.manifest), "spec": spec}
    content = replace(
        report_content,
        manifest=manifest,
        parity=hostile(report_content.parity),
        engine=hostile(report_content.engine),
        files={HOSTILE: 1},
        seconds={HOSTILE: 1.0},
    )
    text = html(content)
    page = Page(text)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_verdict_says_what_passed_and_what_did_not_run(report_content: ReportContent) -> None:
    """One sentence, with the reason; top-1 before and after beside it."""
    text = html(report_content)
    assert "reparameterized and int8 passed on 10 real images" in text
    assert "engine did not run: no NVIDIA driver." in text
    assert "98.89\u00a0% before: \u22120.28\u00a0points" in text
    assert "sm86, sm89" in text
    assert "trtexec --onnx=m" in text


def test_stages_that_were_compared_on_fewer_images_say_so(
    report_content: ReportContent,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the verdict, in the row, and in the terminal's table, which else needs no such column."""
    monkeypatch.setenv("COLUMNS", "160")
    rows = [dict(row) for row in report_content.parity["stages"]]
    rows[0]["images"], rows[1]["images"] = 4, 10
    parity = {**report_content.parity, "stages": rows}
    text = html(replace(report_content, parity=parity))
    assert "passed on 10 real images (reparameterized on the first 4 of them)" in text
    assert '<td class="n">4</td>' in text
    print_ledger(parity, "A0")
    assert "images" in capsys.readouterr().out.splitlines()[2]
    rows[0]["images"] = 10
    assert "of them)" not in html(replace(report_content, parity=parity))
    print_ledger(parity, "A0")
    assert "images" not in capsys.readouterr().out.splitlines()[2]


def test_a_failed_run_shows_the_layer_first(report_content: ReportContent) -> None:
    """The layer stands in the header, the engine's section is not there."""
    rows = [
        {"name": f"stage{n}.conv", "operator": "Conv", "sqnr_db": 200.0 if n != 3 else 12.5,
         "explained_db": 144.0, "limit_db": 100.0, "deviates": n == 3}
        for n in range(5)
    ]  # fmt: skip
    found = {
        "stage": "int8", "reference": "simplified", "layer": "stage3.conv", "rule": "A rule.",
        "sentence": "the first layer that deviates is stage3.conv: by 12.5 dB",
        "detail": "by 12.5 dB", "images": 4, "rows": rows,
    }  # fmt: skip
    nothing = dict.fromkeys(("model", "reparameterization"))
    content = replace(
        report_content,
        manifest={**report_content.manifest, **nothing},
        parity={**report_content.parity, "verdict": "fail", "localization": found},
        engine=None,
        files={},
        failure=f"parity failed at stage int8: why; {found['sentence']}; nothing was published",
        failed_in="publish",
    )
    text = html(content)
    header = text[: text.index("</header>")]
    assert "First layer that deviates: <code>stage3.conv</code>" in header
    assert "Parity failed at stage int8: why; nothing was published." in header
    assert {"deviation", "parity"} <= set(Page(text).ids)
    assert "engine" not in Page(text).ids
    whole = replace(content, parity=report_content.parity, failure="onnxsim failed: why")
    assert "Onnxsim failed: why." in html(whole)
    # A block that cannot be fused exactly: nothing was compared yet.
    empty = {**report_content.parity, "stages": []}
    for key in ("ladder", "mixed_precision", "layers", "worst_images"):
        del empty[key]
    early = Page(html(replace(content, parity=empty, failure="why", failed_in="reparameterize")))
    assert {"road", "parity", "inputs", "again"} == set(early.ids) & set(SECTIONS) - {"cost"}


def test_stations_tell_status_closeness_and_time(report_content: ReportContent) -> None:
    """A stage is judged by its row; a row without a stage of its own stands there too."""
    parity = report_content.parity
    found = stations(parity, {"load": 1.0, "quantize": 2.0, "publish": 0.5}, "int8")
    assert [
        ("load", "done", "", "1.0\u00a0s"),
        ("quantize", "pass", "37.3\u00a0dB", "2.0\u00a0s"),
        ("reparameterize", "pass", "37.3\u00a0dB", ""),
        ("engine", "not_run", "not run", ""),
        ("publish", "done", "", "0.50\u00a0s"),
    ] == [(s.name, s.status, s.figure, s.taken) for s in found]
    last = stations({"stages": []}, {"load": 1.0}, "int8", "simplify")[-1]
    assert ("simplify", "fail") == (last.name, last.status)


def test_junit_counts_what_failed_and_what_did_not_run(report_content: ReportContent) -> None:
    """One case a stage; the reason is the message."""
    parity = {**report_content.parity}
    parity["stages"] = [dict(row) for row in parity["stages"]]
    parity["stages"][1] |= {"status": "fail", "reason": "SQNR is <3> dB"}
    suite = ElementTree.fromstring(junit_xml(parity, "repvgg.A0.int8"))
    assert ("3", "1", "1") == tuple(suite.get(k) for k in ("tests", "failures", "skipped"))
    assert "SQNR is <3> dB" == suite[1][0].get("message")


def test_figures_as_people_read_them() -> None:
    """Units, signs, powers of ten; a dash where nothing was measured."""
    assert ("37.3\u00a0dB", "\u22123.0\u00a0dB", "exact", "\u2013") == tuple(
        map(decibel, (37.25146, -3.0, 200.0, None))
    )
    assert "1.43\u00a0\u00d7\u00a010\u207b\u2076" == significant(1.43e-6)
    assert ("0.104", "0") == (significant(0.10411), significant(0.0))
    assert ("unchanged", "+1.00\u00a0points") == (points(0.5, 0.50001), points(0.5, 0.51))
    assert ("596\u00a0B", "10.3\u00a0MB") == (size(596), size(10318508))
    assert ("0.21\u00a0s", "14.9\u00a0s") == (seconds(0.21), seconds(14.927))
    assert ("\u00d72.00", "\u00d717.4") == (times(2.0), times(17.44))


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.booleans())
def test_a_linear_axis_holds_its_values_between_round_ticks(
    values: list[float], from_zero: bool
) -> None:
    """Places grow with values; ticks are evenly spaced and few."""
    scale = linear(values, from_zero=from_zero)
    size = max(map(abs, (1.0, *values)))
    assert scale.low <= min(values) + 1e-8 * size
    assert scale.high >= max(values) - 1e-8 * size
    assert scale.low < scale.high
    assert 2 <= len(scale.ticks) <= 8
    ordered = [scale.place(value) for value in sorted(values)]
    assert ordered == sorted(ordered)


@settings(deadline=None)
@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20))
def test_a_logarithmic_axis_holds_its_values_between_decades(values: list[float]) -> None:
    """At most seven ticks, however many decades."""
    scale = logarithmic(values)
    assert scale.low <= min(values) * (1 + 1e-9)
    assert scale.high >= max(values) * (1 - 1e-9)
    assert all(math.isclose(t, 10.0 ** round(math.log10(t))) for t in scale.ticks)
    assert 2 <= len(scale.ticks) <= 7


@pytest.mark.parametrize("known", [True, False])
def test_thumbnails_undo_the_normalization(known: bool) -> None:
    """What the network saw, at most 96 pixels wide; without a preprocessing it is stretched."""
    preprocess = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)) if known else None
    picture = np.zeros((3, 200, 100), dtype=np.float32)
    picture[:, :100] = 1.0
    (uri,) = thumbnails({4: picture, 5: np.zeros((7, 3, 3), np.float32)}, preprocess).values()
    from base64 import b64decode
    from io import BytesIO

    from PIL import Image

    shown = np.asarray(Image.open(BytesIO(b64decode(uri.split(",")[1]))))
    assert (96, 48, 3) == shown.shape
    assert ([178, 153, 128] if known else [255, 255, 255]) == shown[0, 0].tolist()
