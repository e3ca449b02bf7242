"""Bundles: published whole or not at all, and read back with every doubt spoken out."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporter.bundle import (
    CHECKSUMS,
    ENGINE,
    MANIFEST,
    MODEL,
    PARITY,
    REFERENCE,
    SCHEMA_VERSION,
    Bundle,
    dumps,
    file_sha256,
)
from exporter.bundle import writer as bundle_writer
from exporter.bundle.writer import BundleWriter
from exporter.errors import InputError
from exporter.files import replacing

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[batch,3,4,6] images) => (float[batch,3] logits) {
    p = GlobalAveragePool (images)
    logits = Flatten (p)
}
"""


def fill(writer: BundleWriter, mark: str) -> None:
    """Everything that a small bundle needs but its manifest."""
    writer.write_text("mark.txt", mark)
    writer.write_text(PARITY, dumps({"verdict": "pass", "stages": []}))
    onnx.save(onnx.parser.parse_model(GRAPH), writer.path(MODEL))
    images = np.arange(144, dtype=np.float32).reshape(2, 3, 4, 6)
    np.savez(writer.path(REFERENCE), images=images, logits=images.mean(axis=(2, 3)))


def manifest() -> dict[str, Any]:
    return {
        "spec": {"precision": "fp32", "batch": "1:8:32"},
        "model": {},
        "preprocess": {"image_size": [4, 6]},
    }


def publish(out: Path, mark: str = "new") -> Bundle:
    with BundleWriter(out) as writer:
        fill(writer, mark)
        return writer.publish(manifest())


def state(out: Path) -> str:
    """``absent``, or the mark of the bundle at ``out``, which is whole."""
    if not out.exists():
        return "absent"
    bundle = Bundle.load(out)
    assert () == bundle.damaged_files()
    own = set(bundle.manifest["files"]) | {MANIFEST, CHECKSUMS}
    assert own == {path.name for path in out.iterdir()}
    return (out / "mark.txt").read_text()


