"""A folder in the place of another: whole at every moment, by whichever way."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from exporter.files import replacing
from exporter.files.replacing import exchange, put_in_place


@pytest.fixture(params=["one step", "two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a system call that swaps two names."""
    if request.param == "two steps":
        monkeypatch.setattr(replacing, "exchange", lambda _first, _second: False)
    return str(request.param)


def folder(path: Path, mark: str) -> Path:
    path.mkdir(parents=True)
    (path / "mark").write_text(mark)
    return path


def put(root: Path, mark: str = "new") -> None:
    """As a run does it: in a folder of its own, which goes afterwards."""
    with tempfile.TemporaryDirectory(dir=root) as name:
        put_in_place(folder(Path(name, "new"), mark), root / "out", Path(name, "old"))


def state(root: Path) -> str:
    """What is at out; nothing else is left."""
    assert [] == [path for path in root.iterdir() if path.name != "out"]
    return (root / "out" / "mark").read_text() if (root / "out").exists() else "absent"


def test_this_system_swaps_two_names_in_one_step(tmp_path: Path) -> None:
    """What the tests of one step rest on; two names must be there."""
    first, second = folder(tmp_path / "é ' \udcff", "first"), folder(tmp_path / "b", "second")
    assert exchange(first, second)
    assert ("second", "first") == ((first / "mark").read_text(), (second / "mark").read_text())
    assert not exchange(first, tmp_path / "absent")


@pytest.mark.parametrize("before", ["absent", "empty", "old"])
def test_the_new_one_is_in_place(tmp_path: Path, way: str, before: str) -> None:
    """Whether there was nothing, an empty folder or an older one."""
    if before == "empty":
        (tmp_path / "out").mkdir()
    elif before == "old":
        folder(tmp_path / "out", "old")
    put(tmp_path)
    assert "new" == state(tmp_path)


@pytest.mark.parametrize("before", ["absent", "old"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_after_the_move_puts_the_old_one_back(
    tmp_path: Path, way: str, before: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is told that it failed finds what was there before."""
    if before == "old":
        folder(tmp_path / "out", "old")

    def fails(_path: Path) -> None:
        assert "new" == (tmp_path / "out" / "mark").read_text()
        raise error

    monkeypatch.setattr(replacing, "sync_folder", fails)
    with pytest.raises(type(error)):
        put(tmp_path)
    assert before == state(tmp_path)


def test_a_failure_between_two_steps_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only moment at which the place is empty."""
    folder(tmp_path / "out", "old")
    monkeypatch.setattr(replacing, "exchange", lambda _first, _second: False)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "new" and not target.exists():
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        put(tmp_path)
    assert "old" == state(tmp_path)


def test_many_at_once_leave_one_whole(tmp_path: Path, way: str) -> None:
    """Eight threads replace one place 25 times each; none fails, one of their folders is there."""
    failed: list[BaseException] = []

    def work(mark: str) -> None:
        try:
            for _ in range(25):
                put(tmp_path, mark)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == failed
    assert state(tmp_path) in set("01234567")


READER = """
import sys
from pathlib import Path
mark = Path(sys.argv[1], "mark")
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    mark.read_text()
"""


def test_a_reader_never_finds_the_place_empty(tmp_path: Path) -> None:
    """Where the system can swap, OUT exists at every moment of a hundred replacements."""
    folder(tmp_path / "place" / "out", "old")
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "place" / "out"), str(tmp_path / "stop")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert reader.stdout is not None
    reader.stdout.readline()
    for number in range(100):
        own = tmp_path / str(number)
        put_in_place(folder(own / "new", str(number)), tmp_path / "place" / "out", own / "old")
    (tmp_path / "stop").touch()
    assert (0, "") == (reader.wait(60), reader.communicate()[1])


def test_what_cannot_be_moved_stays(tmp_path: Path, way: str) -> None:
    """A place in a folder that is gone: the system's own error, nothing is lost."""
    new = folder(tmp_path / "new", "new")
    with pytest.raises(FileNotFoundError):
        put_in_place(new, tmp_path / "absent" / "out", tmp_path / "old")
    assert [new] == list(tmp_path.iterdir())
