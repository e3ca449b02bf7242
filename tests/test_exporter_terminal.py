"""Streams, log file and progress: whose words go where."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import InputError
from exporter.terminal import (
    Streams,
    interruptible,
    opened,
    progress,
    progress_bars,
    sentence,
    streams,
    visible,
)
from exporter.terminal.progress import EVERY_S, _Lines, moves_its_cursor
from exporter.terminal.run_log import RunLog


def every_second():
    """A clock that begins at noon of 2 January 2026 and moves by a second a reading."""
    start = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)
    readings = itertools.count()
    return lambda: start + timedelta(seconds=next(readings))


def test_each_line_of_the_log_has_its_time_and_its_source(tmp_path):
    """A text of several lines is several lines of the log; the file is added to."""
    path = tmp_path / "new" / "log"
    path.parent.mkdir()
    path.write_text("earlier\n")
    with RunLog(path, clock=every_second()) as log:
        log.write("result", "one\ntwo\n")
        log.write("note", "three")
    assert [
        "earlier",
        "2026-01-02T12:00:00.000+00:00 result one",
        "2026-01-02T12:00:00.000+00:00 result two",
        "2026-01-02T12:00:01.000+00:00 note three",
    ] == path.read_text().splitlines()


def test_what_libraries_printed_stands_before_our_next_line_and_none_is_lost(tmp_path):
    """Lines are cut at their ends, whatever pieces they came in; the last may have none."""
    with tempfile.TemporaryFile() as foreign:
        with RunLog(tmp_path / "log", foreign, every_second()) as log:
            os.write(foreign.fileno(), b"first\nsec")
            log.write("note", "ours")
            os.write(foreign.fileno(), b"ond\n\xff without end")
            log.write("note", "ours again")
        lines = (tmp_path / "log").read_text().splitlines()
    assert [
        "library first",
        "note ours",
        "library second",
        "note ours again",
        r"library \xff without end",
    ] == [line.partition(" ")[2] for line in lines]


def test_a_log_that_cannot_be_written_is_refused_in_one_sentence(command, tmp_path):
    """Exit code 2, with --json the same as an object; the command does not run."""
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        RunLog(tmp_path)
    done = command("completion", "bash", "--json", "--log-file", str(tmp_path))
    sentence = f"log file {tmp_path} cannot be written: Is a directory"
    assert (2, f"repvgg-export: {sentence}\n") == (done.returncode, done.stderr)
    assert f'{{"error": "{sentence}", "exit_code": 2}}\n' == done.stdout


def test_a_log_may_lie_in_a_folder_that_the_command_is_to_make(tmp_path):
    """As in `--results results --log-file results/parity.log` of the ready-made CI files."""
    with RunLog(tmp_path / "results" / "of" / "parity.log", clock=every_second()) as log:
        log.write("note", "one")
    assert [tmp_path / "results" / "of" / "parity.log"] == [*tmp_path.rglob("*.log")]


@given(st.text(st.characters(codec=None), max_size=50))
def test_a_sentence_is_one_line_that_every_terminal_can_show(text):
    """Line ends, colours and halves of surrogate pairs stand in it as Python writes them."""
    line = sentence(f"a {text} b")
    assert 1 == len(line.splitlines())
    assert all(char == "\t" or (" " <= char and not "\x7f" <= char <= "\x9f") for char in line)
    assert line.encode()
    assert text.isprintable() <= (f"a {text} b" == line)


def test_a_long_sentence_keeps_its_beginning_and_its_end():
    """Megabytes of a file's text are no help to anybody."""
    line = sentence(f"begin {'x' * 10**6} end")
    assert len(line) < 3000
    assert (line[:5], line[-3:]) == ("begin", "end")


def test_lines_and_tabs_of_a_text_stay():
    """Only what moves the cursor or changes colours is spelled out."""
    assert "a\tb\nc \\x1b[31m" == visible("a\tb\nc \x1b[31m")


def test_names_from_files_cannot_colour_the_terminal(tmp_path, command):
    """Neither in an error nor in a table."""
    path = tmp_path / "\x1b[31m\nred.cache"
    path.write_text("TRT-8601-EntropyCalibration2\nimages: 3c000000\n")
    shown = command("inspect", str(path))
    path.write_text("TRT-8601-EntropyCalibration2\n\x1b[31mimages\n")
    refused = command("inspect", str(path))
    assert (0, 2) == (shown.returncode, refused.returncode)
    assert "\x1b" not in shown.stdout + refused.stderr
    assert 1 == len(refused.stderr.splitlines())