class TestPublishing:
    def test_a_bundle_appears_whole(self, tmp_path: Path) -> None:
        """After publish OUT has every file, and nothing is left beside it."""
        out = tmp_path / "deep" / "er" / "A0-fp32"
        found = publish(out)
        assert (out, "new") == (found.path, state(out))
        assert [out] == list(out.parent.iterdir())
        assert Bundle.load(out) == found

    def test_nothing_is_visible_before_publishing(self, tmp_path: Path) -> None:
        """While it is written, the bundle lies beside OUT."""
        with BundleWriter(tmp_path / "out") as writer:
            fill(writer, "new")
            assert "absent" == state(tmp_path / "out")

    def test_the_manifest_hashes_every_file(self, tmp_path: Path) -> None:
        """sha256 and size of each file are those of its bytes, but of the two that list them."""
        found = publish(tmp_path / "out")
        expected = {
            path.name: {
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "bytes": path.stat().st_size,
            }
            for path in (tmp_path / "out").iterdir()
            if path.name not in (MANIFEST, CHECKSUMS)
        }
        assert expected == found.manifest["files"]
        assert (SCHEMA_VERSION, "fp32") == (
            found.manifest["schema_version"],
            found.manifest["spec"]["precision"],
        )

    def test_the_folder_can_be_read_by_others(self, tmp_path: Path) -> None:
        """A temporary folder is private; a published bundle is not."""
        publish(tmp_path / "out")
        assert 0o755 == (tmp_path / "out").stat().st_mode & 0o777

    def test_an_old_bundle_is_replaced(self, tmp_path: Path) -> None:
        """The new bundle takes the old one's place; no file of the old one stays."""
        with BundleWriter(tmp_path / "out") as writer:
            fill(writer, "old")
            writer.write_text("only-in-old.txt", "")
            writer.publish(manifest())
        publish(tmp_path / "out")
        assert "new" == state(tmp_path / "out")
        assert [tmp_path / "out"] == list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("old", "new", "lost"),
        [
            (["sm86", "sm87"], None, ("an engine for sm86, sm87",)),
            (["sm86", "sm89"], ["sm89"], ("an engine for sm86",)),
            (["sm86"], ["sm86", "sm89"], ()),
            (None, ["sm86"], ()),
        ],
    )
    def test_what_the_old_bundle_held_and_the_new_has_not_is_known(
        self, tmp_path: Path, old: list[str] | None, new: list[str] | None, lost: tuple[str, ...]
    ) -> None:
        """Engines for targets; a bundle whose engine waits has targets, but none of them built."""
        found = ()
        for targets in (old, new):
            with BundleWriter(tmp_path / "out") as writer:
                fill(writer, "new")
                if targets is not None:
                    writer.path(ENGINE).write_bytes(b"plan")
                writer.publish({**manifest(), "targets": ["sm90"] if targets is None else targets})
                found = writer.lost
        assert lost == found

    def test_a_signature_that_the_new_bundle_has_not_is_lost(self, tmp_path: Path) -> None:
        """Signed again, or never signed, nothing is; where there is no old bundle, nothing can."""
        losses = []
        for signer in (lambda *_: b"s", lambda *_: b"t", None, None):
            with BundleWriter(tmp_path / "out", signer) as writer:
                fill(writer, "new")
                writer.publish(manifest())
                losses.append(writer.lost)
        assert [(), (), ("a signature",), ()] == losses

    def test_an_old_bundle_that_cannot_be_read_is_replaced_all_the_same(
        self, tmp_path: Path
    ) -> None:
        """Nothing is said of it."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / MANIFEST).write_text("{")
        with BundleWriter(tmp_path / "out") as writer:
            fill(writer, "new")
            writer.publish(manifest())
        assert ((), "new") == (writer.lost, state(tmp_path / "out"))

    def test_an_empty_folder_is_filled(self, tmp_path: Path) -> None:
        """An existing empty folder is as good as none."""
        (tmp_path / "out").mkdir()
        publish(tmp_path / "out")
        assert "new" == state(tmp_path / "out")

    def test_a_linked_destination_is_replaced_where_it_is(self, tmp_path: Path) -> None:
        """OUT may be a link to a bundle: the link stays, its target is replaced."""
        publish(tmp_path / "real", "old")
        (tmp_path / "link").symlink_to("real")
        publish(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert "new" == state(tmp_path / "real") == state(tmp_path / "link")

    def test_a_dangling_link_is_followed(self, tmp_path: Path) -> None:
        """OUT may be a link to a place that does not exist yet."""
        (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
        publish(tmp_path / "link")
        assert "new" == state(tmp_path / "disk" / "real")
        assert (tmp_path / "link").is_symlink()

    def test_a_relative_destination_stays_where_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A relative OUT is resolved on entering, so a later chdir does not move it."""
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        with BundleWriter(Path("out")) as writer:
            fill(writer, "new")
            monkeypatch.chdir(tmp_path / "elsewhere")
            writer.publish(manifest())
        assert "new" == state(tmp_path / "out")

    def test_writing_outside_the_with_block_is_a_mistake(self, tmp_path: Path) -> None:
        """A writer that is not open has no files."""
        with pytest.raises(RuntimeError, match="not open for writing"):
            BundleWriter(tmp_path / "out").path("x")

    def test_a_bundle_without_parity_is_not_published(self, tmp_path: Path) -> None:
        """What could not be loaded afterwards does not replace what is there."""
        publish(tmp_path / "out", "old")
        with BundleWriter(tmp_path / "out") as writer:
            writer.write_text("mark.txt", "new")
            with pytest.raises(InputError, match=r"parity\.json cannot be read"):
                writer.publish(manifest())
        assert "old" == state(tmp_path / "out")

    def test_a_manifest_with_nan_is_not_published(self, tmp_path: Path) -> None:
        """The manifest is strict JSON or there is no bundle."""
        with BundleWriter(tmp_path / "out") as writer:
            fill(writer, "new")
            with pytest.raises(ValueError, match="JSON compliant"):
                writer.publish({**manifest(), "worst": math.nan})
        assert [] == list(tmp_path.iterdir())


