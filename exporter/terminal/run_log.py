"""The log file: every line that was said or kept back, with its time.

A line is ``2026-11-25T03:04:05.678+00:00 SOURCE text``. SOURCE is ``command`` (how it was called),
``progress``, ``note``, ``result`` (standard output), ``error``, ``end`` or ``library``: what
something else printed. A library's line has the time at which it was read, which is before the next
line of our own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TextIO

from exporter.errors import InputError

Clock = Callable[[], datetime]


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(timezone.utc)


class RunLog:
    """Appends to a file, and reads ``foreign`` before each line of our own.

    Raises:
        InputError: if the file cannot be opened for appending.
    """

    def __init__(self, path: Path, foreign: BinaryIO | None = None, clock: Clock = now) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = path.open("a", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise InputError(f"log file {path} cannot be written: {error.strerror}") from error
        self._foreign = foreign
        self._position = 0
        self._rest = b""
        self._clock = clock

    def write(self, source: str, text: str) -> None:
        """Add ``text``, one line of the file for each of its own."""
        self._read_foreign()
        self._add(source, text)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Read what is left, the last line without its end included, and close."""
        self._read_foreign()
        if self._rest:
            self._add("library", self._rest.decode("utf-8", "backslashreplace"))
        self._file.close()

    def _add(self, source: str, text: str) -> None:
        stamp = self._clock().isoformat(timespec="milliseconds")
        for line in text.rstrip().splitlines() or [""]:
            self._file.write(f"{stamp} {source} {line}".rstrip() + "\n")
        self._file.flush()

    def _read_foreign(self) -> None:
        if self._foreign is None:
            return
        # The writers share the file's offset, so it is read without moving it.
        size = os.fstat(self._foreign.fileno()).st_size
        content = os.pread(self._foreign.fileno(), size - self._position, self._position)
        self._position += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            if line.strip():
                self._add("library", line.decode("utf-8", "backslashreplace"))
