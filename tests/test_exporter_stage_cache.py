"""The store of stages: whole entries or none, and keys that hold everything a stage depends on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.errors import InputError
from exporter.parity.ledger import Ledger
from exporter.request import ExportRequest, validate
from exporter.spec import ExportSpec, Precision, Recipe
from exporter.stage_cache import (
    CACHE_VARIABLE,
    CachedStages,
    StageStore,
    draft_inputs,
    float_inputs,
    keys,
    open_cache,
)
from exporter.stage_cache.location import parse_size
from exporter.stage_cache.store import key_of
from exporter.stage_cache.use import NOTHING_LIKE_IT, OFF
from exporter.stage_cache.values import read_value, to_json, write_value

FILES = st.dictionaries(
    st.sampled_from(["model.onnx", "draft.json", "a", "b.npz"]),
    st.binary(max_size=300),
    min_size=1,
)
KEY = key_of("draft", {"recipe": "mse"})


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(root=tmp_path / "cache", limit=10_000)


def put(store: StageStore, key: str, files: Mapping[str, bytes], **inputs: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        store.put("draft", key, inputs, 1.5, sorted(Path(folder).iterdir()))


def fetched(store: StageStore, key: str) -> dict[str, bytes] | None:
    with tempfile.TemporaryDirectory() as folder:
        if store.fetch("draft", key, Path(folder)) is None:
            assert [] == list(Path(folder).iterdir()), "nothing half copied"
            return None
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@given(files=FILES)
def test_what_was_put_is_fetched(files: dict[str, bytes]) -> None:
    """Byte for byte, with its inputs and what making it took."""
    with tempfile.TemporaryDirectory() as root:
        store = StageStore(root=Path(root), limit=10_000)
        put(store, KEY, files, recipe="mse")
        assert files == fetched(store, KEY)
        (entry,) = store.entries()
        assert ({"recipe": "mse"}, 1.5) == (entry.inputs, entry.seconds)
        assert sum(map(len, files.values())) == entry.bytes


@given(files=FILES, data=st.data())
@settings(deadline=None)
def test_an_entry_that_is_damaged_anywhere_is_removed(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    """One bit of one file, its description included, or one file shorter or gone."""
    with tempfile.TemporaryDirectory() as root:
        store = StageStore(root=Path(root), limit=10_000)
        put(store, KEY, files)
        folder = Path(root) / "v1" / "draft" / KEY
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        content = bytearray(path.read_bytes())
        how = data.draw(st.sampled_from(["flip", "cut", "delete"] if content else ["delete"]))
        if how == "flip":
            position = data.draw(st.integers(0, 8 * len(content) - 1))
            content[position // 8] ^= 1 << position % 8
            path.write_bytes(content)
        elif how == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            path.unlink()
        assert fetched(store, KEY) is None
        assert () == store.entries()
        put(store, KEY, files)
        assert files == fetched(store, KEY)


@given(sizes=st.lists(st.integers(0, 4000), min_size=1, max_size=8))
@settings(deadline=None)
def test_the_cache_stays_within_its_limit(sizes: list[int]) -> None:
    """Or holds nothing but the newest entry, if that alone is larger."""
    with tempfile.TemporaryDirectory() as root:
        store = StageStore(root=Path(root), limit=5_000)
        for index, size in enumerate(sizes):
            put(store, key_of("draft", {"n": str(index)}), {"a": bytes(size)})
            entries = store.entries()
            assert sum(entry.bytes for entry in entries) <= store.limit
            assert key_of("draft", {"n": str(index)}) in {entry.key for entry in entries}


def test_damaged_entries_make_room_first(store: StageStore) -> None:
    """Nobody asks for them again once the code has changed, and each counts on the disk."""
    for name in "abc":
        put(store, name, {"a": bytes(3_000)})
        (store.root / "v1" / "draft" / name / "entry.json").write_text("{")
    put(store, "d", {"a": bytes(3_000)})
    assert ["d"] == [path.name for path in (store.root / "v1" / "draft").iterdir()]


@given(files=FILES, data=st.data())
@settings(deadline=None)
def test_an_archive_brings_an_entry_to_another_cache_or_nothing(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    """Whole as it was; with one byte of it changed or its end cut off, whole or not at all."""
    with tempfile.TemporaryDirectory() as root:
        first, second, third = (
            StageStore(root=Path(root) / name, limit=100_000) for name in ("a", "b", "c")
        )
        assert first.pack("draft", KEY) is None
        put(first, KEY, files, recipe="mse")
        archive = first.pack("draft", KEY)
        assert archive is not None
        second.unpack(archive)
        assert files == fetched(second, KEY)
        assert {"recipe": "mse"} == second.entries()[0].inputs
        place = data.draw(st.integers(0, len(archive) - 1))
        changed = archive[:place] + bytes([archive[place] ^ 255]) + archive[place + 1 :]
        third.unpack(data.draw(st.sampled_from([changed, archive[:place]])))
        assert fetched(third, KEY) in (None, files)


def test_what_was_used_longest_ago_makes_room(store: StageStore) -> None:
    for index, name in enumerate("abc"):
        put(store, name, {"a": bytes(3_000)})
        entry = store.root / "v1" / "draft" / name / "entry.json"
        import os

        os.utime(entry, (index, index))
    assert fetched(store, "a") is not None
    put(store, "d", {"a": bytes(3_000)})
    assert {"a", "c", "d"} == {entry.key for entry in store.entries()}


def test_litter_of_a_killed_process_goes_with_the_next_entry(store: StageStore) -> None:
    """Nobody else writes there while an entry is being put."""
    litter = store.root / "v1" / "incoming" / "tmpabc"
    litter.mkdir(parents=True)
    (litter / "model.onnx").write_bytes(b"half")
    put(store, KEY, {"a": b"whole"})
    assert not litter.exists()
    assert {"a": b"whole"} == fetched(store, KEY)


def test_clear_removes_damaged_entries_too(store: StageStore) -> None:
    put(store, "a", {"a": b"1"})
    put(store, "b", {"a": b"2"})
    (store.root / "v1" / "draft" / "a" / "entry.json").write_text("{")
    assert 1 == len(store.entries())
    assert 2 == store.clear()
    assert fetched(store, "b") is None


def _make_once(root: str, log: str) -> None:
    store = StageStore(root=Path(root), limit=10_000)
    with store.making("draft", KEY), tempfile.TemporaryDirectory() as folder:
        if store.fetch("draft", KEY, Path(folder)) is None:
            with Path(log).open("a") as file:
                file.write("made\n")
            put(store, KEY, {"a": b"x" * 2_000})


def test_processes_that_want_the_same_make_it_once(tmp_path: Path) -> None:
    """The others wait and find it."""
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "cache"), str(tmp_path / "log"))
    processes = [context.Process(target=_make_once, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [0] * 4 == [process.exitcode for process in processes]
    assert "made\n" == (tmp_path / "log").read_text()


def spec(**options: object) -> ExportSpec:
    return replace(validate(ExportRequest(model="A0")), **options)  # type: ignore[arg-type]


def test_every_field_of_a_spec_belongs_to_one_stage() -> None:
    """A new field must be given the first stage that looks at it."""
    groups = (keys.FLOAT_FIELDS, keys.DRAFT_FIELDS, keys.ENGINE_FIELDS, keys.UNSEEN_FIELDS)
    placed = [name for group in groups for name in group]
    assert sorted(placed) == sorted(field.name for field in dataclasses.fields(ExportSpec))


@pytest.mark.parametrize(
    ("changed", "float_too"),
    [
        ({"precision": Precision.FP16}, False),
        ({"recipe": Recipe.MSE}, False),
        ({"min_sqnr_db": 30.0}, False),
        ({"calibration_images": 7}, False),
        ({"evaluation_images": 7}, True),
        ({"image_size": (64, 64)}, True),
        ({"weights": "random"}, True),
    ],
)
def test_a_field_changes_the_keys_from_its_stage_on(
    changed: dict[str, object], float_too: bool
) -> None:
    before, after = spec(), spec(**changed)
    assert float_too == (float_inputs(before) != float_inputs(after))
    assert draft_inputs(before, half_scales=False) != draft_inputs(after, half_scales=False)


def test_the_inputs_of_a_draft_have_those_of_its_float_graph() -> None:
    """So that nothing is hashed twice."""
    for precision in (Precision.INT8, Precision.FP16):
        own = spec(precision=precision)
        assert float_inputs(own) == keys.float_part(draft_inputs(own, half_scales=False))


@pytest.mark.parametrize("changed", [{"target": "sm89"}, {"out": Path("b")}, {"backend": "x"}])
def test_what_only_the_builder_sees_leaves_the_draft_as_it_is(changed: dict[str, object]) -> None:
    before, after = spec(), spec(**changed)
    assert draft_inputs(before, half_scales=False) == draft_inputs(after, half_scales=False)


def test_files_count_by_what_is_in_them(tmp_path: Path) -> None:
    """Checkpoint, preprocessing, images: the same names with other bytes are another key."""
    weights, preprocess, images = tmp_path / "a.pth", tmp_path / "p.json", tmp_path / "images"
    images.mkdir()
    for path in (weights, preprocess, images / "1.png", images / "2.png"):
        path.write_bytes(b"before")
    own = spec(weights=str(weights), preprocess=str(preprocess), evaluation=images)
    before = float_inputs(own)
    for path, name in ((weights, "weights"), (preprocess, "preprocess")):
        path.write_bytes(b"after")
        assert before[name] != float_inputs(own)[name]
    (images / "2.png").write_bytes(b"after")
    assert before["evaluation"] != float_inputs(own)["evaluation"]


def stages_of(store: StageStore | None, folder: Path, **inputs: str) -> tuple[str, CachedStages]:
    """The value of one stage that makes the text of its inputs."""
    stages = CachedStages(store)
    with tempfile.TemporaryDirectory() as own:
        value = stages.get(
            "draft",
            lambda: inputs,
            Path(own),
            make=lambda: f"made of {inputs}",
            load=lambda path: (path / "text").read_text(),
            save=_save_text,
        )
    return value, stages


def _save_text(value: str, folder: Path) -> Iterator[Path]:
    (folder / "text").write_text(value)
    yield folder / "text"


def test_a_stage_says_what_has_changed_since_the_nearest_entry(
    store: StageStore, tmp_path: Path
) -> None:
    first, made = stages_of(store, tmp_path, recipe="mse", weights="a")
    assert [(False, NOTHING_LIKE_IT)] == [(use.reused, use.reason) for use in made.uses]
    again, reused = stages_of(store, tmp_path, recipe="mse", weights="a")
    assert (first, [True]) == (again, [use.reused for use in reused.uses])
    stages_of(store, tmp_path, recipe="minmax", weights="b")
    _, other = stages_of(store, tmp_path, recipe="full", weights="b", table="t")
    (use,) = other.uses
    assert {"recipe": ("minmax", "full"), "table": ("", "t")} == use.changed
    assert "recipe, table" == use.reason


def test_without_a_store_everything_is_made(tmp_path: Path) -> None:
    for _ in range(2):
        _, stages = stages_of(None, tmp_path, recipe="mse")
        assert [(False, OFF)] == [(use.reused, use.reason) for use in stages.uses]


def test_trouble_with_the_disk_costs_a_note_only(tmp_path: Path) -> None:
    """The cache's root is a file."""
    (tmp_path / "cache").write_text("in the way")
    store = StageStore(root=tmp_path / "cache", limit=10_000)
    value, stages = stages_of(store, tmp_path, recipe="mse")
    assert value.startswith("made of")
    assert [f"the stage cache {store.root} cannot be used: Not a directory"] == stages.notes


