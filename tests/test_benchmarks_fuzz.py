"""Whoever reads a file returns or refuses it in a sentence, whatever is in the file.

The readers are called here in this process on files that benchmarks/corruption.py and its kin have
made wrong; the campaign, which gives such files to the real command, runs for a minute.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from calibration.images import ImageDataError, Preprocess, load_image
from calibration.table import CalibrationTable, TensorRange
from exporter.bundle import Bundle
from exporter.commands.device import _read_evaluation
from exporter.errors import ExporterError
from exporter.files.text_file import read_json
from exporter.inspection import inspect_file
from exporter.parity_run.baseline import read_baseline
from exporter.parity_run.config import read_config
from exporter.quantization.replay import load_table
from exporter.sources.qdq_source import import_quantized
from exporter.verify import verify
from models.checkpoint import CheckpointError, load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
REFUSALS = (ExporterError, CheckpointError, ImageDataError)
BOMBS = ("bomb", "zip bomb")
"""Seconds to make: the campaign has them, and tests of their own."""


@pytest.fixture(scope="module")
def fuzz() -> Iterator[SimpleNamespace]:
    """The campaign's modules; scripts in one folder import one another by name."""
    names = ("corrupt_weights", "fuzz", "fuzz_cases", "fuzz_judge", "fuzz_seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield SimpleNamespace(**{name: import_module(name) for name in names})


@pytest.fixture(scope="module")
def right(fuzz, tmp_path_factory) -> Path:
    """A folder with a folder of right files for every kind, made without an export."""
    root = tmp_path_factory.mktemp("right")
    fuzz.fuzz_seeds.make_file_seeds(root)
    (root / "graph").mkdir()
    onnx.save(graph(), root / "graph" / "model.onnx")
    ranges = {"images": TensorRange(minimum=-1.0, maximum=1.0, threshold=1.0)}
    table = CalibrationTable(
        method="minmax", activation_scales={"images": float(np.float32(1 / 127))}, ranges=ranges,
        onnx_sha256="ab" * 32, data_sha256="cd" * 32, image_count=3, preprocess={},
    )  # fmt: skip
    written = {
        "table/calibration.json": table.dumps(),
        "cache/calibration.cache": table.to_cache_text("8.6.1"),
        "config/parity.toml": '[defaults]\nmodel = "A0"\n[margins]\nsqnr_db = 1.0\n[[case]]\n'
        'precision = "fp32"\nmin_agreement = 0.5\nmargins = { sqnr_db = 0.5 }\n',
        "baseline/b.json": json.dumps(
            {"schema_version": 1, "cases": {"A0": {"onnx": {"sqnr_db": 134.6}}}}
        ),
        "evaluation/shard.json": json.dumps(
            {"bundle": "b", "bundle_sha256": "ef", "precision": "int8", "backend": "onnxruntime",
             "library": "onnxruntime", "data": "images", "shards": ["1/1"], "top5_correct": 3,
             "skipped": 0, "seconds": 0.5, "note": None, "class_names": ["a", "b"],
             "confusion": [[0, 0, 2], [1, 0, 1]]}
        ),
    }  # fmt: skip
    for name, text in written.items():
        (root / name).parent.mkdir()
        (root / name).write_text(text, "utf-8")
    return root


def graph() -> onnx.ModelProto:
    """[N, 3, 8, 8] -> Conv, ReLU -> [N, 2, 6, 6]."""
    weight = numpy_helper.from_array(np.full((2, 3, 3, 3), 0.1, np.float32), "weight")
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Conv", ["images", "weight"], ["sum"], "conv", pads=[0, 0, 0, 0]),
                helper.make_node("Relu", ["sum"], ["logits"], "relu"),
            ],
            "g",
            [helper.make_tensor_value_info("images", 1, ["batch", 3, 8, 8])],
            [helper.make_tensor_value_info("logits", 1, ["batch", 2, 6, 6])],
            [weight],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def write_bundle(folder: Path, contents: dict[str, bytes]) -> Path:
    """These files and a manifest of them, over those of the bundle of :func:`graph`."""
    images = np.ones((2, 3, 8, 8), np.float32)
    logits = np.full((2, 2, 6, 6), 2.7, np.float32)
    folder.mkdir(exist_ok=True)
    np.savez(folder / "reference.npz", images=images, logits=logits)
    onnx.save(graph(), folder / "model.onnx")
    row = {"stage": "simplified", "status": "pass", "reference": "original", "reason": None,
           "tolerance": {"max_relative": 1e-4}}  # fmt: skip
    parity = {"verdict": "pass", "original_top1": None, "stages": [row]}
    (folder / "parity.json").write_text(json.dumps(parity))
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = {
        name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(), "bytes": 1}
        for name in ("reference.npz", "model.onnx", "parity.json")
    }
    manifest = {
        "schema_version": 1, "files": files, "spec": {"precision": "fp32", "batch": "1:2:4"},
        "model": {"num_classes": None}, "targets": ["sm86"], "notes": [],
        "inputs": [{"name": "images", "shape": ["batch", 3, 8, 8]}],
        "outputs": [{"name": "logits", "shape": ["batch", 2, 6, 6]}],
    }  # fmt: skip
    if "manifest.json" not in contents:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def preprocess(path: Path) -> object:
    try:
        return Preprocess.from_json(read_json(path))
    except (OSError, ValueError) as error:
        raise ImageDataError(str(error)) from error


