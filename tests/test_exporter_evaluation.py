"""`evaluate` on a network whose classes are colours, through real files and ONNX Runtime."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from calibration.images import Preprocess
from exporter.bundle import MANIFEST, MODEL, Bundle, dumps, file_sha256
from exporter.device import RunBackend, runners
from exporter.device.accuracy import Evaluation, Shard, merge
from exporter.device.kernel_cache import Startup
from exporter.engine import driver
from exporter.errors import EnvironmentLackError, GateFailedError, InputError
from exporter.evaluation import evaluate
from exporter.graph.prologue import Prologue, with_prologue
from exporter.pixel_input import Layout
from exporter.profiles import BatchProfile

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NO_DRIVER = "no NVIDIA driver on this machine (libcuda.so.1 does not load)"


def colour_bundle(path: Path, prologue: Prologue | None = None, **manifest: Any) -> Bundle:
    """A network whose three logits are the mean red, green and blue."""
    path.mkdir()
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.eye(3, dtype=np.float32), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(with_prologue(model, prologue) if prologue else model, path / MODEL)
    preprocess = Preprocess(image_size=(8, 8), crop_fraction=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    document = {
        "model": {"num_classes": 3},
        "class_names": ["red", "green", "blue"],
        "preprocess": preprocess.to_json(),
        "spec": {"precision": "fp32", "batch": "1:4:8"},
        "files": {MODEL: {"sha256": file_sha256(path / MODEL)}},
        **manifest,
    }
    (path / MANIFEST).write_text(dumps(document))
    return Bundle(path=path, manifest=document, parity={"stages": []})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return colour_bundle(tmp_path / "bundle")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven red, three green, one blue image, and two that are red but called green."""
    for folder, colour, count in (
        ("red", "red", 7), ("green", "green", 3), ("blue", "blue", 1), ("green", "red", 2),
    ):  # fmt: skip
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = tmp_path / "data" / folder / f"{colour}{number}.png"
            Image.new("RGB", (10, 8), COLOURS[colour]).save(path)
    return tmp_path / "data"


def without_time(result: Evaluation) -> Evaluation:
    return dataclasses.replace(result, seconds=None)


def test_right_and_wrong_answers_are_counted(bundle: Bundle, data: Path):
    """Eleven of thirteen are right; green was taken for red twice."""
    found = evaluate(bundle, data, RunBackend.ONNXRUNTIME)

    assert (13, 11, 13, 0) == (found.images, found.top1_correct, found.top5_correct, found.skipped)
    assert {(0, 0): 7, (1, 1): 3, (1, 0): 2, (2, 2): 1} == dict(found.confusion)
    (worst,) = found.worst_classes()
    assert ("green", 5, 3, (("red", 2),)) == dataclasses.astuple(worst)
    assert "onnxruntime" == found.backend
    assert found.bundle_sha256 == file_sha256(bundle.path / MANIFEST)
    assert found.note is None


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_shards_of_a_folder_merge_to_the_folder(bundle: Bundle, data: Path, parts: int):
    """Every image is in exactly one shard, and labels do not depend on the shard."""
    pieces = [
        evaluate(bundle, data, RunBackend.ONNXRUNTIME, shard=Shard(index, parts))
        for index in range(1, parts + 1)
    ]
    whole = evaluate(bundle, data, RunBackend.ONNXRUNTIME)
    merged = merge(pieces)
    assert without_time(whole) == dataclasses.replace(merged, shards=whole.shards)


def test_a_part_says_what_the_whole_folder_holds(bundle: Bundle, data: Path, tmp_path: Path):
    """Number and relative names, whatever the shard and wherever the folder lies."""
    first, second = (Shard(index, 2) for index in (1, 2))
    part = evaluate(bundle, data, RunBackend.ONNXRUNTIME, shard=first)
    copy = shutil.copytree(data, tmp_path / "elsewhere" / "data")
    assert 13 == part.folder_images == evaluate(bundle, data).folder_images
    assert 13 == merge([part, evaluate(bundle, copy, shard=second)]).images
    (copy / "red" / "red6.png").rename(copy / "red" / "red7.png")
    with pytest.raises(InputError, match="their names of images in the folder differ"):
        merge([part, evaluate(bundle, copy, shard=second)])
    (copy / "red" / "red7.png").unlink()
    with pytest.raises(InputError, match="their numbers of images in the folder differ"):
        merge([part, evaluate(bundle, copy, shard=second)])