def test_inputs_that_cannot_be_read_are_left_to_the_stage(store: StageStore) -> None:
    """It knows best how to complain; nothing is kept."""

    def unreadable() -> Mapping[str, str]:
        raise InputError("no such file")

    def fail() -> str:
        raise InputError("checkpoint a.pth does not exist")

    with pytest.raises(InputError, match="checkpoint"):
        CachedStages(store).get(
            "draft", unreadable, store.root, make=fail, load=Path.read_text, save=_save_text
        )
    assert () == store.entries()


def test_a_file_that_changes_while_it_is_read_is_not_kept(store: StageStore) -> None:
    versions = iter(["before", "after"])
    CachedStages(store).get(
        "draft",
        lambda: {"weights": next(versions)},
        store.root,
        make=lambda: "value",
        load=Path.read_text,
        save=_save_text,
    )
    assert () == store.entries()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ledger=st.from_type(Ledger))
def test_a_ledger_comes_back_as_it_was(ledger: Ledger) -> None:
    """With everything that it can hold, infinite decibels included."""
    with tempfile.TemporaryDirectory() as folder:
        found = read_value(write_value(Path(folder) / "value.json", ledger), Ledger)
    # Not a number is unequal to itself, and a mapping may be of any class.
    assert json.dumps(to_json(ledger)) == json.dumps(to_json(found))


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("500M", 500 << 20), ("1.5 GiB", 3 << 29), ("2k", 2048)]
)
def test_sizes_are_read_with_units(text: str, size: int) -> None:
    assert size == parse_size(text)


@pytest.mark.parametrize("text", ["", "much", "-1", "1X", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a size such as 500M or 10G"):
        parse_size(text)


def test_the_variable_names_the_folder_or_turns_the_cache_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "OFF")
    assert open_cache() is None
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert open_cache() == StageStore(root=tmp_path, limit=10 << 30)
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = open_cache()
    assert store is not None
    assert tmp_path / "repvgg-exporter" / "stages" == store.root


def test_an_unreadable_entry_does_not_hide_the_others(store: StageStore) -> None:
    put(store, "a", {"a": b"1"})
    put(store, "b", {"a": b"2"})
    shutil.rmtree(store.root / "v1" / "draft" / "a")
    (store.root / "v1" / "draft" / "a").mkdir()
    assert ["b"] == [entry.key for entry in store.entries()]