def quantized(fuzz: SimpleNamespace) -> Callable[[Path], object]:
    return lambda path: import_quantized(path, fuzz.fuzz_seeds.TINY)


READERS: dict[str, tuple[Callable[[Path], object], ...]] = {
    "checkpoint": (inspect_file, load_checkpoint),
    "graph": (inspect_file,),
    "table": (inspect_file, load_table),
    "cache": (inspect_file,),
    "plan": (inspect_file,),
    "picture": (lambda path: load_image(path, Preprocess(image_size=(32, 32))),),
    "preprocess": (preprocess,),
    "config": (read_config,),
    "baseline": (read_baseline,),
    "evaluation": (_read_evaluation,),
}

seeds = st.integers(0, 2**40)


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_returns_or_refuses_whatever_the_file_holds(
    fuzz, right, kind, tmp_path_factory, monkeypatch
):
    """No other error leaves any of them, and no code in a file runs."""
    place = tmp_path_factory.mktemp(kind)
    monkeypatch.setenv(fuzz.corrupt_weights.CANARY, str(place / "canary"))
    sources = sorted((right / kind).iterdir())
    readers = READERS[kind] + ((quantized(fuzz),) if kind == "graph" else ())

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(seed=seeds)
    def law(seed: int) -> None:
        random = Random(seed)
        source = random.choice(sources)
        what, content = fuzz.fuzz_cases.corrupted(
            source.read_bytes(), source.suffix, random, leave_out=BOMBS
        )
        path = place / f"wrong{source.suffix}"
        path.write_bytes(content)
        for read in readers:
            refused_or_read(read, path, what)

    law()
    assert not (place / "canary").exists()


def refused_or_read(read: Callable[[Path], object], path: Path, what: str) -> None:
    sentence = "read"
    try:
        read(path)
    except REFUSALS as error:
        sentence = str(error)
    assert sentence.strip(), what


@pytest.mark.parametrize("name", ["manifest.json", "parity.json", "reference.npz", "model.onnx"])
def test_a_bundle_is_used_or_refused_whatever_one_of_its_files_holds(fuzz, tmp_path_factory, name):
    """Described, opened and run, with a manifest that says the same as the files."""
    right = write_bundle(tmp_path_factory.mktemp("right") / "b", {})
    data = (right / name).read_bytes()
    place = tmp_path_factory.mktemp("wrong") / "b"
    verify(Bundle.load(right))

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(seed=seeds)
    def law(seed: int) -> None:
        what, content = fuzz.fuzz_cases.corrupted(
            data, Path(name).suffix, Random(seed), leave_out=BOMBS
        )
        write_bundle(place, {name: content})
        for use in (inspect_file, lambda path: verify(Bundle.load(path))):
            refused_or_read(use, place, what)

    law()


# --- the campaign itself -----------------------------------------------------------------------


def test_equal_seeds_make_equal_files(fuzz, right):
    """A case that failed can be made again from its number."""
    for source in (right / "checkpoint").iterdir():
        made = [
            fuzz.fuzz_cases.corrupted(source.read_bytes(), source.suffix, Random(f"4/{number}"))
            for number in (1, 1, 2)
        ]
        assert made[0] == made[1] != made[2]


