"""What importing and helping cost, and what the device half may need."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "onnx", "onnxruntime", "onnxsim", "tensorrt", "tensorrt_rtx")


def loaded_after(program: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after ``program``."""
    # One that was made unimportable is there as None.
    loaded = f"[m for m in {HEAVY} if sys.modules.get(m)]"
    listing = f"import sys\n{program}\nprint(*{loaded}, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_import_exporter_loads_no_heavy_library():
    """`import exporter` is free of torch, onnx, onnxruntime, onnxsim and TensorRT."""
    assert set() == loaded_after("import exporter")


@pytest.mark.parametrize("arguments", [["--help"], ["engine", "--help"], ["evaluate", "--help"]])
def test_help_loads_no_heavy_library(arguments):
    """--help of the command and of each subcommand is free of them too."""
    program = (
        "from exporter.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    assert stop.code == 0"
    )
    assert set() == loaded_after(program)


def test_help_answers_within_half_a_second():
    """The best of five runs counts: others on the machine must not decide."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "exporter", "--help"], capture_output=True, check=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "module",
    [
        "bundle.signature",
        "bundle.writer",
        "device",
        "devices",
        "engine",
        "errors",
        "evaluation",
        "files.private_folder",
        "latency",
        "parity.ledger",
        "parity.worst_images",
        "plan.planning",
        "plan.view",
        "request",
        "running.image_set",
        "running.runnable",
        "verify",
    ],
)
def test_the_device_half_imports_without_torch_and_onnx(module):
    """Each module of the device half loads with all of them made unimportable."""
    block = "\n".join(f"sys.modules[{name!r}] = None" for name in HEAVY)
    assert set() == loaded_after(f"{block}\nimport exporter.{module}")


def test_a_foreign_models_package_is_named_clearly(tmp_path):
    """A models/ folder that shadows ours is one clear sentence, not an AttributeError later."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import exporter"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the package 'models' found at" in done.stderr
    assert "is not the one of repvgg-exporter" in done.stderr
