"""Many exports as one job: what a file asks for, what waits for what, what a re-run keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.bundle import ENGINE, MANIFEST
from exporter.cases import CaseResult, Status
from exporter.errors import InputError
from exporter.matrix import Cell, MatrixState, index_page, read_matrix, run_cells
from exporter.matrix.page import front, measure_of, rows_of
from exporter.matrix.schedule import followed
from exporter.matrix.state import STATE
from exporter.matrix.subprocess_pool import WORKER, SubprocessPool
from exporter.request import ExportRequest
from exporter.stage_cache import keys
from models.registry import PublicWeightsError


def cells_of(tmp_path: Path, text: str) -> tuple[Cell, ...]:
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return read_matrix(path).cells


def test_cells_are_the_product_of_the_axes(tmp_path: Path) -> None:
    """The last axis runs fastest; the recipe is of int8 cells only."""
    cells = cells_of(
        tmp_path,
        """
        [matrix]
        precision = ["fp16", "int8"]
        model = ["A0", "B1"]
        recipe = ["mse", "full"]
        target = ["sm86", "orin,sm89"]
        [defaults]
        weights = "random"
        """,
    )
    assert [
        "A0-fp16-sm86", "A0-fp16-orin_sm89", "A0-int8-mse-sm86", "A0-int8-mse-orin_sm89",
        "A0-int8-full-sm86", "A0-int8-full-orin_sm89",
    ] == [cell.name for cell in cells[:6]]  # fmt: skip
    assert 12 == len(cells)
    last = cells[-1].request
    assert ("B1", "int8", "full", "orin,sm89", "random") == (
        last.model, last.precision, last.recipe, last.target, last.weights,
    )  # fmt: skip


def test_overrides_and_exclusions_hold_where_all_their_values_do(tmp_path: Path) -> None:
    (tmp_path / "b1.pth").write_bytes(b"")
    cells = cells_of(
        tmp_path,
        """
        [matrix]
        model = ["A0", "B1"]
        precision = ["fp16", "fp32"]
        [[override]]
        when = { model = "B1" }
        weights = "b1.pth"
        [[override]]
        when = { model = "B1", precision = "fp32" }
        weights = "random"
        [[exclude]]
        model = "A0"
        precision = "fp32"
        """,
    )
    assert {
        "A0-fp16": None, "B1-fp16": str(tmp_path / "b1.pth"), "B1-fp32": "random",
    } == {cell.name: cell.request.weights for cell in cells}  # fmt: skip


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        cells_of(
            tmp_path,
            """
            [matrix]
            model = ["A0"]
            precison = ["int8"]
            target = []
            [defaults]
            batch = "many"
            [[override]]
            weights = "random"
            [axes]
            """,
        )
    for words in (
        "[matrix], precison: unknown (nearest: precision",
        "[matrix], target: has no values",
        "[[override]] 1, when: must be a table",
        "the file, axes: unknown",
        "[defaults], batch: batch 'many' must be",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "[matrix], model: is missing"),
        ('[matrix]\nmodel = ["A0"]\n[[exclude]]\nmodel = "A0"', "has no cells"),
        ('[matrix]\nmodel = ["A0"]\ntarget = ["a/sm86", "b/sm86"]', "unknown target"),
        ('[matrix]\nmodel = ["A0"]\nmax_drop = [0.1, 0.1]\nbatch = [[1]]', "texts and numbers"),
        ('[matrix]\nmodel = [""]', "model"),
        (
            '[matrix]\nmodel = ["A0"]\n'
            + "\n".join(f"{key} = {list(range(1, 30))}" for key in (
                "calibration_images", "evaluation_images", "workspace_mib")),
            "has 24389 cells, at most 10000",
        ),
        ("[matrix", "is no TOML"),
    ],
)  # fmt: skip
def test_a_matrix_that_cannot_be_made_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        cells_of(tmp_path, text)


KEYS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3),
    st.tuples(st.sampled_from("123"), st.sampled_from("xyz")).map(lambda k: (k[0], k[0] + k[1])),
    max_size=12,
)


class InstantPool:
    """Runs a cell when it is waited for; remembers who ran, and beside whom."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.running: list[Cell] = []
        self.order: list[tuple[str, tuple[str, ...]]] = []

    def start(self, cell: Cell, after: tuple[str, ...]) -> None:
        assert len(self.running) < self.width
        self.running.append(cell)
        self.order.append((cell.name, after))

    def wait(self) -> tuple[Cell, CaseResult]:
        cell = self.running.pop()
        return cell, result(cell.name)


