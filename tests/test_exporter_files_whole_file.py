"""A file is replaced whole or not at all, and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.files.whole_file import whole_file, write_whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is there already."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


@pytest.mark.parametrize(("private", "mode"), [(False, 0o644), (True, 0o600)])
def test_the_old_content_is_read_until_the_new_one_is_whole(path: Path, private: bool, mode: int):
    """Then everybody may read it, or its owner alone."""
    with whole_file(path, private=private) as file:
        file.write(b"new")
        file.flush()
        assert b"old" == path.read_bytes()
    assert (b"new", mode) == (path.read_bytes(), path.stat().st_mode & 0o777)
    assert [path] == list(path.parent.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("ours"), KeyboardInterrupt()])
def test_what_fails_halfway_leaves_the_old_content(path: Path, error: BaseException):
    """Whatever it is that fails; it is raised as it was."""

    def fail() -> None:
        with whole_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert error is raised.value
    assert ([path], b"old") == (list(path.parent.iterdir()), path.read_bytes())


def test_text_is_written_as_utf8_and_its_folder_is_made(tmp_path: Path):
    """Line ends are kept as they are."""
    path = tmp_path / "a" / "b" / "file"
    write_whole(path, "é\r\n")
    assert "é\r\n".encode() == path.read_bytes()


def test_what_cannot_be_written_is_named(path: Path):
    """In one sentence, the reason at its end."""
    with pytest.raises(InputError, match=r"file/below cannot be written: (File exists|Not a dir)"):
        write_whole(path / "below", "text")
