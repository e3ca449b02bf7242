"""Fixtures that run the real command, once a session where the result can be shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from calibration.sensitivity import ParetoPoint
from exporter.parity import GATES, Gate, StageResult, not_run
from exporter.parity.comparison import Comparison
from exporter.parity.layer_figures import ChannelSpread, LayerFigures, LayerTable, Spreads
from exporter.parity.ledger import CurvePoint, Ledger, MixedPrecision, Rung
from exporter.parity.worst_images import worst_images
from exporter.report import ReportContent, thumbnails
from exporter.request import ExportRequest, validate

# As the command does it: tests share their cores with the processes they start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# What a test sees made is made for it.
os.environ["REPVGG_EXPORT_CACHE"] = "off"

Command = Callable[..., subprocess.CompletedProcess[str]]


_COLUMNS = os.environ.get("COLUMNS")


def run_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``repvgg-export`` in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if os.environ.get("COLUMNS") == _COLUMNS:
        # Parallel runs set 80, where tables shorten their words; a test's own number counts.
        environment["COLUMNS"] = "160"
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
    """``bundles("int8")`` -> the default A0 bundle and the process that made it.

    Processes that run tests side by side share them.
    """
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "bundles"
    root.mkdir(exist_ok=True)

    def bundle(precision: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        out, record = root / f"A0-{precision}", root / f"{precision}.json"
        with FileLock(root / f"{precision}.lock"):
            if not record.exists():
                made = run_command(
                    "engine", "A0", "--precision", precision, "--out", str(out), "--json"
                )
                found = [made.args, made.returncode, made.stdout, made.stderr]
                record.write_text(json.dumps(found))
        return out, subprocess.CompletedProcess(*json.loads(record.read_text()))

    return bundle


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tiny networks torch's threads only wait for one another: seconds, on busy cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def report_content() -> ReportContent:
    """Everything that a report can show, of a network that never was."""
    layers = tuple(
        LayerFigures(
            name=f"stage{index}.conv",
            operator="Conv",
            computed_in="half" if index == 4 else "int8",
            sqnr_db=42.0 - 1.7 * index,
            own_sqnr_db=45.0 - index,
            activations=Spreads(before=spread_of(0.01, 9.0), after=spread_of(0.2, 1.1)),
            weights=Spreads(before=spread_of(0.1, 2.0), after=spread_of(0.3, 1.0)),
        )
        for index in range(8)
    )
    closeness = Comparison(
        max_abs=0.1, relative=0.01, sqnr_db=37.3, cosine=0.9999, top1_agreement=0.99, kl_nats=1e-4
    )
    int8 = StageResult(
        stage="int8", status="pass", comparison=closeness, gate=GATES["int8"], top1=0.9861
    )
    rungs = [Rung(recipe="minmax", seconds=1.0, reason="a scale is zero")]
    rungs += [Rung(recipe="full", seconds=8.1, result=int8, chosen=True)]
    curve = [
        CurvePoint(
            point=ParetoPoint(kept=("stage4.conv",)[:kept], sqnr_db=37.0 + kept, int8_share=1.0),
            result=int8 if kept == 1 else None,
        )
        for kept in range(2)
    ]
    output = np.eye(10, dtype=np.float32)[::-1].copy()
    ledger = Ledger(
        stages=(
            replace(int8, stage="reparameterized", gate=GATES["onnx"]),
            int8,
            not_run("engine", "no NVIDIA driver"),
        ),
        images="test images",
        image_count=10,
        original_top1=0.9889,
        ladder=tuple(rungs),
        mixed_precision=MixedPrecision(
            curve=tuple(curve), kept=("stage4.conv",), wanted=Gate(min_sqnr_db=37.0)
        ),
        layers=LayerTable(images=8, precision="int8", rows=layers),
        worst_images=worst_images(
            "int8", np.eye(10, dtype=np.float32), output, names=[f"{n}.png" for n in range(10)],
            labels=np.arange(10), class_names=[f"class {n}" for n in range(10)], classifier=True,
        ),
    )  # fmt: skip
    figures = {
        "convolutions": {"total": 8, "int8": 7, "half": 1, "float": 0},
        "epilogue_fused": 0,
        "other_kernels": 9,
    }
    data = {"usable": 40, "duplicates": 1, "constant": 0, "tiny": 0, "classes": 10}
    manifest = {
        "created": "2026-11-25T01:02:03+00:00",
        "model": {
            "name": "RepVGG-A0", "variant": "A0", "num_classes": 10, "parameters": 7041194,
            "macs": 111047168,
        },
        "class_names": [f"class {n}" for n in range(10)],
        "weights": {"source": "file", "file": "a0.pth", "sha256": "ab" * 32, "format": "official"},
        "calibration": {
            "recipe": "full", "description": "folder", "images": 41, "skipped": 1,
            "sha256": "cd" * 32,
            "data": {
                "findings": [{"code": "duplicates", "level": "warning", "message": "1 copy"}],
                "figures": {**data, "smallest_class": 4, "largest_class": 5},
                "training_statistics": {"given": 0.1},
            },
        },
        "evaluation": {"description": "folder", "images": 10, "skipped": 0, "sha256": "ef" * 32},
        "preprocess": {"image_size": [64, 64], "mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"},
        "contract": {"convolutions": 8, "blocks": 8, "allowed_extras": {"Add": 2}},
        "reparameterization": {"blocks": [1], "worst_block": "stage0", "worst_relative": 1e-6},
        "versions": {"python": "3.11", "torch": "2.13", "tensorrt": None},
        "notes": ["pass --evaluation for held-out images"],
        "spec": validate(ExportRequest(model="A0", min_sqnr_db=37.0)).to_json(),
    }  # fmt: skip
    engine = {
        "backend": "tensorrt-rtx", "version": "1.7", "targets": ["sm86", "sm89"],
        "plan_bytes": 10318508, "per_target": {"sm86": figures, "sm89": figures},
        "warnings": ["8 of 8 convolutions leave bias to a separate kernel"],
        "deferred": {
            "targets": ["sm87"], "reason": "Orin needs full TensorRT",
            "build_with": "repvgg-export build BUNDLE", "commands": {"10.3": "trtexec --onnx=m"},
        },
    }  # fmt: skip
    pixels = {n: np.full((3, 64, 64), n / 10, np.float32) for n in range(8)}
    seconds = {"load": 0.7, "reparameterize": 1.6, "quantize": 14.9, "engine": 1.5}
    return ReportContent(
        manifest=manifest,
        parity=json.loads(json.dumps(ledger.to_json())),
        engine=engine,
        seconds=seconds,
        files={"model.onnx": 28172400, "model.int8.onnx": 7136473, "model.engine": 10318508},
        pictures=thumbnails(pixels, None),
    )


def spread_of(smallest: float, largest: float) -> ChannelSpread:
    return ChannelSpread(smallest=smallest, median=largest / 2, largest=largest, dead=1)