@pytest.mark.parametrize("layout", Layout)
def test_a_network_that_takes_pixels_is_fed_pixels(
    bundle: Bundle, data: Path, tmp_path: Path, layout: Layout
):
    """In its layout, by the same preprocessing; the counts are those of the float network."""
    prologue = Prologue(
        layout=layout, preprocess=Preprocess.from_json(bundle.manifest["preprocess"])
    )
    ports = [prologue.port("images", ("n", 3, 8, 8))]
    pixels = colour_bundle(tmp_path / "pixels", prologue=prologue, inputs=ports)
    found = evaluate(pixels, data, RunBackend.ONNXRUNTIME)
    assert evaluate(bundle, data, RunBackend.ONNXRUNTIME).confusion == found.confusion


def test_without_names_the_folders_are_the_classes_in_order(tmp_path: Path, data: Path):
    """Alphabetical order, as at export: blue, green, red."""
    bundle = colour_bundle(tmp_path / "nameless", class_names=None)
    found = evaluate(bundle, data, RunBackend.ONNXRUNTIME)
    assert ("blue", "green", "red") == found.class_names
    assert {(2, 0): 7, (1, 1): 3, (1, 0): 2, (0, 2): 1} == dict(found.confusion)


def test_auto_falls_back_to_onnx_runtime_and_says_so(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without an engine, and without a driver, the note has the reason."""
    monkeypatch.setattr(driver, "driver_lack", lambda: NO_DRIVER)
    found = evaluate(bundle, data)
    assert "onnxruntime" == found.backend
    assert (
        f"the engine does not run here: bundle {bundle.path} holds no engine yet; `repvgg-export "
        "build` makes one on the device"
    ) == found.note
    for name, content in (("model.engine", "plan"), ("engine.json", '{"backend": "tensorrt-rtx"}')):
        (bundle.path / name).write_text(content)
        bundle.manifest["files"][name] = {"sha256": file_sha256(bundle.path / name)}
    assert f"the engine does not run here: {NO_DRIVER}" == evaluate(bundle, data).note
    with pytest.raises(EnvironmentLackError) as refusal:
        evaluate(bundle, data, RunBackend.ENGINE)
    assert NO_DRIVER == str(refusal.value)


def test_an_unreadable_image_is_named_or_counted(bundle: Bundle, data: Path):
    """As at calibration: refused by name, or left out on request."""
    bad = data / "red" / "bad.png"
    bad.write_bytes(b"not a picture")
    with pytest.raises(InputError) as refusal:
        evaluate(bundle, data, RunBackend.ONNXRUNTIME)
    assert str(refusal.value).startswith(f"image {bad} cannot be decoded (")
    assert str(refusal.value).endswith("; --skip-bad-images leaves such files out")
    found = evaluate(bundle, data, RunBackend.ONNXRUNTIME, skip_bad_images=True)
    assert (13, 1) == (found.images, found.skipped)


def test_a_folder_of_bad_images_has_no_figure(bundle: Bundle, tmp_path: Path):
    """Nothing counted is no result."""
    (tmp_path / "data" / "red").mkdir(parents=True)
    (tmp_path / "data" / "red" / "bad.png").write_bytes(b"")
    with pytest.raises(InputError) as refusal:
        evaluate(bundle, tmp_path / "data", RunBackend.ONNXRUNTIME, skip_bad_images=True)
    assert (
        f"image folder {tmp_path / 'data'}: shard 1/1 holds no readable image (1 skipped)"
        == str(refusal.value)
    )


def test_images_without_class_folders_have_no_labels(bundle: Bundle, tmp_path: Path):
    """The sentence says how to lay them out."""
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.png")
    with pytest.raises(InputError) as refusal:
        evaluate(bundle, tmp_path / "flat", RunBackend.ONNXRUNTIME)
    assert (
        f"image folder {tmp_path / 'flat'} has no labels: put every image into a folder that is "
        "named after its class"
    ) == str(refusal.value)


def test_a_strange_class_is_named(bundle: Bundle, data: Path):
    """A folder that is no class of the bundle would be counted as wrong."""
    (data / "pink").mkdir()
    Image.new("RGB", (8, 8)).save(data / "pink" / "a.png")
    with pytest.raises(InputError) as refusal:
        evaluate(bundle, data, RunBackend.ONNXRUNTIME)
    assert (
        f"image folder {data}: pink is not among the bundle's 3 classes (red, green, blue)"
        == str(refusal.value)
    )


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        (
            {"class_names": None, "model": {"num_classes": 4}},
            "bundle {path} has 4 classes without names, so all of them must have a folder; "
            "{data} has 3",
        ),
        (
            {"model": {"num_classes": None}},
            "bundle {path} is no classifier: there is no top-1 to count",
        ),
        (
            {"preprocess": None},
            "bundle {path} records no preprocessing: it was made from arrays, and how images "
            "become such arrays only its maker knows",
        ),
    ],
)
def test_bundles_that_cannot_be_evaluated_are_refused(
    tmp_path: Path, data: Path, manifest: dict[str, Any], sentence: str
):
    """Each with its reason."""
    bundle = colour_bundle(tmp_path / "odd", **manifest)
    with pytest.raises(InputError) as refusal:
        evaluate(bundle, data, RunBackend.ONNXRUNTIME)
    assert sentence.format(path=bundle.path, data=data) == str(refusal.value)


def test_a_damaged_bundle_is_not_evaluated(bundle: Bundle, data: Path):
    """The file is named; the exit code is that of a failed gate."""
    model = bytearray((bundle.path / MODEL).read_bytes())
    model[len(model) // 2] ^= 1
    (bundle.path / MODEL).write_bytes(model)
    with pytest.raises(GateFailedError) as refusal:
        evaluate(bundle, data, RunBackend.ONNXRUNTIME)
    assert f"bundle {bundle.path}: model.onnx missing or not what the manifest says" == str(
        refusal.value
    )


def engine_that(monkeypatch: pytest.MonkeyPatch, run) -> None:
    """Put a fake in the engine's place, of batch 2:2:2."""

    def opened(_bundle, _stack, **_):
        return runners.BundleRunner(
            backend=RunBackend.ENGINE,
            library="fake engine",
            run=run,
            batch=BatchProfile(2, 2, 2),
            prepare=lambda _batch: lambda: None,
        )

    monkeypatch.setattr(runners, "_engine", opened)


def test_the_engine_gets_batches_of_the_size_it_is_tuned_for(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """Thirteen images in twos; the rest comes last and smaller."""
    sizes = []

    def run(batch):
        sizes.append(len(batch[0]))
        return {"logits": batch[0].mean(axis=(2, 3))}

    engine_that(monkeypatch, run)
    found = evaluate(bundle, data)
    assert ([2] * 6 + [1], "engine", "fake engine") == (sizes, found.backend, found.library)
    assert 11 == found.top1_correct


def test_the_runtime_cache_reaches_the_engine_and_its_notes_the_result(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """A damaged cache, say."""
    told = []

    def opened(_bundle, _stack, *, cuda_graph, runtime_cache):
        told.append(runtime_cache)
        return runners.BundleRunner(
            backend=RunBackend.ENGINE,
            library="fake engine",
            run=lambda batch: {"logits": batch[0].mean(axis=(2, 3))},
            batch=BatchProfile(2, 2, 2),
            prepare=lambda _batch: lambda: None,
            startup=Startup(load_ms=1.0, notes=["one", "two"]),
        )

    monkeypatch.setattr(runners, "_engine", opened)
    assert "one; two" == evaluate(bundle, data).note
    evaluate(bundle, data, runtime_cache=False)
    assert [True, False] == told


def test_outputs_that_are_not_finite_are_a_failed_gate(
    bundle: Bundle, data: Path, monkeypatch: pytest.MonkeyPatch
):
    """NaN would be counted as class 0."""
    engine_that(monkeypatch, lambda batch: {"logits": np.full((len(batch[0]), 3), np.nan)})
    with pytest.raises(GateFailedError) as refusal:
        evaluate(bundle, data)
    assert "6 of 6 outputs of fake engine are NaN or Inf" == str(refusal.value)