def test_plain_progress_announces_a_stage_once_and_long_ones_again():
    """Elapsed 30 s at a quarter leave 90 s."""
    now, said = [0.0], []
    lines = _Lines(said.append, lambda: now[0])
    for seconds, stage, fraction in (
        (0, "load", 0.0),
        (1, "load", 1.0),
        (1, "calibrate", 0.0),
        (1 + EVERY_S / 2, "calibrate", 0.1),
        (31, "calibrate", 0.25),
        (32, "calibrate", 0.26),
        (61, "calibrate", 1.0),
    ):
        now[0] = float(seconds)
        lines(stage, fraction)
    assert ["load ...", "calibrate ...", "calibrate 25%, 90 s left"] == said


def test_a_file_is_no_terminal_whatever_forces_colour(monkeypatch):
    """FORCE_COLOR gives a log colours, never a bar that moves the cursor."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert not moves_its_cursor(io.StringIO())


def test_streams_of_a_calling_program_are_left_alone(capsys):
    """Where sys.stdout is no descriptor, words go to it, and notes of a quiet command nowhere."""
    with opened(quiet=True, debug=False, log_file=None) as own:
        own.result("result")
        own.note("note")
        own.error("error")
        sys.stdout.write("foreign\n")
    assert ("result\nforeign\n", "error\n") == capsys.readouterr()
    assert Streams(out=sys.stdout, err=sys.stderr) == streams()


NOISE = """
import logging, os, subprocess, sys, warnings
from exporter.commands import completion
from exporter.cli import main
real = completion._run_completion
def noisy(options):
    os.write(1, b"raw 1\\n"); os.write(2, b"raw 2\\n")
    print("printed"); print("printed to stderr", file=sys.stderr)
    warnings.warn("warned")
    logging.getLogger("torch.onnx").warning("logged")
    subprocess.run(["sh", "-c", "echo child; echo child error >&2"])
    return real(options)
