"""Whatever the building process does, the waiting one gets a clear answer and nothing remains."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.engine import protocol
from exporter.engine.backend import BuildRequest
from exporter.engine.profile_shapes import profile_shapes
from exporter.engine.protocol import Result, Status
from exporter.engine.refusal import BadInputError
from exporter.engine.worker_process import run_worker
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.profiles import BatchProfile, SizeProfile
from exporter.spec import Precision

REQUEST = BuildRequest(
    onnx_path=Path("model.onnx"),
    precision=Precision.INT8,
    targets=("sm80", "sm86"),
    batch=BatchProfile(1, 8, 32),
    workspace_mib=256,
)
SUCCESS = (
    "(folder / 'plan').write_bytes(b'plan'); (folder / 'build.log').write_text('[INFO] hello\\n'); "
    "(folder / 'result.json').write_text(json.dumps("
    "{'status': 'built', 'version': '9', 'errors': []}))"
)


def worker(code: str) -> list[str]:
    """A stand-in worker that runs ``code``."""
    head = "import json, os, pathlib, signal, sys, time; folder = pathlib.Path(sys.argv[1]); "
    return [sys.executable, "-c", head + code]


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Temporary files go to a folder that must be empty in the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def run(code: str, progress=lambda _phase, _fraction: None, timeout_s: float = 30.0):
    return run_worker(REQUEST, progress, command=worker(code), timeout_s=timeout_s)


def is_alive(process_id: int) -> bool:
    """Whether the process exists, as a zombie too."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_good_worker_is_passed_on_whole():
    """Plan, log and version arrive as the worker left them."""
    output = run(SUCCESS)

    assert (output.plan, output.log, output.version) == (b"plan", "[INFO] hello\n", "9")


def test_progress_arrives_clipped_and_in_order():
    """Fractions are clipped to 0..1, never go back, and other lines are ignored."""
    seen: list[tuple[str, float]] = []
    lines = [
        '{"phase": "a", "fraction": 0.5}',
        "noise",
        '{"phase": 3}',
        '["list"]',
        '{"phase": "b", "fraction": 0.25}',
        '{"phase": "c", "fraction": 7}',
    ]

    run(f"[print(line) for line in {lines!r}]; {SUCCESS}", lambda *step: seen.append(step))

    assert seen == [("a", 0.5), ("b", 0.5), ("c", 1.0)]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", ["killed by SIGSEGV"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", ["killed by SIGKILL", "memory runs out"]),
        ("sys.exit(3)", ["exit code 3", "no result"]),
        ("raise RuntimeError('no space left')", ["exit code 1", "RuntimeError: no space left"]),
        ("print('\\x00\\xff garbage'); print('{]')", ["exit code 0", "no result"]),
        ("(folder / 'result.json').write_text('{\"status\": \"fine\"}')", ["no result"]),
        ("(folder / 'result.json').write_text('[]')", ["no result"]),
        (SUCCESS.replace("b'plan'", "b''"), ["plan is empty"]),
        (SUCCESS.replace("'plan'", "'other'", 1), ["left no plan"]),
    ],
)
def test_a_crash_is_an_error_that_says_what_was_seen(code: str, words: list[str]):
    """Signals, exit codes, garbage and half-made results are all told apart."""
    with pytest.raises(EnvironmentLackError) as caught:
        run(code)

    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_a_crash_names_the_phase_it_happened_in():
    """The last phase before the crash is in the message."""
    with pytest.raises(EnvironmentLackError, match="last phase: Optimizing graph"):
        run(
            'print(\'{"phase": "Optimizing graph", "fraction": 0.5}\', flush=True); '
            "os.kill(os.getpid(), signal.SIGABRT)"
        )