def result(name: str, **fields: object) -> CaseResult:
    return CaseResult(name=name, status=Status.PASS, seconds=1.0, **fields)  # type: ignore[arg-type]


def cell(name: str, **options: str) -> Cell:
    request = ExportRequest(model="A0", precision="fp32", **options)  # type: ignore[arg-type]
    return Cell(name=name, axes={"model": name}, request=request)


@given(keys=KEYS, width=st.integers(1, 4))
def test_every_shared_stage_is_made_by_one_cell_before_others_want_it(
    keys: dict[str, tuple[str, str]], width: int
) -> None:
    pool, ended = InstantPool(width), []
    cells = [cell(name) for name in keys]
    run_cells(cells, keys, pool, lambda done, _: ended.append(done.name))
    assert sorted(keys) == sorted(ended)
    started = [name for name, _ in pool.order]
    for stage in {key for own in keys.values() for key in own}:
        users = [name for name in keys if stage in keys[name]]
        for follower in users[1:]:
            assert started.index(users[0]) < started.index(follower)
    assert dict(pool.order) == dict(followed(keys))


def test_nobody_waits_for_a_cell_that_is_kept() -> None:
    """Of those that are run, the first makes what they share."""
    pool, ended = InstantPool(1), []
    keys = {"kept": ("f", "d"), "a": ("f", "d"), "b": ("f", "e")}
    run_cells([cell("a"), cell("b")], keys, pool, lambda done, _: ended.append(done.name))
    assert [("a", ()), ("b", ("a",))] == pool.order


def ended_in_a_process(wanted: Cell, command: tuple[str, ...] = WORKER) -> CaseResult:
    with SubprocessPool(width=1, threads=1, cached=False, command=command) as pool:
        pool.start(wanted, ())
        found, result = pool.wait()
    assert found is wanted
    return result


def test_a_cell_finds_this_package_where_another_models_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process stays in the user's folder, whose paths the request has."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    result = ended_in_a_process(cell("a", weights="absent.pth"))
    assert (2, "checkpoint absent.pth does not exist or is no file") == (
        result.exit_code, result.message,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL: it said nothing"),
        ("import os; os.kill(os.getpid(), 40)", "was ended by signal 40"),
        ("raise SystemExit('out of luck')", "ended with exit code 1: out of luck"),
        ("print('no result')", "its process is of no use: Expecting value"),
        (None, "its process is of no use: "),
    ],
)
def test_a_cell_ends_however_its_process_does(program: str | None, words: str) -> None:
    """Nobody waits for ever; the cell is an error of the environment."""
    command = (sys.executable, "-c", program) if program else ("/nonexistent/python",)
    result = ended_in_a_process(cell("a"), command)
    assert (Status.ERROR, 3) == (result.status, result.exit_code)
    assert words in str(result.message)


def test_a_cell_waits_for_the_first_with_its_float_graph_and_the_first_with_its_draft() -> None:
    keys = {"a": ("f", "d1"), "b": ("f", "d2"), "c": ("f", "d2"), "d": ("g", "d3"), "e": ()}
    assert {"a": (), "b": ("a",), "c": ("a", "b"), "d": (), "e": ()} == followed(keys)


def published(folder: Path, name: str) -> Cell:
    """A cell whose bundle is there."""
    out = folder / name
    out.mkdir(parents=True)
    (out / "parity.json").write_text('{"stages": []}')
    from exporter.bundle import file_sha256

    files = {"parity.json": {"sha256": file_sha256(out / "parity.json"), "bytes": 14}}
    known = {"spec": {"precision": "fp32", "batch": "1:8:32"}, "model": {}}
    (out / MANIFEST).write_text(json.dumps({"schema_version": 1, **known, "files": files}))
    return cell(name, out=str(out))