class TestRefusals:
    def refused(self, out: Path, expected: str) -> None:
        with pytest.raises(InputError, match=expected), BundleWriter(out):
            pytest.fail("entered")

    def test_a_file(self, tmp_path: Path) -> None:
        """OUT that is a file is refused and kept."""
        (tmp_path / "out").write_text("mine")
        self.refused(tmp_path / "out", r"OUT .*/out exists and is no bundle; name a new folder")
        assert "mine" == (tmp_path / "out").read_text()

    def test_a_folder_with_something_else(self, tmp_path: Path) -> None:
        """A non-empty folder without a manifest is refused and kept."""
        (tmp_path / "thesis.tex").write_text("mine")
        self.refused(tmp_path, "exists and is no bundle")
        assert [tmp_path / "thesis.tex"] == list(tmp_path.iterdir())

    @pytest.mark.parametrize("below", ["out", "deep/out"])
    def test_below_a_file(self, tmp_path: Path, below: str) -> None:
        """OUT under a file cannot be written, and the reason is the system's."""
        (tmp_path / "file").write_text("mine")
        self.refused(tmp_path / "file" / below, "cannot be written: Not a directory")
        assert [tmp_path / "file"] == list(tmp_path.iterdir())

    def test_the_root(self) -> None:
        """The root folder is no bundle."""
        self.refused(Path("/"), "OUT / exists and is no bundle")

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        """What the file system refuses is reported, and made parents are removed."""
        self.refused(tmp_path / "deep" / ("x" * 300), "cannot be written: File name too long")
        assert [] == list(tmp_path.iterdir())

    def test_a_zero_byte(self, tmp_path: Path) -> None:
        """A name that no file system has is refused."""
        self.refused(tmp_path / "a\0b", "cannot be written: ")

    def test_a_loop_of_links(self, tmp_path: Path) -> None:
        """A link to itself leads nowhere."""
        (tmp_path / "loop").symlink_to("loop")
        self.refused(tmp_path / "loop" / "out", "cannot be written: ")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_without_permission(self, tmp_path: Path) -> None:
        """A read-only parent is reported."""
        tmp_path.chmod(0o500)
        self.refused(tmp_path / "out", "cannot be written: Permission denied")
        tmp_path.chmod(0o700)


class Saboteur:
    """Makes the n-th of the wrapped calls raise."""

    STEPS: tuple[tuple[object, str], ...] = (
        (Path, "mkdir"),
        (Path, "chmod"),
        (Path, "write_text"),
        (Path, "read_text"),
        (Path, "rename"),
        (tempfile, "mkdtemp"),
        (os, "fsync"),
        (bundle_writer, "file_sha256"),
    )

    def __init__(self, patch: pytest.MonkeyPatch, fatal: int, error: BaseException) -> None:
        self.calls, self.fatal, self.error = 0, fatal, error
        for owner, name in self.STEPS:
            patch.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fatal:
                raise self.error
            return function(*arguments, **options)

        return call


