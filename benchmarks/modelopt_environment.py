"""A Python environment that holds NVIDIA Model Optimizer, made once under build/.

Its own, because it wants other packages than ours. Its extra ``[onnx]`` asks for CUDA packages of
several hundred MB that calibration on the CPU never imports, so what it does import is named here
instead; torch, onnx and onnxruntime are the versions of constraints.txt.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "modelopt"
VERSION = "0.47.0"
PACKAGES = (
    f"nvidia-modelopt=={VERSION}",
    "lief==1.0.0",
    "onnx",
    "onnx-graphsurgeon==0.6.1",
    "onnxconverter-common==1.16.0",
    "onnxruntime",
    "onnxscript==0.7.2",
    "onnxslim==0.1.98",
    "pillow",
    "safetensors",
)
_TIMEOUT_S = 1800


class UnavailableError(Exception):
    """Model Optimizer cannot be installed or imported here; the message says why in a line."""


def modelopt_python() -> Path:
    """The environment's interpreter; makes the environment where it does not exist.

    Raises:
        UnavailableError: if it cannot be installed or imported.
    """
    python = FOLDER / "bin" / "python"
    ready = FOLDER / "installed.txt"
    if not ready.exists() or ready.read_text() != "\n".join(PACKAGES):
        print("installing Model Optimizer into build/modelopt ...", file=sys.stderr, flush=True)
        venv.create(FOLDER, clear=True, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*install, "--constraint", str(ROOT / "constraints.txt"), *PACKAGES], "install")
        _run([str(python), "-c", "import modelopt.onnx.quantization"], "import")
        ready.write_text("\n".join(PACKAGES))
    return python


def _run(command: list[str], what: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or "no message").splitlines()[-1]
        raise UnavailableError(f"Model Optimizer: cannot {what} it ({last})") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(f"Model Optimizer: {what} takes over {_TIMEOUT_S} s") from error


def open_modelopt(methods: Sequence[str]) -> Path | None:
    """The interpreter if one of ``methods`` wants it; None, and a word why, where there is none."""
    if not any(method.startswith("modelopt") for method in methods):
        return None
    try:
        return modelopt_python()
    except UnavailableError as error:
        print(error)
        return None
