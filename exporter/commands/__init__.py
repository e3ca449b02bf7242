"""Groups of commands: arguments, and what runs them. `cli` puts them together.

Importing them loads nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from typing import Protocol

from exporter.errors import EnvironmentLackError

EXPORT_LIBRARIES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "safetensors",
    "cyclonedx",
    "packaging",
)


class AddCommand(Protocol):
    """Makes the parser of one command, with the options that all commands have."""

    def __call__(self, name: str, words: str) -> argparse.ArgumentParser: ...


def require_libraries(*names: str) -> None:
    """Say which extra is missing before any work is done.

    Raises:
        EnvironmentLackError: naming what is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise EnvironmentLackError(
            f"not installed: {', '.join(missing)}; pip install 'repvgg-exporter[export]'"
        )


def keep_threads_from_spinning() -> None:
    """Before torch is imported, which reads it when it loads its OpenMP.

    Threads that spin while others work slow a forward pass down 40 times on a machine with another
    busy process.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
