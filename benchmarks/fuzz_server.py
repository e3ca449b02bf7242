"""Runs the command again and again, each time in a process of its own that is forked from here.

Importing torch takes longer than most wrong files are read in, so it happens once, before the first
fork. Requests are lines of JSON on standard input, answers the same on standard output::

    {"arguments": [...], "stdout": FILE, "stderr": FILE, "cwd": DIR, "seconds": 60, "canary": FILE}
    {"code": 2, "signal": null, "timed_out": false, "seconds": 0.2, "cpu_seconds": 0.1,
     "peak_bytes": 500000000}

``peak_bytes`` is the largest resident set of that process or of one that it started, the libraries
loaded here included: the figure of a file in order is to be subtracted.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

_ADDRESS_SPACE = 24 << 30
"""Bytes: what would take the whole machine fails instead."""


def main() -> None:
    """Answer requests until standard input ends."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import onnxsim  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401

    import exporter.inspection.onnx_graph
    import exporter.inspection.weights
    import exporter.pipeline
    import exporter.verify  # noqa: F401

    # With no thread but this one: a thread pool does not survive a fork.
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_the_command(request)
    timed_out = not _ends_within(child, request["seconds"])
    if timed_out:
        _kill_group(child)
    _, status, usage = os.wait4(child, 0)
    _kill_group(child)  # what it started and left behind
    return {
        "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "timed_out": timed_out,
        "seconds": round(time.monotonic() - start, 3),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def _ends_within(child: int, seconds: float) -> bool:
    descriptor = os.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _kill_group(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _become_the_command(request: dict[str, Any]) -> None:
    """As ``python -m exporter`` would end: its exit code, or the traceback and 1."""
    code = 1
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(request["cwd"])
        cache = Path(request["cwd"]).parent / "cache"
        os.environ.update(
            CANARY=request["canary"],
            TMPDIR=request["cwd"],
            REPVGG_EXPORT_CACHE=str(cache),
            REPVGG_EXPORT_CACHE_LIMIT="300M",
        )
        for name, descriptor in (("/dev/null", 0), (request["stdout"], 1), (request["stderr"], 2)):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
            opened = os.open(name, flags, 0o644)
            os.dup2(opened, descriptor)
            os.close(opened)
        from exporter.cli import main as command

        code = command([os.fsdecode(os.fsencode(word)) for word in request["arguments"]])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - the interpreter would print it too
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