@pytest.fixture(params=["one step", "two steps"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a system call that swaps two names."""
    if request.param == "two steps":
        monkeypatch.setattr(replacing, "exchange", lambda _first, _second: False)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("before", ["absent", "old"])
@pytest.mark.parametrize(
    ("error", "surfaces"),
    [
        (OSError(errno.EIO, "Input/output error"), (InputError, OSError)),
        (OSError(errno.ENOSPC, "No space left on device"), (InputError,)),
        (KeyboardInterrupt(), (KeyboardInterrupt,)),
        (MemoryError(), (MemoryError,)),
    ],
    ids=["EIO", "ENOSPC", "interrupt", "memory"],
)
def test_a_failure_at_any_step_leaves_what_was_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    error: BaseException,
    surfaces: tuple[type[BaseException], ...],
) -> None:
    """Whichever step fails, OUT is absent or the old bundle whole, and nothing lies beside it."""
    root = tmp_path / "root"
    root.mkdir()
    out = root / "out" if before == "old" else root / "deep" / "er" / "out"
    if before == "old":
        publish(out, "old")
    step = 0
    while True:
        step += 1
        with monkeypatch.context() as patch:
            saboteur = Saboteur(patch, step, error)
            try:
                publish(out)
            except surfaces:
                failed = True
            else:
                failed = False
        if not failed:
            break
        assert before == state(out), step
        assert ([out] if before == "old" else []) == list(root.iterdir()), step
    # mkdtemp, mkdir, chmod, 3 texts, 4 hashes, 2 reads and 7 fsyncs, at the least.
    assert saboteur.calls < step
    assert step > 19
    assert "new" == state(out)
    assert [out] == list(out.parent.iterdir())


def test_an_interrupt_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while the files are made removes them and the parents, and is passed on."""

    def interrupted() -> None:
        with BundleWriter(tmp_path / "deep" / "out") as writer:
            fill(writer, "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [] == list(tmp_path.iterdir())


def test_a_full_disk_in_the_block_is_named(tmp_path: Path) -> None:
    """When a stage runs out of space while writing its file, the error names OUT."""
    expected = r"OUT .*/out cannot be written: No space left on device"
    with pytest.raises(InputError, match=expected), BundleWriter(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [] == list(tmp_path.iterdir())


def test_paths_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    """The page names the checkpoint, whatever its name; JSON escapes it anyway."""
    with BundleWriter(tmp_path / "und\udcff") as writer:
        writer.write_text("page", "from und\udcff, ü")
        assert "from und\\udcff, ü" == writer.path("page").read_text("utf-8")


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    """Somebody removes the folder of OUT while the files are made."""

    def vanishes() -> None:
        with BundleWriter(tmp_path / "deep" / "out") as writer:
            shutil.rmtree(tmp_path / "deep")
            writer.write_text("mark.txt", "new")

    expected = r"OUT .*/deep/out cannot be written: its folder vanished during the run$"
    with pytest.raises(InputError, match=expected):
        vanishes()
    assert [] == list(tmp_path.iterdir())


def test_a_folder_that_vanishes_before_publishing_is_named(tmp_path: Path) -> None:
    """Then it is the publication that fails."""

    def vanishes() -> None:
        with BundleWriter(tmp_path / "deep" / "out") as writer:
            fill(writer, "new")
            shutil.rmtree(tmp_path / "deep")
            writer.publish(manifest())

    expected = r"OUT .*/deep/out cannot be written: No such file or directory$"
    with pytest.raises(InputError, match=expected):
        vanishes()
    assert [] == list(tmp_path.iterdir())


def test_what_appears_at_out_during_the_run_is_kept(tmp_path: Path) -> None:
    """An export takes minutes; files that somebody put there meanwhile are not the writer's."""

    def surprised() -> None:
        with BundleWriter(tmp_path / "out") as writer:
            fill(writer, "new")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("mine")
            writer.publish(manifest())

    with pytest.raises(InputError, match="exists and is no bundle"):
        surprised()
    assert "mine" == (tmp_path / "out" / "thesis.tex").read_text()
    assert [tmp_path / "out"] == list(tmp_path.iterdir())


@pytest.mark.usefixtures("_way")
def test_of_two_writers_the_last_to_publish_wins(tmp_path: Path) -> None:
    """Neither disturbs the other, whichever began first."""
    with BundleWriter(tmp_path / "out") as first, BundleWriter(tmp_path / "out") as second:
        fill(first, "first")
        fill(second, "second")
        second.publish(manifest())
        assert "second" == state(tmp_path / "out")
        first.publish(manifest())
    assert "first" == state(tmp_path / "out")
    assert [tmp_path / "out"] == list(tmp_path.iterdir())


def test_other_errors_in_the_block_pass_unchanged(tmp_path: Path) -> None:
    """What the writer does not know about is not its to rename."""
    with pytest.raises(FileNotFoundError), BundleWriter(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    assert [] == list(tmp_path.iterdir())


def test_leaving_without_publishing_removes_everything(tmp_path: Path) -> None:
    """A run that decides not to publish leaves no trace."""
    with BundleWriter(tmp_path / "deep" / "out") as writer:
        fill(writer, "new")
    assert [] == list(tmp_path.iterdir())


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    """A made parent that meanwhile holds somebody's file is not removed."""
    with BundleWriter(tmp_path / "deep" / "er" / "out"):
        (tmp_path / "deep" / "note").write_text("mine")
    assert [tmp_path / "deep" / "note"] == list((tmp_path / "deep").iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from exporter.files import replacing
from exporter.bundle import PARITY, dumps
from exporter.bundle.writer import BundleWriter
out, moment = Path(sys.argv[1]), sys.argv[2]
swap = replacing.exchange
def exchange(first, second):
    if moment == "before the swap":
        die()
    if "rename" in moment:
        return False
    swapped = swap(first, second)
    if moment == "after the swap":
        die()
    return swapped
replacing.exchange = exchange
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
renames = 0
def rename(path, target, real=Path.rename):
    global renames
    renames += 1
    if moment == f"rename {renames}":
        die()
    return real(path, target)
Path.rename = rename
with BundleWriter(out) as writer:
    writer.write_text("mark.txt", "new")
    writer.write_text(PARITY, dumps({"verdict": "pass", "stages": []}))
    if moment == "writing":
        with writer.path("model.onnx").open("wb") as file:
            file.write(b"half of it")
            file.flush()
            die()
    writer.publish({"spec": {"precision": "fp32", "batch": "1:8:32"}, "model": {}})
"""


@pytest.mark.parametrize(
    ("before", "moment", "after"),
    [
        ("absent", "writing", "absent"),
        ("old", "writing", "old"),
        ("absent", "rename 1", "absent"),
        ("old", "rename 1", "old"),
        # rename 1 finds the place taken.
        ("old", "rename 2", "old"),
        ("old", "rename 3", "absent"),
        ("old", "before the swap", "old"),
        ("old", "after the swap", "new"),
    ],
)
def test_a_killed_process_leaves_no_half_bundle(
    tmp_path: Path, before: str, moment: str, after: str
) -> None:
    """SIGKILL leaves OUT absent or whole and one folder; the next run removes it and succeeds."""
    out = tmp_path / "out"
    if before == "old":
        publish(out, "old")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), moment], check=False, capture_output=True
    )
    assert (-signal.SIGKILL, b"") == (done.returncode, done.stderr)
    assert after == state(out)
    (left,) = (path for path in tmp_path.iterdir() if path != out)
    assert left.name.endswith(".staging")
    with BundleWriter(out) as writer:
        # Also what was taken away and not yet replaced is back.
        assert (after if moment != "rename 3" else "old") == state(out)
        fill(writer, "newer")
        writer.publish(manifest())
    assert "newer" == state(out)
    assert [out] == list(tmp_path.iterdir())


class TestLoading:
    def refused(self, path: Path, expected: str) -> None:
        with pytest.raises(InputError, match=expected):
            Bundle.load(path)

    def test_a_path_may_be_text(self, tmp_path: Path) -> None:
        """load takes a string as well."""
        publish(tmp_path / "out")
        assert tmp_path / "out" == Bundle.load(str(tmp_path / "out")).path

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        """A folder that does not exist is no bundle, and the missing file is named."""
        self.refused(
            tmp_path / "absent",
            r"absent is not a bundle: manifest\.json cannot be read \(No such file or directory\)$",
        )

    @pytest.mark.parametrize("name", [MANIFEST, PARITY])
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"{", "is not JSON"),
            (b"\xff\xfe", "is not JSON"),
            (b"[" * 100_000, "is not JSON"),
            (b"[]", "is no JSON object"),
            (b"null", "is no JSON object"),
            (b'"text"', "is no JSON object"),
        ],
        ids=["truncated", "bytes", "deep", "list", "null", "text"],
    )
    def test_damaged_json(self, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
        """Manifest and parity must be JSON objects."""
        publish(tmp_path / "out")
        (tmp_path / "out" / name).write_bytes(content)
        self.refused(tmp_path / "out", f"out is not a bundle: {name} {expected}")

    @pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, "1", None])
    def test_another_schema(self, tmp_path: Path, version: object) -> None:
        """A bundle of another schema is named with both versions, whatever else it holds."""
        (tmp_path / MANIFEST).write_text(json.dumps({"schema_version": version}))
        self.refused(tmp_path, f"has schema version {version}; this program reads 1$")

    @pytest.mark.parametrize("files", [None, [], {"model.onnx": "abc"}, {"model.onnx": {}}])
    def test_a_manifest_without_hashes(self, tmp_path: Path, files: object) -> None:
        """A manifest whose files have no hashes proves nothing."""
        (tmp_path / MANIFEST).write_text(json.dumps({"schema_version": 1, "files": files}))
        self.refused(tmp_path, r"manifest\.json lists no files with their sha256")


def test_a_flipped_byte_and_a_missing_file_are_found(tmp_path: Path) -> None:
    """damaged_files names exactly what changed or disappeared since publishing."""
    found = publish(tmp_path / "out")
    assert () == found.damaged_files()
    content = bytearray((tmp_path / "out" / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "out" / MODEL).write_bytes(content)
    (tmp_path / "out" / "mark.txt").unlink()
    assert {MODEL, "mark.txt"} == set(found.damaged_files())


def test_a_hash_of_many_chunks_is_that_of_the_whole(tmp_path: Path) -> None:
    """file_sha256 reads in pieces and hashes the whole file."""
    content = os.urandom((2 << 20) + 17)
    (tmp_path / "file").write_bytes(content)
    assert hashlib.sha256(content).hexdigest() == file_sha256(tmp_path / "file")


@pytest.mark.parametrize(
    ("precision", "name"),
    [("fp32", "model.onnx"), ("fp16", "model.fp16.onnx"), ("int8", "model.int8.onnx")],
)
def test_the_graph_is_that_of_the_precision(precision: str, name: str) -> None:
    """graph_path is the file that the engine was built from."""
    found = Bundle(Path("b"), {"spec": {"precision": precision}}, {})
    assert Path("b", name) == found.graph_path


def test_a_bundle_runs_its_graph(tmp_path: Path) -> None:
    """run gives the graph's logits for any number of images."""
    found = publish(tmp_path / "out")
    images, logits = found.reference()
    np.testing.assert_allclose(logits, found.run(images), rtol=1e-6)
    assert (1, 3) == found.run(images[:1]).shape


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 3, 4, 6), np.float64), r"float64 \[2, 3, 4, 6\]"),
        (np.zeros((2, 3, 6, 4), np.float32), r"float32 \[2, 3, 6, 4\]"),
        (np.zeros((3, 4, 6), np.float32), r"float32 \[3, 4, 6\]"),
        (np.zeros((2, 4, 6, 3), np.float32), r"float32 \[2, 4, 6, 3\]"),
        (np.zeros((0, 3, 4, 6), np.float32), r"float32 \[0, 3, 4, 6\]"),
        (np.float32(1), r"float32 \[\]"),
    ],
)
def test_other_inputs_are_refused(tmp_path: Path, images: np.ndarray, said: str) -> None:
    """run says what it was given and what it takes."""
    expected = rf"input is {said}, expected float32 \[N, 3, 4, 6\] with N at least 1"
    with pytest.raises(InputError, match=expected):
        publish(tmp_path / "out").run(images)


def test_what_is_no_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input is a list, expected a numpy array"):
        publish(tmp_path / "out").run([[1.0]])


def test_reference_inputs_never_run_code(tmp_path: Path) -> None:
    """A pickle in reference.npz is refused and not executed."""
    found = publish(tmp_path / "out")
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (ran,)

    trap = np.array([Trap()], dtype=object)
    np.savez(found.path / REFERENCE, images=trap, logits=trap)
    with pytest.raises(InputError, match=r"reference\.npz cannot be read: .*allow_pickle=False"):
        found.reference()
    assert not ran.exists()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 truncated", b"text"])
def test_damaged_reference_inputs_are_named(tmp_path: Path, content: bytes | None) -> None:
    """A missing or damaged reference.npz is an error of ours with the path."""
    found = publish(tmp_path / "out")
    (found.path / REFERENCE).unlink()
    if content is not None:
        (found.path / REFERENCE).write_bytes(content)
    with pytest.raises(InputError, match=r"reference inputs .*reference\.npz cannot be read: "):
        found.reference()


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((2, 3), np.float64), "images is no array of float32 or uint8"),
        (np.zeros((), np.float32), "images is empty"),
        (np.zeros((0, 3), np.float32), "images is empty"),
        (np.zeros((5, 3), np.float32), "its arrays are of different numbers of images"),
    ],
)
def test_reference_arrays_that_no_network_takes_are_named(tmp_path: Path, images, reason) -> None:
    """Another type, no image, or more inputs than outputs."""
    found = publish(tmp_path / "out")
    np.savez(found.path / REFERENCE, images=images, logits=np.zeros((2, 3), np.float32))
    with pytest.raises(InputError, match=f"cannot be read: {reason}"):
        found.reference()


