"""Temporary folders: whose they are, and that nobody's stay."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.files.private_folder import NEW, OLD, private_folder, remove_dead, scratch_folder

DIES = """
import os, signal, sys
from pathlib import Path
from exporter.files.private_folder import private_folder
with private_folder(Path(sys.argv[1])) as folder:
    for name in sys.argv[2:]:
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(destination: Path, *holding: str) -> Path:
    """The folder that a killed run for ``destination`` leaves."""
    before = set(destination.parent.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(destination), *holding], check=False, capture_output=True
    )
    assert (-signal.SIGKILL, b"") == (done.returncode, done.stderr)
    (left,) = set(destination.parent.iterdir()) - before
    return left


def test_it_lies_beside_its_destination_and_is_gone_afterwards(tmp_path: Path) -> None:
    """Its name tells whose it is, and only its user can look into it."""
    with private_folder(tmp_path / "out") as folder:
        assert (tmp_path, 0o700) == (folder.parent, folder.stat().st_mode & 0o777)
        assert folder.name.startswith(".out.")
        assert folder.name.endswith(".staging")
        (folder / "file").write_text("mine")
    assert [] == list(tmp_path.iterdir())


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """Before it begins its own."""
    left = killed(tmp_path / "out", NEW)
    assert left.is_dir()
    with private_folder(tmp_path / "out") as folder:
        assert [folder] == list(tmp_path.iterdir())
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", [0, 2**31 - 1, 4_000_000_000])
def test_its_age_decides_nothing(tmp_path: Path, moment: int) -> None:
    """A dead run's folder goes and a living one's stays, whatever the clock says of them."""
    left = killed(tmp_path / "out")
    with private_folder(tmp_path / "out") as living:
        left = killed(tmp_path / "out")
        for folder in (left, living):
            os.utime(folder, (moment, moment))
        remove_dead(tmp_path / "out")
        assert [living] == list(tmp_path.iterdir())


def test_the_folder_of_a_living_run_stays(tmp_path: Path) -> None:
    """Of this process or another; each has its own."""
    with private_folder(tmp_path / "out") as first, private_folder(tmp_path / "out") as second:
        assert first != second
        program = "import sys; from pathlib import Path\n"
        program += (
            "from exporter.files.private_folder import remove_dead; remove_dead(Path(sys.argv[1]))"
        )
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=True)
        assert {first, second} == set(tmp_path.iterdir())


NAMES = st.text("ab.*[]_ é\udcff'\n", min_size=1, max_size=6).filter(lambda n: n not in (".", ".."))


@given(NAMES, NAMES)
def test_only_the_same_destination_is_cleared(own: str, other: str) -> None:
    """No name is the pattern of another one: "a" clears nothing of "a.b" or of "*"."""
    with tempfile.TemporaryDirectory() as name:
        dead = Path(name, f".{other}.abcdefgh.staging")
        dead.mkdir()
        remove_dead(Path(name, own))
        assert (own != other) == dead.exists()


def test_folders_that_only_look_alike_stay(tmp_path: Path) -> None:
    """Another length, a file, a link: none of them was made here."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".out.short.staging").mkdir()
    (tmp_path / ".out.abcdefgh.staging").write_text("mine")
    (tmp_path / ".out.abcdefgi.staging").symlink_to(elsewhere)
    before = set(tmp_path.iterdir())
    remove_dead(tmp_path / "out")
    assert before == set(tmp_path.iterdir())


class TestAReplacementThatWasInterrupted:
    def test_the_old_content_is_put_back(self, tmp_path: Path) -> None:
        """Both are in the folder and nothing in the place: the run had not published."""
        killed(tmp_path / "out", OLD, NEW)
        remove_dead(tmp_path / "out")
        assert [tmp_path / "out"] == list(tmp_path.iterdir())
        assert OLD == (tmp_path / "out" / "file").read_text()

    def test_what_is_in_the_place_stays(self, tmp_path: Path) -> None:
        """Somebody else has published since."""
        killed(tmp_path / "out", OLD, NEW)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")
        remove_dead(tmp_path / "out")
        assert [tmp_path / "out"] == list(tmp_path.iterdir())
        assert "theirs" == (tmp_path / "out" / "file").read_text()

    def test_one_that_was_finished_is_not_undone(self, tmp_path: Path) -> None:
        """The new one had been put in place; whoever removed it since wanted that."""
        killed(tmp_path / "out", OLD)
        remove_dead(tmp_path / "out")
        assert [] == list(tmp_path.iterdir())


class TestWithoutLocks:
    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on some network file systems."""

        def refuse(_descriptor: int, _how: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)

    def test_a_run_works_and_cleans_up(self, tmp_path: Path) -> None:
        with private_folder(tmp_path / "out") as folder:
            assert folder.is_dir()
        assert [] == list(tmp_path.iterdir())

    def test_nothing_is_taken_for_dead(self, tmp_path: Path) -> None:
        """It might be alive."""
        (tmp_path / ".out.abcdefgh.staging").mkdir()
        remove_dead(tmp_path / "out")
        assert [tmp_path / ".out.abcdefgh.staging"] == list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_one_that_is_cleared_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Another run may start at that very moment; nobody works in a folder that is gone."""
    real = {"before it is opened": os.open, "before it is locked": fcntl.flock}[moment]
    calls: list[int] = []

    def clears(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            (folder,) = tmp_path.iterdir()
            folder.rmdir()
        return real(*arguments, **options)  # type: ignore[operator]

    owner = os if moment == "before it is opened" else fcntl
    monkeypatch.setattr(owner, real.__name__, clears)
    with private_folder(tmp_path / "out") as folder:
        assert folder.is_dir()
        assert len(calls) > 1
    monkeypatch.undo()
    assert [] == list(tmp_path.iterdir())


def test_many_at_once_never_lose_their_folder(tmp_path: Path) -> None:
    """Eight threads make, clear and leave folders for one destination: each keeps its own."""
    lost: list[Path] = []

    def work() -> None:
        for _ in range(50):
            with private_folder(tmp_path / "out") as folder:
                (folder / "file").write_text("mine")
                remove_dead(tmp_path / "out")
                if not (folder / "file").is_file():
                    lost.append(folder)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == lost
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["open", "flock"])
def test_an_interrupt_while_it_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Ctrl-C between making and locking."""

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os if step == "open" else fcntl, step, interrupted)
    with pytest.raises(KeyboardInterrupt), private_folder(tmp_path / "out"):
        pytest.fail("entered")
    monkeypatch.undo()
    assert [] == list(tmp_path.iterdir())


class TestScratch:
    def test_it_is_within_the_open_folder(self, tmp_path: Path) -> None:
        """A kill leaves one folder, not two."""
        with private_folder(tmp_path / "out") as folder:
            with scratch_folder("engine") as scratch:
                assert folder in scratch.parents
                assert scratch.is_dir()
            assert not scratch.exists()

    def test_elsewhere_it_is_in_the_systems_and_cleared_by_the_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By purpose."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        killed(tmp_path / "repvgg-engine")
        other = killed(tmp_path / "repvgg-simplify")
        with scratch_folder("engine") as scratch:
            assert {scratch, other} == set(tmp_path.iterdir())
        assert [other] == list(tmp_path.iterdir())