completion._run_completion = noisy
sys.exit(main(sys.argv[1:]))
"""
NOISES = ("raw 1", "raw 2", "printed", "printed to stderr", "warned", "logged", "child error")


def noisy(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`completion bash` in a process where libraries print in every way they know."""
    return subprocess.run(
        [sys.executable, "-c", NOISE, "completion", "bash", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_that_libraries_print_reaches_the_terminal(command):
    """Prints, warnings, logs, raw writes and child processes all stay out of both streams."""
    quiet, loud = command("completion", "bash"), noisy()
    assert (0, "") == (loud.returncode, loud.stderr)
    assert quiet.stdout == loud.stdout


def test_the_log_file_has_what_libraries_printed(tmp_path):
    """Each of them is a line with its time and the source `library`."""
    log = tmp_path / "run.log"
    done = noisy("--log-file", str(log), "--quiet")
    assert (0, "") == (done.returncode, done.stderr)
    lines = log.read_text().splitlines()
    foreign = [line.split(" ", 2)[2] for line in lines if " library " in line]
    for noise in NOISES:
        assert any(line.endswith(noise) for line in foreign), noise
    assert "command repvgg-export completion bash --log-file" in lines[0]
    assert "end exit code 0 after" in lines[-1]
    assert any(" result #compdef repvgg-export" in line for line in lines)


def test_debug_lets_libraries_print():
    """Their words are where they sent them."""
    done = noisy("--debug")
    assert all(noise in done.stdout + done.stderr for noise in NOISES)


def ending(statement: str) -> subprocess.CompletedProcess[str]:
    """`completion bash --json` that ends by ``statement``."""
    program = NOISE.replace("return real(options)", statement)
    return subprocess.run(
        [sys.executable, "-c", program, "completion", "bash", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_internal_error_is_an_object_a_traceback_and_exit_code_1():
    """A bug is neither hidden nor dressed as a refusal."""
    done = ending("raise RuntimeError('broken')")
    assert 1 == done.returncode
    assert '{"error": "internal error: RuntimeError: broken", "exit_code": 1}\n' == done.stdout
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("RuntimeError: broken\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_somebody_swallows_is_raised_again_at_the_next_step(
    number: signal.Signals,
) -> None:
    """A library's bare ``except`` may; but what is at the end of a stage is done."""
    before = signal.getsignal(number)
    with interruptible(), progress_bars(quiet=True) as progress:
        progress("load", 0.0)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(10)
        progress("load", 1.0)
        with pytest.raises(KeyboardInterrupt):
            progress("export", 0.0)
    assert before == signal.getsignal(number)


@pytest.mark.parametrize(
    ("statement", "sentence", "code"),
    [
        ("raise KeyboardInterrupt", "interrupted; nothing was published", 130),
        ("raise OSError(28, 'No space left', 'x')", "[Errno 28] No space left: 'x'", 3),
    ],
)
def test_interruption_and_a_full_disk_are_objects_too(statement, sentence, code):
    """The sentence is the same on standard error."""
    done = ending(statement)
    assert (code, f"repvgg-export: {sentence}\n") == (done.returncode, done.stderr)
    assert {"error": sentence, "exit_code": code} == json.loads(done.stdout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("completion", "bash"), 3), (("inspect", "absent", "--json"), 2)],
)
def test_standard_output_that_cannot_be_written_is_told_in_one_sentence(arguments, code):
    """A result that was lost is a failure; a failure keeps its own exit code."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "exporter", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert code == done.returncode
    assert done.stderr.startswith("repvgg-export: ")
    assert 1 == done.stderr.count("\n")


def test_closed_streams_change_no_exit_code():
    """Started without standard output or error, as some services do it."""
    for redirection in (">&-", "2>&-"):
        shell = f"{sys.executable} -m exporter completion bash {redirection}"
        done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
        assert (0, "") == (done.returncode, done.stderr)


def test_a_reader_that_leaves_is_no_failure():
    """Exit code 0 and silence, though the pipe is closed before anything is written."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "completion", "bash"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (0, "") == (done.returncode, done.stderr)


ENDINGS = """
from rich.table import Table
from exporter.console import print_json, print_line, print_note, print_table
from exporter.errors import GateFailedError, InputError
from exporter.terminal import progress_bars
"""


def ending_unread(statements: str, stream: str) -> subprocess.CompletedProcess[str]:
    """`completion bash` that ends by ``statements``, while nobody reads its ``stream``."""
    program = ENDINGS + NOISE.replace("return real(options)", statements)
    read, write = os.pipe()
    os.close(read)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: write}
    done = subprocess.run(
        [sys.executable, "-c", program, "completion", "bash"], text=True, check=False, **streams
    )
    os.close(write)
    return done


@pytest.mark.parametrize(
    ("statements", "code", "sentence"),
    [
        ("print_table(Table('a')); return 1", 1, ""),
        ("print_line('a' * 10**6); return 1", 1, ""),
        ("print_json({}); return 1", 1, ""),
        ("print_table(Table('a')); raise GateFailedError('12 dB')", 1, "repvgg-export: 12 dB\n"),
        ("print_line('a' * 10**6); raise InputError('bad')", 2, "repvgg-export: bad\n"),
        ("print_table(Table('a')); print_line('a'); print_note('on'); return 0", 0, "on\n"),
    ],
)
def test_a_reader_that_leaves_changes_no_exit_code(statements: str, code: int, sentence: str):
    """What is printed is lost, and the command goes on to what it has to say: a gate failed."""
    done = ending_unread(statements, "stdout")
    assert (code, sentence) == (done.returncode, done.stderr)


@pytest.mark.parametrize("statement", ["print_note('a')", "progress('load', 0.0)"])
def test_work_goes_on_when_nobody_reads_what_is_told_meanwhile(statement: str):
    """An export that has run for an hour does not end at the next line of its progress."""
    work = f"with progress_bars(quiet=False) as progress: {statement}; progress('draft', 0.0)"
    done = ending_unread(f"{work}\n    print_line('made'); return 0", "stderr")
    assert (0, "made\n") == (done.returncode, done.stdout)


def test_work_goes_on_when_the_terminal_of_its_bars_has_gone(monkeypatch):
    """A window that was closed under a command which ignores its hang-up."""
    monkeypatch.setenv("TERM", "xterm")
    own, other = pty.openpty()
    with open(other, "w") as err, opened(quiet=False, debug=False, log_file=None):  # noqa: PTH123
        monkeypatch.setattr(progress, "streams", lambda: Streams(out=io.StringIO(), err=err))
        with progress_bars(quiet=False) as bars:
            bars("load", 0.5)
            os.close(own)
            bars("draft", 0.5)
