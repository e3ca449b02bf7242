"""The real command where paths are odd, HOME is missing and the terminal speaks no UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exporter.bundle import Bundle
from models.registry import bundled_weights

ROOT = Path(__file__).parent.parent
ODD = os.fsencode('it\'s "a" $HOME `x` ünï ☃')
NO_TEXT = b"und\xff\xe9cod"
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale in which Python knows no letter beyond ASCII."""


def engine(
    folder: Path, *arguments: str | bytes, without: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """`engine A0` in ``folder`` on few small images."""
    small = ("--precision", "fp16", "--image-size", "32", "--target", "sm86",
             "--evaluation-images", "8")  # fmt: skip
    own = {name: value for name, value in os.environ.items() if name != without}
    return subprocess.run(
        [sys.executable, "-m", "exporter", "engine", "A0", *small, *arguments],
        cwd=folder, env={**own, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True, check=False, timeout=300,
    )  # fmt: skip


def require_whole(out: bytes) -> None:
    """A bundle with its engine, and nothing beside it."""
    path = Path(os.fsdecode(out))
    bundle = Bundle.load(path)
    assert () == bundle.damaged_files()
    assert "model.engine" in bundle.manifest["files"]
    assert [path] == list(path.parent.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "environment"),
    [
        ("HOME", {}),
        ("", {"HOME": "/proc/absent", "XDG_CACHE_HOME": "/proc/absent"}),
        ("", ASCII),
        ("", {**ASCII, "PYTHONIOENCODING": "latin-1"}),
    ],
    ids=["no HOME", "HOME cannot be written", "ASCII", "Latin-1"],
)
def test_an_export_needs_no_home_and_no_utf8(tmp_path, without, environment):
    """A table is drawn with what the terminal has."""
    done = engine(tmp_path, "--out", "out", without=without, **environment)
    assert 0 == done.returncode, done.stderr
    assert b"model.engine" in done.stdout
    require_whole(os.fsencode(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, ASCII], ids=["UTF-8", "ASCII"])
@pytest.mark.parametrize("name", [ODD, NO_TEXT, b"two\nlines", "ünï".encode()], ids=repr)
def test_out_may_have_any_name(tmp_path, name, environment):
    """Quotes, spaces, other letters, no letters at all; the engine is built there."""
    done = engine(tmp_path, "--out", name, **environment)
    assert 0 == done.returncode, done.stderr
    out = os.path.join(os.fsencode(tmp_path), name)  # noqa: PTH118 - bytes
    require_whole(out)
    checked = subprocess.run(
        [sys.executable, "-m", "exporter", "verify", out, "--json"],
        env={**os.environ, **environment}, capture_output=True, check=False,
    )  # fmt: skip
    assert 0 == checked.returncode, checked.stderr
    assert out == os.fsencode(json.loads(checked.stdout)["bundle"])


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, ASCII], ids=["UTF-8", "ASCII"])
def test_what_goes_in_may_have_any_name(tmp_path, environment):
    """Checkpoint and images of both kinds; a failed gate writes its report all the same."""
    bundled = bundled_weights("A0")
    odd = os.path.join(os.fsencode(tmp_path), ODD + NO_TEXT)  # noqa: PTH118 - bytes
    shutil.copytree(os.fsencode(bundled.calibration_images), odd)
    for number, image in enumerate(sorted(Path(os.fsdecode(odd)).rglob("*.png"))[:5]):
        image.rename(image.with_name(os.fsdecode(NO_TEXT) + f" {number}.png"))
    weights = odd + b".safetensors"
    shutil.copy(os.fsencode(bundled.checkpoint), weights)
    given = ("--weights", weights, "--evaluation", odd, "--calib", odd)
    (tmp_path / "place").mkdir()
    done = engine(tmp_path / "place", *given, "--out", "out", **environment)
    assert 0 == done.returncode, done.stderr
    require_whole(os.fsencode(tmp_path / "place" / "out"))
    failed = engine(tmp_path, *given, "--min-sqnr", "200", "--out", NO_TEXT, **environment)
    assert 1 == failed.returncode, failed.stderr
    assert "und\\udcff\\udce9cod.failed.html" in failed.stderr.decode()
    assert (tmp_path / os.fsdecode(NO_TEXT + b".failed.html")).is_file()


@pytest.mark.slow
def test_two_exports_into_one_out_leave_one_whole_bundle(tmp_path):
    """Both run to their end; whoever publishes last has the place."""
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: engine(tmp_path, "--out", "out"), range(2)))
    assert [0, 0] == [each.returncode for each in done], [each.stderr for each in done]
    require_whole(os.fsencode(tmp_path / "out"))


@pytest.mark.parametrize("environment", [{}, ASCII], ids=["UTF-8", "ASCII"])
def test_a_terminal_that_lacks_letters_gets_escapes(tmp_path, environment):
    """A table that names a file of any name is printed, not a traceback."""
    name = os.path.join(os.fsencode(tmp_path), NO_TEXT + b".safetensors")  # noqa: PTH118 - bytes
    shutil.copy(os.fsencode(bundled_weights("A0").checkpoint), name)
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "inspect", NO_TEXT + b".safetensors"],
        cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, check=False,
    )  # fmt: skip
    assert (0, b"") == (done.returncode, done.stderr)
    assert b"und\\udcff\\udce9cod.safetensors" in done.stdout


@pytest.mark.parametrize(
    "name", ["two words", "it's", "a'b' \"c\" $$HOME `id` ; ünï ☃ & *", "-dash", "back\\slash"]
)
def test_make_hands_any_name_on(tmp_path, name):
    """Quotes too; only a dollar sign is make's own and stands there twice."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (tmp_path / "venv" / ".installed").touch()
    script = binaries / "repvgg-export"
    script.write_text('#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done\n')
    script.chmod(0o755)
    variables = [f"{each}={name}" for each in ("OUT", "WEIGHTS", "CALIB")]
    for target in ("engine", "parity"):
        done = subprocess.run(
            ["make", "--no-print-directory", "--old-file=pyproject.toml",
             "--old-file=constraints.txt", target, f"VENV={tmp_path / 'venv'}", *variables],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (0, "") == (done.returncode, done.stderr)
        words = done.stdout.splitlines()
        meant = name.replace("$$", "$")
        assert [meant] * 3 == [
            words[words.index(f"--{o}") + 1] for o in ("out", "weights", "calib")
        ]
        assert target == "engine" or ["verify", meant] == words[-2:]


def test_nothing_reads_the_clock_to_decide():
    """Clocks jump, and some devices start in 1970: wall time is written down, never compared.

    Durations are taken by a clock that only goes forward.
    """
    readers = ("time.time(", "time.time_ns(", "getmtime", "st_mtime", "st_ctime", "datetime.now(")
    found = {
        (path.relative_to(ROOT).as_posix(), word)
        for package in ("exporter", "models", "calibration")
        for path in (ROOT / package).rglob("*.py")
        for word in readers
        if word in path.read_text("utf-8")
    }
    stamps = {"exporter/provenance.py", "exporter/terminal/run_log.py"}
    # Which entry of the cache makes room first: a jump costs time, nothing else.
    order = {("exporter/stage_cache/store.py", "st_mtime")}
    assert {(path, "datetime.now(") for path in stamps} | order == found
