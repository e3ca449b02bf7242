"""What a person and a program see of real commands: on a terminal, in a pipe, as JSON."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.cli import _EXAMPLES, build_parser, main
from exporter.commands.argument_parser import UsageError
from models.registry import bundled_weights

COMMANDS = tuple(_EXAMPLES)
STAGES = (
    "load", "reparameterize", "export", "simplify", "calibrate", "quantize", "half",
    "evidence", "engine",
    "publish",
)  # fmt: skip
COLOUR = re.compile(r"\x1b\[(\d+;)*(3|4|9)\d")


@pytest.mark.parametrize(
    "precision",
    ["int8", *(pytest.param(other, marks=pytest.mark.slow) for other in ("fp16", "fp32"))],
)
def test_an_export_says_nothing_that_is_not_ours(bundles, precision):
    """Standard error has stages and notes, standard output one JSON object; no library speaks."""
    _, process = bundles(precision)
    allowed = {f"{stage} ..." for stage in STAGES}
    lines = process.stderr.splitlines()
    assert {"load ...", "publish ..."} <= set(lines)
    foreign = [
        line
        for line in lines
        if line not in allowed
        and not line.startswith("note: ")
        and not re.fullmatch(rf"({'|'.join(STAGES)}) \d+%, \d+ s left", line)
    ]
    assert [] == foreign
    assert process.stdout.count("\n") == 1
    assert "pass" == json.loads(process.stdout)["verdict"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 labelled images."""
    folder = tmp_path_factory.mktemp("data")
    source = bundled_weights("A0").test_images
    for path in sorted(source.rglob("*.png"))[::18][:20]:
        target = folder / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return folder


def on_a_terminal(*arguments: str, **settings: str) -> str:
    """Run the command with both streams on a terminal of 100 columns; what appears there."""
    leader, follower = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", *arguments],
        stdout=follower,
        stderr=follower,
        env={**kept, "TERM": "xterm-256color", "COLUMNS": "100", **settings},
    )
    os.close(follower)
    seen = b""
    deadline = time.monotonic() + 300
    while True:
        left = max(0.0, deadline - time.monotonic())
        if not select.select([leader], [], [], left)[0]:
            process.kill()
            pytest.fail(f"no end after 300 seconds; seen until then: {seen!r}")
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        seen += piece
    os.close(leader)
    assert 0 == process.wait(timeout=300)
    return seen.decode()


@pytest.fixture
def evaluation(bundles, data) -> tuple[str, ...]:
    """The arguments of an evaluation that says how far it is."""
    made, process = bundles("int8")
    assert process.returncode == 0, process.stderr
    return ("evaluate", str(made), "--data", str(data), "--backend", "onnxruntime")


def test_a_terminal_sees_a_bar_in_colour_and_the_table(evaluation):
    """The bar is drawn again in place; the stage has its name."""
    seen = on_a_terminal(*evaluation)
    assert "\x1b[?25l" in seen  # the cursor is hidden while the bar moves
    assert "evaluate " in seen
    assert "━" in seen
    assert COLOUR.search(seen)
    assert "images/s" in seen


def test_no_color_takes_the_colours_and_leaves_the_bar(evaluation):
    """NO_COLOR is about colour."""
    seen = on_a_terminal(*evaluation, NO_COLOR="1")
    assert "\x1b[?25l" in seen
    assert COLOUR.search(seen) is None


def test_a_dumb_terminal_gets_plain_lines(evaluation):
    """TERM=dumb: no escape code at all, the stage in a line."""
    seen = on_a_terminal(*evaluation, TERM="dumb")
    assert "\x1b" not in seen
    assert "evaluate ...\r\n" in seen


def test_quiet_shows_the_result_alone(evaluation, tmp_path):
    """No stage on the terminal; the log file has it."""
    log = tmp_path / "log"
    seen = on_a_terminal(*evaluation, "--quiet", "--log-file", str(log))
    assert "evaluate" not in seen.replace(f"evaluate {evaluation[1]}", "")
    assert "top-1" in seen
    assert " progress evaluate ..." in log.read_text()
    assert "\x1b" not in log.read_text()


def test_a_pipe_gets_no_escape_codes(command, evaluation):
    """Plain lines on standard error, tables without codes on standard output."""
    done = command(*evaluation)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr.startswith("evaluate ...\n")


