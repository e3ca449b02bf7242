"""Disks that are full, in a mount of their own: one sentence, the old bundle, and no litter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IN_OWN_MOUNTS = ("unshare", "--user", "--map-root-user", "--mount")


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Run Python lines that have ``disk``, a folder, and ``resize(KiB)``; what they print, JSON."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    try:
        possible = subprocess.run([*IN_OWN_MOUNTS, *mount], check=False, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare to mount a small disk with")
    if possible.returncode:
        pytest.skip(f"no small disk can be mounted here: {possible.stderr.decode().strip()}")

    def run(lines: str) -> list:
        prelude = f"""
import json, os, subprocess, sys
from pathlib import Path
sys.path += [{str(ROOT / "benchmarks")!r}, {str(ROOT / "tests")!r}]
disk = Path({str(folder)!r})
subprocess.run({mount!r}, check=True)
def resize(kib):
    subprocess.run(["mount", "-o", f"remount,size={{kib}}k", disk], check=True)
"""
        done = subprocess.run(
            [*IN_OWN_MOUNTS, sys.executable, "-c", prelude + lines],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert 0 == done.returncode, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


WRITER = """
from test_exporter_bundle import publish, state
from exporter.errors import InputError
out = disk / "out"
publish(out, "old")
used = sum(file.stat().st_blocks for file in disk.rglob("*")) // 2
failed = 0
for kib in range(used, used + 400, 4):
    resize(kib)
    try:
        publish(out)
    except InputError as error:
        failed += 1
        text = str(error)
    else:
        text = "published"
    print(json.dumps([text, state(out), os.listdir(disk)]))
    if text == "published":
        break
"""


def test_each_file_is_once_the_one_that_does_not_fit(on_disk):
    """The disk grows by a page a run, until everything fits."""
    *failed, last = on_disk(WRITER)
    assert ["published", "new", ["out"]] == last
    # Five files, none of them larger than a page or two.
    assert 5 <= len(failed)
    for text, state, left in failed:
        assert text.endswith("/out cannot be written: No space left on device"), text
        assert ("old", ["out"]) == (state, left)


EXPORT = """
from kill_child import Run, export_small
from exporter.bundle import Bundle, MANIFEST
from exporter.errors import ExporterError
out = disk / "out"
def attempt():
    child = os.fork()
    if child == 0:
        reading, writing = os.pipe()
        try:
            export_small(Run(phase="", after=0), out, writing)
            text, code = "published", 0
        except ExporterError as error:
            text, code = str(error), error.exit_code
        except BaseException as error:
            text, code = repr(error), -1
        left = os.listdir(disk)
        whole = Bundle.load(out).damaged_files() == ()
        stamp = (out / MANIFEST).stat().st_ino
        print(json.dumps([code, text, left, whole, stamp]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
attempt()
used = sum(file.stat().st_blocks for file in disk.rglob("*")) // 2
for part in range(1, 25):
    resize(used + used * part // 16)
    attempt()
"""


@pytest.mark.slow
def test_an_export_on_a_full_disk_says_so_and_keeps_the_old_bundle(on_disk):
    """Also where it is onnxsim or the engine builder, processes of their own, that cannot write."""
    first, *others = on_disk(EXPORT)
    assert [0, "published"] == first[:2]
    failed = [other for other in others if other[0]]
    assert 12 < len(failed) < len(others)
    for code, text, left, whole, stamp in failed:
        assert (2, True, ["out"], first[4]) == (code, whole, left, stamp), text
        assert text.endswith("/out cannot be written: No space left on device"), text
    for _, text, left, whole, stamp in others[len(failed) :]:
        assert ("published", True, ["out"]) == (text, whole, left)
        assert stamp != first[4]


COMMAND = """
done = subprocess.run(
    [sys.executable, "-m", "exporter", "engine", "A0", "--precision", "fp16", "--image-size", "32",
     "--evaluation-images", "8", "--target", "sm86", "--out", disk / "deep" / "out", "--quiet"],
    capture_output=True, text=True,
)
print(json.dumps([done.returncode, done.stdout, done.stderr, os.listdir(disk)]))
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
done = subprocess.run(
    [sys.executable, "-m", "exporter", "engine", "A0", "--out", disk / "out", "--quiet"],
    capture_output=True, text=True,
)
print(json.dumps([done.returncode, done.stdout, done.stderr, os.listdir(disk)]))
"""


@pytest.mark.slow
def test_the_command_names_out_on_a_full_and_on_a_read_only_disk(on_disk):
    """Exit code 2, one line, nothing left."""
    for done, reason in zip(
        on_disk(COMMAND), ("No space left on device", "Read-only file system"), strict=True
    ):
        code, out, err, left = done
        assert (2, "", 1, []) == (code, out, len(err.splitlines()), left), err
        assert err.startswith("repvgg-export: OUT /")
        assert err.endswith(f"/out cannot be written: {reason}\n")