def test_reference_inputs_that_unpack_to_gigabytes_are_refused_unread(tmp_path: Path) -> None:
    """The archive's directory says how large its entries are."""
    found = publish(tmp_path / "out")
    zeros = np.zeros((2, 300 << 20), np.uint8)
    np.savez_compressed(found.path / REFERENCE, images=zeros, logits=zeros[:, :1])
    with pytest.raises(InputError, match=r"cannot be read: it unpacks to 0\.629 GB"):
        found.reference()


def test_reference_inputs_of_another_kind_are_named(tmp_path: Path) -> None:
    """An archive without the two arrays, or a single array, is no reference."""
    found = publish(tmp_path / "out")
    np.savez(found.path / REFERENCE, other=np.zeros(1))
    with pytest.raises(InputError, match="cannot be read"):
        found.reference()
    with (found.path / REFERENCE).open("wb") as file:
        np.save(file, np.zeros(1))
    with pytest.raises(InputError, match="cannot be read"):
        found.reference()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(value: float) -> None:
    """dumps refuses what other readers of JSON would choke on."""
    with pytest.raises(ValueError, match="JSON compliant"):
        dumps({"figure": [value]})


def test_json_ends_with_one_newline() -> None:
    """Files end as text files do, and read back unchanged."""
    assert '{\n  "a": [\n    1\n  ]\n}\n' == dumps({"a": [1]})