@pytest.mark.parametrize(
    "code",
    [
        "time.sleep(60)",
        "os.close(1); time.sleep(60)",
        "[print('x' * 80, flush=True) for _ in iter(int, 1)]",
    ],
    ids=["silent", "closed output", "flood"],
)
def test_a_hanging_worker_is_stopped_in_time(code: str):
    """Silence, a closed output and an endless flood all end at the time limit."""
    started = time.monotonic()

    with pytest.raises(EnvironmentLackError, match=r"did not finish within 0\.4 s"):
        run(code, timeout_s=0.4)

    assert time.monotonic() - started < 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_kills_the_worker_and_is_passed_on(error: type[BaseException]):
    """What the progress callback raises comes out; the process is gone, not even a zombie."""
    process_ids: list[int] = []

    def interrupt(phase: str, _fraction: float) -> None:
        process_ids.append(int(phase))
        raise error

    with pytest.raises(error):
        run(
            "print(json.dumps({'phase': str(os.getpid()), 'fraction': 0}), flush=True); "
            "time.sleep(60)",
            interrupt,
        )

    assert [is_alive(process_id) for process_id in process_ids] == [False]


def test_a_signal_while_waiting_kills_the_worker(tmp_path: Path):
    """Ctrl-C during a silent build ends the build and raises KeyboardInterrupt."""
    told = tmp_path / "process"
    write = f"pathlib.Path({str(told)!r}).write_text(str(os.getpid()))"
    with pytest.raises(KeyboardInterrupt):
        run(f"{write}; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)")
    assert not is_alive(int(told.read_text()))


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("refused", GateFailedError),
        ("bad_input", InputError),
        ("lacking", EnvironmentLackError),
    ],
)
def test_each_ending_has_its_error_and_keeps_the_words(status: str, error: type[Exception]):
    """The worker's words are in the message, on one line, the first three of many."""
    errors = ["one\ntwo", "three", "four", "five", "six"]
    content = {"status": status, "version": "", "errors": errors}

    with pytest.raises(error, match="one two; three; four") as caught:
        run(f"(folder / 'result.json').write_text(json.dumps({content!r}))")

    assert str(caught.value).endswith("; and 2 more")


def test_a_worker_that_cannot_start_is_told():
    """A missing program is an error of the environment."""
    with pytest.raises(EnvironmentLackError, match="cannot be started"):
        run_worker(REQUEST, lambda *_: None, command=["/nonexistent/python"])


def test_a_request_reads_back_as_written(tmp_path: Path):
    """Every field survives, and the path no longer depends on the working directory."""
    text = json.dumps(protocol.request_to_json(REQUEST))

    read = protocol.request_from_json(text)

    assert read.onnx_path == Path.cwd() / "model.onnx"
    assert (read.precision, read.targets, read.batch, read.workspace_mib) == (
        REQUEST.precision,
        REQUEST.targets,
        REQUEST.batch,
        REQUEST.workspace_mib,
    )
    result = Result(status=Status.REFUSED, version="1", errors=("why",))
    result.write(tmp_path)
    assert Result.read(tmp_path) == result


def test_an_orphaned_worker_stops_by_itself():
    """The worker notices that nobody reads its progress and cancels instead of building on."""
    from exporter.engine.worker import ProgressPrinter

    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        printer = ProgressPrinter(stream)
        printer.say("phase", 0.1)
        assert printer.abandoned
        # What could not be written stays in the buffer; closing must not try again.
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, writing)
        os.close(devnull)


def test_sigint_to_the_whole_program_leaves_nothing(tmp_path: Path, temporary_folder: Path):
    """A real interrupt of a real program ends its worker and empties its temporary folder."""
    pid_file = tmp_path / "worker.pid"
    program = tmp_path / "program.py"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    program.write_text(
        "import sys, tempfile\n"
        "from pathlib import Path\n"
        "from exporter.engine import BuildRequest\n"
        "from exporter.engine.worker_process import run_worker\n"
        "from exporter.profiles import BatchProfile; from exporter.spec import Precision\n"
        f"tempfile.tempdir = {str(temporary_folder)!r}\n"
        "request = BuildRequest(onnx_path=Path('m'), precision=Precision.FP16,\n"
        "                       targets=('sm86',), batch=BatchProfile(1, 1, 1))\n"
        f"run_worker(request, print, command=[sys.executable, '-c', {code!r}])\n",
        encoding="utf-8",
    )
    home = str(Path(protocol.__file__).resolve().parents[2])
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": home},
    )
    deadline = time.monotonic() + 20
    while not (pid_file.is_file() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)

    process.send_signal(signal.SIGINT)
    process.wait(20)

    assert not is_alive(int(pid_file.read_text()))