def test_a_rerun_keeps_what_passed_and_is_whole(tmp_path: Path) -> None:
    """Not what failed, changed, is damaged or added to, lies in another's place, or is new."""
    names = ("whole", "damaged", "changed", "failed", "other", "added")
    cells = [published(tmp_path, name) for name in names]
    state = MatrixState.resume(tmp_path, cells)
    assert tuple(cells) == state.missing
    for each in cells:
        state.record(each, result(each.name))
    failed = replace(result("failed"), status=Status.FAIL, exit_code=1, message="12.0 dB")
    state.record(cells[3], failed)
    (tmp_path / "damaged" / "parity.json").write_text("{}")
    (tmp_path / "added" / ENGINE).write_bytes(b"garbage")
    other = tmp_path / "other" / MANIFEST
    other.write_text(other.read_text().replace('"fp32"', '"int8"'))
    cells[2] = replace(cells[2], request=replace(cells[2].request, batch="4"))
    again = MatrixState.resume(tmp_path, [*cells, cell("new")])
    assert {"whole"} == again.kept
    missing = ["damaged", "changed", "failed", "other", "added", "new"]
    assert missing == [cell.name for cell in again.missing]
    assert state.results["whole"] == again.results["whole"]


def test_a_checkpoint_that_cannot_be_downloaded_fails_its_cell_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the network nothing is known of the cell before it runs, so it shares no stage."""

    def offline(*_arguments: object) -> None:
        raise PublicWeightsError("no network")

    monkeypatch.setattr(keys, "fetch_public", offline)
    cells = [cell("public", weights="hub"), published(tmp_path, "other")]
    state = MatrixState.resume(tmp_path, cells)
    assert tuple(cells) == state.missing
    assert ((), "") == (state.keys["public"].shared, state.keys["public"].own)
    assert "" != state.keys["other"].own


@pytest.mark.parametrize("text", ["{", "[]", '{"cells": [1]}', '{"cells": [{"key": 1}]}'])
def test_a_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE).write_text(text)
    with pytest.raises(InputError, match="remove it to begin anew"):
        MatrixState.resume(tmp_path, [cell("a")])


def ended(figures: Sequence[tuple[int, float]], **fields: object) -> MatrixState:
    """A state whose cells have these sizes and accuracies."""
    cells = [cell(f"c{index}") for index in range(len(figures))]
    state = MatrixState(folder=Path(), cells=cells)
    for each, (size, accuracy) in zip(cells, figures, strict=True):
        row = {"stage": "int8", "sqnr_db": accuracy, "top1": accuracy / 100}
        state.results[each.name] = result(
            each.name, stages=(row,), files={"model.onnx": size}, **fields
        )
    return state


@given(figures=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9))
def test_the_front_has_those_that_no_other_one_beats(figures: list[tuple[int, int]]) -> None:
    rows = rows_of(ended(figures))
    best = {row.cell.name for row in front(rows, measure_of(rows))}
    for index, (size, accuracy) in enumerate(figures):
        beaten = any(
            (s <= size and a >= accuracy) and (s, a) != (size, accuracy) for s, a in figures
        )
        if beaten:
            assert f"c{index}" not in best
    beating = {figures[int(name[1:])] for name in best}
    assert all(any(s <= size and a >= accuracy for s, a in beating) for size, accuracy in figures)


def test_the_page_links_every_bundle_and_escapes_what_comes_from_outside() -> None:
    state = ended([(10_000_000, 70.0), (20_000_000, 75.0)])
    broken = cell("<b>")
    state.cells = [*state.cells, broken, cell("later")]
    state.results["<b>"] = replace(
        result("<b>"), status=Status.FAIL, exit_code=1, message="parity <failed>"
    )
    page = index_page(state, "my & matrix")
    assert 'href="c0/report.html"' in page
    assert 'href="c1/report.html"' in page
    assert "parity &lt;failed&gt;" in page
    assert 'href="%3Cb%3E.failed.html"' in page
    assert "my &amp; matrix" in page
    assert "2 of 4 bundles are published; 1 failed; 1 still to be made" in page
    assert "c1: 75.00 %, 20.0" in page
    assert "<b>" not in page
