"""What is no text or JSON is an OSError or a ValueError, and never waits or fills the memory."""

from __future__ import annotations

import os

import pytest

from exporter.files import text_file
from exporter.files.text_file import read_json, read_text


def test_text_and_json_are_read(tmp_path):
    """UTF-8, as it stands."""
    path = tmp_path / "a.json"
    path.write_text('{"é": [1, 2]}', "utf-8")
    assert '{"é": [1, 2]}' == read_text(path)
    assert {"é": [1, 2]} == read_json(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    """A pipe would wait for its writer for ever, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (
        ("pipe", "is not a regular file"),
        ("device", "is not a regular file"),
        ("", "is a folder"),
        ("missing", os.strerror(2)),
        ("loop", os.strerror(40)),
    ):
        with pytest.raises(OSError, match=words):
            read_text(tmp_path / name)


def test_a_file_too_large_for_its_kind_is_refused(tmp_path, monkeypatch):
    """Up to the limit it is read; beyond it no more than the limit is."""
    monkeypatch.setattr(text_file, "MOST_BYTES", 4)
    (tmp_path / "a").write_text("1234")
    assert "1234" == read_text(tmp_path / "a")
    (tmp_path / "a").write_text("12345")
    with pytest.raises(OSError, match="is larger than"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "codec can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "Expecting"),
        (b"9" * 5000, "Exceeds the limit"),
        (b"[NaN]", "NaN is no finite number"),
        (b"-Infinity", "-Infinity is no finite number"),
        (b"1e999", "1e999 is no finite number"),
    ],
)
def test_what_is_no_json_is_a_value_error(tmp_path, content, words):
    """Nesting without end is one, not a RecursionError."""
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "a")