def test_colours_can_be_forced_into_a_pipe_but_no_bar(monkeypatch, command, evaluation):
    """FORCE_COLOR styles the tables; nothing moves a cursor that is not there."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = command(*evaluation)
    assert "\x1b[" in done.stdout
    assert "\x1b" not in done.stderr


def test_columns_says_how_wide_tables_may_be(monkeypatch, command):
    """In a pipe too; without it they may have 120."""
    arguments = ("plan", "A0", "--precision", "int8", "--target", "orin")
    wide = command(*arguments).stdout
    monkeypatch.setenv("COLUMNS", "70")
    narrow = command(*arguments).stdout
    tables = [line for line in narrow.splitlines() if line[:1] in "┏┃┡│└"]
    assert tables
    assert max(map(len, tables)) <= 70
    assert max(map(len, wide.splitlines())) > 70


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_in_groups_and_ends_with_an_example_that_is_right(name, monkeypatch, capsys):
    """Usage is one line, every option stands once, and the example can be read."""
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    text = capsys.readouterr().out
    usage = text.split("\n\n")[0]
    assert usage.startswith(f"usage: repvgg-export {name} [OPTION ...]")
    assert "\n" not in usage
    assert "terminal:" in text
    assert f"example: repvgg-export {_EXAMPLES[name]}\n" in text
    assert max(map(len, text.splitlines())) <= 100
    words = _EXAMPLES[name].split(" > ")[0].split()
    assert name == build_parser().parse_args(words).command


def test_the_options_of_an_export_are_grouped_by_what_they_are_about(command):
    """Inputs, INT8, gates, engine, result and more have headings of their own."""
    text = command("engine", "--help").stdout
    headings = re.findall(r"^(\S.*):$", text, flags=re.MULTILINE)
    assert [
        "positional arguments", "options", "what goes in", "INT8", "gates", "engine",
        "building the engine", "result", "stage cache", "signature", "terminal",
    ] == headings  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_same_four_options_before_and_after_its_name(name):
    """And where both are given the later one counts."""
    words = _EXAMPLES[name].split(" > ")[0].split()
    given = ["--json", "--quiet", "--debug", "--log-file", "x"]
    bare = [word for word in words if word not in given]
    for line in ([*given, *bare], [*bare, *given]):
        options = build_parser().parse_args(line)
        assert (True, True, True) == (options.json, options.quiet, options.debug)
        assert Path("x") == options.log_file
    options = build_parser().parse_args(bare)
    assert (False, False, False) == (options.json, options.quiet, options.debug)
    options = build_parser().parse_args(["--log-file", "y", *bare, "--log-file", "x"])
    assert Path("x") == options.log_file


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("enigne",), "unknown command 'enigne' (nearest: engine); repvgg-export --help"),
        (
            ("engine", "A0", "--precison", "int8"),
            "engine has no option --precison (nearest: --precision); repvgg-export engine --help",
        ),
        (("plan", "A0", "--sign", "x"), "plan has no option --sign; repvgg-export plan --help"),
        (("verify", "a", "--sign=x"), "verify has no option --sign; repvgg-export verify --help"),
        (("verify",), "the following arguments are required: bundle; repvgg-export verify --help"),
        (("verify", "a", "b"), "unexpected argument 'b'; repvgg-export verify --help"),
        (
            ("engine", "A0", "--calib-images", "x"),
            "argument --calib-images: invalid int value: 'x'; repvgg-export engine --help",
        ),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_sentence(capsys, arguments, sentence):
    """Exit code 2, no wall of usage; with --json an object too."""
    expected = f"{sentence} lists what is known"
    assert 2 == main(arguments)
    assert ("", f"repvgg-export: {expected}\n") == capsys.readouterr()
    assert 2 == main([*arguments, "--json"])
    assert {"error": expected, "exit_code": 2} == json.loads(capsys.readouterr().out)
    with pytest.raises(UsageError, match=re.escape(sentence)):
        build_parser().parse_args(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ("engine", "A9"),
        ("plan", "A9"),
        ("verify", "absent"),
        ("build", "absent"),
        ("evaluate",),
        ("benchmark", "absent"),
        ("inspect", "absent"),
        ("convert", "absent", "out"),
        ("parity", "absent"),
        ("completion", "ksh"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_failure_is_one_object_on_standard_output_and_one_sentence_on_error(capsys, arguments):
    """For every command: the same sentence and the exit code."""
    assert 2 == main([*arguments, "--json"])
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert 1 == out.count("\n")
    assert 2 == found["exit_code"]
    assert f"repvgg-export: {found['error']}\n" == error


@pytest.mark.parametrize("arguments", [("enigne", "--json"), ("engine", "A9", "--json")])
def test_a_process_of_its_own_fails_as_a_call_does(command, capsys, arguments):
    """Exit code and both streams."""
    done = command(*arguments)
    assert (done.returncode, (done.stdout, done.stderr)) == (main(arguments), capsys.readouterr())
