"""The benchmarks' data set, trained network and measurements hold what their results rest on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from exporter.running.onnx_runner import OnnxRunner

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    """Scripts in one folder import one another by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
        yield


@pytest.fixture(scope="module")
def textures(on_path: None) -> ModuleType:
    return import_module("textures")


@pytest.fixture(scope="module")
def case(on_path: None) -> Any:
    """The narrow network with few images."""
    return import_module("int8_cases").textured_shapes(16, 32)


def test_the_images_of_a_split_do_not_depend_on_how_they_are_asked_for(textures):
    """The same numbers at every call, from the start or from the middle."""
    images, labels = textures.images("test", 70)
    again, _ = textures.images("test", 10, start=60)
    assert (70, 3, 64, 64) == images.shape
    assert np.float32 == images.dtype
    np.testing.assert_array_equal(images[60:], again)
    np.testing.assert_array_equal(labels, textures.images("test", 70)[1])


def test_classes_are_balanced_and_splits_share_no_image(textures):
    """Each class has four of 64 images; the splits come from random numbers of their own."""
    firsts = []
    for split in textures.SPLITS:
        images, labels = textures.images(split, 64)
        assert [4] * 16 == np.bincount(labels).tolist()
        firsts.append(images)
    assert not np.array_equal(firsts[0], firsts[1])
    assert not np.array_equal(firsts[1], firsts[2])


def test_images_are_in_colour_with_unequal_means(textures):
    """Before standardization red is brightest and blue darkest."""
    images, _ = textures.images("calibration", 256)
    red, green, blue = (images * textures.STD + textures.MEAN).mean((0, 2, 3))
    assert red > green + 0.01 > blue + 0.02


def test_the_shipped_network_is_trained_and_not_saturated(textures):
    """Between 85 and 97 percent of 512 test images; in train form, 14 convolutions."""
    network = textures.load()
    assert not network.training
    assert 14 == len(network.variant.layers)
    assert hasattr(network.stage1[0], "rbr_dense")
    images, labels = textures.images("test", 512)
    with torch.no_grad():
        found = network(torch.from_numpy(images)).argmax(1).numpy()
    assert 85 <= 100 * np.mean(found == labels) <= 97


def test_both_versions_of_a_network_compute_the_same(case):
    """Rescaling changes weights by powers of two and more, and no result."""
    trained, rescaled = (OnnxRunner(m)(case.test) for m in case.versions.values())
    np.testing.assert_allclose(rescaled, trained, atol=1e-3 * np.abs(trained).max())


def test_training_makes_a_network_of_the_shipped_shape(textures, tmp_path):
    """What `train_textures.py` saves has the names and shapes of the shipped file."""
    script = import_module("train_textures")
    images, labels = map(torch.from_numpy, textures.images("train", 64))
    script.save(script.train(images, labels, steps=1), tmp_path / "weights.safetensors")
    from safetensors.torch import load_file

    shipped, made = load_file(textures.WEIGHTS), load_file(tmp_path / "weights.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in shipped.items()} == {
        n: (t.shape, t.dtype) for n, t in made.items()
    }


@pytest.fixture
def float_job(case: Any, tmp_path: Path) -> Any:
    """One float pass of the case's first version."""
    import onnx

    job = import_module("int8_quality").jobs_for(case, ["float"], tmp_path)[0]
    source = tmp_path / "float.onnx"
    onnx.save(case.versions["as trained"], source)
    return replace(job, source=str(source))


def test_a_job_streams_the_images_that_it_names(case, float_job):
    """Batch by batch or as one array, and after a trip through JSON."""
    job = type(float_job).from_json(float_job.to_json())
    assert float_job == job
    np.testing.assert_array_equal(case.calibration, np.concatenate(list(job.batches())))
    np.testing.assert_array_equal(case.calibration, job.all_images())


def test_a_process_over_its_limit_is_out_of_memory(float_job):
    """The child ends, and the benchmark goes on."""
    runs = import_module("quantizer_run")
    done = runs.run(replace(float_job, address_space_mib=64))
    assert runs.Failure(reason="out of memory") == done


def test_a_missing_peer_is_a_row_without_numbers(float_job):
    """Without its environment Model Optimizer is not run."""
    runs = import_module("quantizer_run")
    done = runs.run(replace(float_job, method="modelopt max"))
    assert runs.Failure(reason="not installed") == done


def test_a_quantizer_is_measured_and_its_graph_judged_here(case, float_job):
    """Quality from the graph that the child wrote, time and memory from the child."""
    quality = import_module("int8_quality")
    source = Path(float_job.source)
    reference = OnnxRunner(source)(case.test)
    job = replace(float_job, method="ours minmax")
    (row,) = quality.measured(case, source, reference, [job], None)
    assert row.quality.sqnr_db > 20
    assert row.quality.agreement > 90
    assert row.cost.seconds > 0
    assert 1 < row.cost.peak_growth_mib < row.cost.peak_mib


def test_a_control_that_is_not_worse_is_named():
    """Equal counts as broken, and so does a control without a result."""
    quality = import_module("int8_quality")
    names = ("ours full", "ours minmax", *quality.CONTROLS)

    def broken(*decibels: float | None) -> list[str]:
        rows = [
            {"name": name, "quality": None if value is None else {"sqnr_db": value}}
            for name, value in zip(names, decibels, strict=True)
        ]
        cases = [{"name": "A0", "versions": [{"version": "as trained", "rows": rows}]}]
        return quality.broken_controls(cases)

    noise, per_tensor = quality.CONTROLS
    assert [] == broken(37.0, 27.0, 6.0, 20.0)
    assert [f"A0, as trained: {noise} is not worse"] == broken(37.0, 27.0, 37.0, 20.0)
    assert [f"A0, as trained: {per_tensor} is not worse"] == broken(37.0, 27.0, 6.0, None)


def test_the_cost_table_holds_ratios_and_what_did_not_fit():
    """Seconds, the ratio to the float pass, MiB; words where there is no number."""
    cost = import_module("calibration_cost")
    runs = import_module("quantizer_run")
    costs = {
        64: {
            "float": runs.Cost(seconds=2.0, peak_growth_mib=1.0, peak_mib=200.0),
            "ours full": runs.Cost(seconds=5.0, peak_growth_mib=1.0, peak_mib=300.0),
            "onnxruntime Entropy": runs.Failure(reason="out of memory"),
        }
    }
    *_, ours, peer = cost.table(costs)
    assert ["ours", "full", "5.0", "2.5", "300"] == ours.split()
    assert ["onnxruntime", "Entropy", "out", "of", "memory"] == peer.split()


@pytest.mark.slow
def test_the_quick_comparison_writes_both_results(tmp_path):
    """Text and JSON, with the command at the top; the controls are worse."""
    quality = import_module("int8_quality")
    arguments = ["--quick", "--models", "textures", "--out", str(tmp_path / "found")]
    assert 0 == quality.main(arguments)
    text = (tmp_path / "found.txt").read_text()
    assert text.startswith("$ python benchmarks/int8_quality.py --models textures --quick\n")
    record = json.loads((tmp_path / "found.json").read_text())
    versions = record["cases"][0]["versions"]
    assert ["as trained", "rescaled"] == [version["version"] for version in versions]
    assert [list(quality.QUICK)] * 2 == [[r["name"] for r in v["rows"]] for v in versions]
    assert all(row["quality"] for version in versions for row in version["rows"])