def publish_two(out: Path) -> Bundle:
    """A bundle of a network with two inputs and two outputs, height and width open."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    two (float[batch,3,height,width] image, float[batch,3] shift)
        => (float[batch,3] mean, float[batch,3,1,1] pooled) {
        pooled = GlobalAveragePool (image)
        flat = Flatten (pooled)
        mean = Add (flat, shift)
    }
    """
    image = np.arange(144, dtype=np.float32).reshape(2, 3, 4, 6)
    pooled = image.mean(axis=(2, 3), keepdims=True)
    shift = np.ones((2, 3), np.float32)
    with BundleWriter(out) as writer:
        writer.write_text(PARITY, dumps({"verdict": "pass", "stages": []}))
        onnx.save(onnx.parser.parse_model(text), writer.path(MODEL))
        mean = pooled[:, :, 0, 0] + shift
        np.savez(writer.path(REFERENCE), image=image, shift=shift, mean=mean, pooled=pooled)
        return writer.publish(
            {
                "spec": {"precision": "fp32", "batch": "1:8:32"},
                "inputs": [
                    {"name": "image", "shape": ["batch", 3, "height", "width"]},
                    {"name": "shift", "shape": ["batch", 3]},
                ],
                "outputs": [{"name": "mean", "shape": []}, {"name": "pooled", "shape": []}],
            }
        )


def test_several_inputs_and_outputs_run_as_tuple_and_dict(tmp_path: Path) -> None:
    """reference() gives what run() takes and returns; open sizes are any size."""
    bundle = publish_two(tmp_path / "out")
    inputs, outputs = bundle.reference()
    found = bundle.run(inputs)
    assert ["mean", "pooled"] == list(outputs) == list(found)
    np.testing.assert_allclose(outputs["mean"], found["mean"], rtol=1e-6)
    image, shift = inputs
    assert (2, 3) == bundle.run((image[:, :, :2, :3], shift))["mean"].shape


def test_wrong_numbers_of_inputs_are_refused(tmp_path: Path) -> None:
    """One array for two inputs, and inputs of different batch, are named."""
    bundle = publish_two(tmp_path / "out")
    image, shift = bundle.reference()[0]
    with pytest.raises(InputError, match="1 arrays were passed, expected 2: image, shift"):
        bundle.run(image)
    with pytest.raises(InputError, match=r"input is float32 \[1, 3\], expected float32 \[N, 3\]"):
        bundle.run((image, shift[:1]))
    with pytest.raises(InputError, match=r"expected float32 \[N, 3, height, width\]"):
        bundle.run((image[:, :2], shift))