REQUEST_SIZED = replace(
    REQUEST, batch=BatchProfile(1, 2, 4), size=SizeProfile((8, 16, 24), (8, 8, 8))
)


def test_open_extents_come_from_the_profiles():
    """Batch, height and width are filled in; what is fixed stays; a vector has a batch only."""
    image = profile_shapes("image", (-1, 3, -1, -1), REQUEST_SIZED)
    assert image == [[1, 3, 8, 8], [2, 3, 16, 8], [4, 3, 24, 8]]
    assert profile_shapes("v", (-1, 5), REQUEST_SIZED) == [[1, 5], [2, 5], [4, 5]]
    assert profile_shapes("image", (-1, 3, 7, 9), REQUEST_SIZED)[0] == [1, 3, 7, 9]


def test_pixels_have_their_open_extents_before_the_channels():
    """[N, H, W, 3], as graphs that take uint8 images have it."""
    image = profile_shapes("image", (-1, -1, -1, 3), REQUEST_SIZED)
    assert image == [[1, 8, 8, 3], [2, 16, 8, 3], [4, 24, 8, 3]]
    assert profile_shapes("image", (-1, 7, 9, 3), REQUEST_SIZED)[0] == [1, 7, 9, 3]


def test_other_open_extents_are_refused():
    """Without a size profile height must be fixed; with one, channels must."""
    with pytest.raises(BadInputError, match=r"only the batch may be open"):
        profile_shapes("image", (-1, 3, -1, 8), replace(REQUEST_SIZED, size=None))
    with pytest.raises(BadInputError, match=r"only batch, height and width may be open"):
        profile_shapes("image", (-1, -1, -1, 8), REQUEST_SIZED)


def test_a_size_profile_travels_to_the_worker():
    """It is in the request as text and reads back."""
    text = json.dumps(protocol.request_to_json(REQUEST_SIZED))
    assert protocol.request_from_json(text).size == REQUEST_SIZED.size


TETHERED = """
import os, sys, time
from pathlib import Path
from exporter.engine import worker
def hang(*_):
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(600)
worker._run = hang
sys.exit(worker.main(["library", sys.argv[2]]))
"""
WAITING = """
import sys
from pathlib import Path
from exporter.engine.backend import BuildRequest
from exporter.engine.worker_process import run_worker
from exporter.profiles import BatchProfile
from exporter.spec import Precision
request = BuildRequest(onnx_path=Path("m"), precision=Precision.FP16, targets=("sm86",),
                       batch=BatchProfile(1, 8, 32), workspace_mib=256)
run_worker(request, print, command=[sys.executable, "-c", *sys.argv[1:]])
"""


def test_a_killed_parent_takes_its_worker_with_it(
    tmp_path: Path, temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """SIGKILL cannot be handled: the kernel ends a builder that would work on for minutes.

    Its folder is removed by the next build.
    """
    monkeypatch.setenv("TMPDIR", str(temporary_folder))
    told = tmp_path / "process"
    parent = subprocess.Popen([sys.executable, "-c", WAITING, TETHERED, str(told)])
    while not told.is_file() or not told.read_text():
        assert parent.poll() is None
        time.sleep(0.02)
    (left,) = temporary_folder.iterdir()
    parent.kill()
    parent.wait()
    status = Path("/proc", told.read_text(), "stat")
    deadline = time.monotonic() + 60
    while status.exists() and ") Z " not in status.read_text():
        assert time.monotonic() < deadline, "the worker works on"
        time.sleep(0.02)
    assert left.is_dir()
    run(SUCCESS)
    assert not left.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_worker_without_space_is_told_from_one_that_crashed(number: int):
    """It can leave no words where the disk is full: the number is its exit code."""
    with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
        run(f"sys.exit({number})")
    assert number == caught.value.errno


def test_the_real_worker_ends_with_that_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever it was writing: the log, the plan or the result."""
    from exporter.engine import worker as real

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(real, "_run", full)
    monkeypatch.setattr(real, "_end_with_parent", lambda: None)
    monkeypatch.setattr(real, "_private_stdout", lambda: (tmp_path / "stdout").open("w"))
    assert errno.ENOSPC == real.main(["tensorrt_rtx", str(tmp_path)])