def ending(fuzz: SimpleNamespace, **differences: Any) -> Any:
    right = {"code": 2, "signal": None, "timed_out": False, "seconds": 0.1, "cpu_seconds": 0.1,
             "memory": 0, "stderr": "repvgg-export: x.pth is empty\n"}  # fmt: skip
    return fuzz.fuzz_judge.Ending(**{**right, **differences})


@pytest.mark.parametrize(
    ("differences", "fault"),
    [
        ({}, None),
        ({"code": 0, "stderr": ""}, None),
        ({"code": 139}, "exit code 139"),
        ({"code": None, "signal": 11}, "died of signal 11"),
        ({"timed_out": True}, "did not end in 240 s"),
        ({"cpu_seconds": 61.0}, "took 61 s"),
        ({"memory": 3 << 29}, "took 1.5 GB"),
        ({"stderr": "Traceback (most recent call last):\nKeyError: 'a'\n"}, "traceback: KeyError"),
        ({"stderr": ""}, "standard error starts with ''"),
        ({"stderr": "repvgg-export: a\nb\nc\nd\n"}, "4 lines on standard error"),
        ({"stderr": f"repvgg-export: {'x' * 5000}\n"}, "5016 characters on standard error"),
        ({"stderr": "repvgg-export: \x1b[31m\n"}, "the file's escape sequences on the terminal"),
    ],
)
def test_every_kind_of_fault_is_seen(fuzz, tmp_path, differences, fault):
    """A right ending has none; each wrong one has its own."""
    case = SimpleNamespace(out=None)
    found = fuzz.fuzz_judge.faults(case, ending(fuzz, **differences), tmp_path / "canary")
    assert (fault is None) == (not found)
    assert fault is None or found[0].startswith(fault)


def test_code_that_ran_and_files_left_behind_are_seen(fuzz, tmp_path):
    """The canary, a file beside OUT, and OUT itself after a failure."""
    place = tmp_path / "published"
    place.mkdir()
    (tmp_path / "canary").touch()
    (place / ".out.staging").mkdir()
    (place / "out").mkdir()
    case = SimpleNamespace(out=place / "out")
    assert [
        "code in the file ran",
        "left ['.out.staging'] beside OUT",
        "exit code 2, and OUT is there",
    ] == fuzz.fuzz_judge.faults(case, ending(fuzz), tmp_path / "canary")


def test_a_file_that_runs_code_is_seen_by_its_canary(fuzz, tmp_path, monkeypatch):
    """The payload works where nobody stands in its way: else the campaign would prove nothing."""
    import pickle

    monkeypatch.setenv(fuzz.corrupt_weights.CANARY, str(tmp_path / "canary"))
    pickle.loads(fuzz.corrupt_weights.pickle_with_code(b"", Random(0)))
    assert (tmp_path / "canary").exists()


@pytest.mark.slow
def test_a_minute_of_the_campaign_finds_nothing(fuzz, tmp_path, monkeypatch, capsys):
    """Files of every kind that needs no export of the real network, given to the real command."""
    kinds = "checkpoint,graph,picture,table,cache,plan,bundle"
    out = tmp_path / "fuzz.json"
    arguments = ["fuzz", "--seconds", "60", "--seed", "1", "--kinds", kinds, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert 0 == fuzz.fuzz.main(), capsys.readouterr()
    result = json.loads(out.read_text("utf-8"))
    assert [] == result["failures"]
    assert result["inputs"] == sum(row["inputs"] for row in result["kinds"].values()) > 0


def test_the_committed_campaign_found_nothing_and_the_page_has_its_figures():
    """docs/reliability.md says what benchmarks/results/fuzz.json holds."""
    result = json.loads((BENCHMARKS / "results" / "fuzz.json").read_text("utf-8"))
    page = (BENCHMARKS.parent / "docs" / "reliability.md").read_text("utf-8")
    assert [] == result["failures"]
    assert f"{result['inputs']} inputs" in page
    for kind, row in result["kinds"].items():
        figures = f"{row['inputs']} | {row['worst_cpu_seconds']} | {row['worst_gigabytes']}"
        assert f"| {kind} | {figures} |" in page
