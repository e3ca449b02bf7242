"""Our own standard output and error, kept apart from everybody else's.

Libraries print: Python's ``print`` and ``warnings``, ``logging``'s last resort, C++ on the file
descriptors 1 and 2, child processes that inherited them. While a command runs these descriptors
lead to a file that the log reads, or to nowhere; our words go to copies of the originals.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from exporter.terminal.run_log import RunLog
from exporter.terminal.visible import visible


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Where this command's words go. ``quiet`` keeps notes and progress off the terminal."""

    out: TextIO
    err: TextIO
    log: RunLog | None = None
    quiet: bool = False

    def record(self, source: str, text: str) -> None:
        """Into the log file alone."""
        if self.log is not None:
            self.log.write(source, text)

    def result(self, text: str) -> None:
        """On standard output."""
        self.record("result", text)
        with self.writing() as out:
            print(visible(text), file=out)

    @contextmanager
    def writing(self) -> Iterator[TextIO]:
        """Standard output, whose reader (`| head`) may leave: what it has not seen goes nowhere.

        The command goes on, since its exit code says more than its words: that a gate failed.
        """
        try:
            yield self.out
        except BrokenPipeError:
            _lead_nowhere(self.out)

    def note(self, text: str) -> None:
        """On standard error, unless quiet."""
        self.record("note", text)
        if not self.quiet:
            self._tell(text)

    def progress(self, line: str) -> None:
        """On standard error."""
        self.record("progress", line)
        self._tell(line)

    def error(self, text: str) -> None:
        """On standard error, quiet or not."""
        self.record("error", text)
        self._tell(text)

    def _tell(self, text: str) -> None:
        with self.telling() as err:
            print(visible(text), file=err, flush=True)

    @contextmanager
    def telling(self) -> Iterator[TextIO]:
        """Standard error; where it cannot be written the work goes on and the exit code remains."""
        try:
            yield self.err
        except OSError:
            _lead_nowhere(self.err)

    def settle(self) -> None:
        """Write what is buffered; what cannot be written (a full disk) goes nowhere from now on."""
        for stream in (self.out, self.err):
            try:
                stream.flush()
            except OSError:
                _lead_nowhere(stream)


def _lead_nowhere(stream: TextIO) -> None:
    """What is still buffered included, which would fail once more when the stream is closed."""
    with suppress(io.UnsupportedOperation), Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


_OPENED: ContextVar[Streams | None] = ContextVar("streams", default=None)


def streams() -> Streams:
    """Those of the running command; outside of one, the process's own."""
    return _OPENED.get() or Streams(out=_or_nowhere(sys.stdout), err=_or_nowhere(sys.stderr))


def _or_nowhere(stream: TextIO | None) -> TextIO:
    """Python has None for a descriptor that was closed before it started."""
    return io.StringIO() if stream is None else stream


@contextmanager
def opened(*, quiet: bool, debug: bool, log_file: Path | None) -> Iterator[Streams]:
    """The streams of one command; on leaving, the process has its own back.

    With ``debug``, or where standard output and error are not the descriptors 1 and 2 (a program
    that calls ``main`` with streams of its own), nothing is kept apart.

    Raises:
        InputError: if ``log_file`` cannot be written.
    """
    with ExitStack() as stack:
        foreign: BinaryIO | None = None
        out, err = _or_nowhere(sys.stdout), _or_nowhere(sys.stderr)
        if not debug and _are_the_descriptors():
            if log_file is not None:
                foreign = stack.enter_context(tempfile.TemporaryFile())
            log = stack.enter_context(RunLog(log_file, foreign)) if log_file else None
            out, err = stack.enter_context(_kept_apart(foreign))
        else:
            log = stack.enter_context(RunLog(log_file)) if log_file else None
        own = Streams(out=out, err=err, log=log, quiet=quiet)
        token = _OPENED.set(own)
        stack.callback(_OPENED.reset, token)
        yield own


def _are_the_descriptors() -> bool:
    try:
        return (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    except (OSError, ValueError, AttributeError):
        # Closed, or replaced by a program that calls `main`.
        return False


@contextmanager
def _kept_apart(foreign: BinaryIO | None) -> Iterator[tuple[TextIO, TextIO]]:
    """Lead descriptors 1 and 2 into ``foreign`` or nowhere, and yield copies of the originals."""
    sys.stdout.flush()
    sys.stderr.flush()
    with ExitStack() as stack:
        copies = [stack.enter_context(_copy(stream)) for stream in (sys.stdout, sys.stderr)]
        sink = foreign or stack.enter_context(Path(os.devnull).open("wb"))
        for descriptor in (1, 2):
            os.dup2(sink.fileno(), descriptor)
        try:
            yield copies[0], copies[1]
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), copies, strict=True):
                os.dup2(copy.fileno(), descriptor)


def _copy(stream: TextIO) -> TextIO:
    return open(  # noqa: PTH123 - closed by the caller; a descriptor is no path
        os.dup(stream.fileno()),
        "w",
        buffering=1 if getattr(stream, "line_buffering", False) else -1,
        encoding=stream.encoding,
        # A path, a class name or a table's line that the terminal's encoding lacks is no failure.
        errors="backslashreplace",
    )
