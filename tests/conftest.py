"""Fixtures that run the real command, once a session where the result can be shared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# As the command does it: tests share their cores with the processes they start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

Command = Callable[..., subprocess.CompletedProcess[str]]


def run_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``repvgg-export`` in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "exporter", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="session")
def command() -> Command:
    """``command("engine", "A0", ...)`` -> the finished process."""
    return run_command


@pytest.fixture(scope="session")
def bundles(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, subprocess.CompletedProcess[str]]]:
    """``bundles("int8")`` -> the default A0 bundle and the process that made it."""
    root = tmp_path_factory.mktemp("bundles")
    made: dict[str, subprocess.CompletedProcess[str]] = {}

    def bundle(precision: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        out = root / f"A0-{precision}"
        if precision not in made:
            made[precision] = run_command(
                "engine", "A0", "--precision", precision, "--out", str(out), "--json"
            )
        return out, made[precision]

    return bundle


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tiny networks torch's threads only wait for one another: seconds, on busy cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
