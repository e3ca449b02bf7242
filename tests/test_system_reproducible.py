"""The same inputs give the same bundle: what is promised for bytes, for scales, and for neither."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import minisign
import numpy as np
import onnx
import pytest
import torch
from threadpoolctl import threadpool_limits

from calibration import parallel
from exporter.onnx_export import export_onnx
from exporter.parity.ledger import Rung
from exporter.provenance import recorded_seconds
from exporter.quantization.plain_chain import read_chain
from exporter.quantization.quantizers import QuantizerOptions, open_quantizer
from exporter.report import ReportContent, html
from exporter.running import image_set
from exporter.running.image_set import ArrayImages
from exporter.running.onnx_runner import OnnxRunner
from models import RepVGG, Variant
from models.fusion import reparameterize

TINY = Variant(name="tiny", num_blocks=(1, 2, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))
SMALL = ("--calib-images", "40", "--evaluation-images", "40", "--image-size", "64")
NOT_THE_SAME = {"model.engine", "build.log", "engine.json", "report.html", "manifest.json",
                "SHA256SUMS"}  # fmt: skip
"""The builder times kernels and stores what was fastest; and what tells of the engine."""


@pytest.fixture(scope="module")
def images() -> ArrayImages:
    return ArrayImages.of(np.random.default_rng(0).normal(size=(96, 3, 32, 32)).astype(np.float32))


@pytest.fixture(scope="module")
def model(images: ArrayImages) -> onnx.ModelProto:
    """A small network whose BatchNorms have seen the images."""
    torch.manual_seed(0)
    network = RepVGG(TINY, num_classes=6)
    (batch,) = next(images.batches())
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.from_numpy(batch))
    return export_onnx(reparameterize(network.eval()), (32, 32), {})


@contextmanager
def conditions(batch: int, threads: int) -> Iterator[None]:
    """Images in batches of this size; this many threads in ONNX Runtime, BLAS and our own pool."""
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(threads):
        patch.setattr(image_set, "BATCH_SIZE", batch)
        defaults = {"optimize": True, "threads": threads}
        patch.setattr(OnnxRunner.__init__, "__kwdefaults__", defaults)
        patch.setattr(parallel.os, "cpu_count", lambda: threads)
        yield


def scales(model: onnx.ModelProto, images: ArrayImages, *, as_chain: bool) -> dict[str, np.ndarray]:
    """By every recipe: those of the activations, and the factors of the channels."""
    chain = read_chain(model) if as_chain else None
    quantizer = open_quantizer(model, chain, images, QuantizerOptions(), lambda _fraction: None)
    found = {}
    for recipe in quantizer.recipes:
        table = quantizer.make(recipe).table
        found[f"{recipe} activations"] = np.array(list(table.activation_scales.values()))
        channels = [np.array(values) for values in table.channel_scales.values()]
        found[f"{recipe} channels"] = np.concatenate([np.empty(0), *channels])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("as_chain", [True, False])
def test_scales_depend_neither_on_batch_size_nor_on_threads(
    model: onnx.ModelProto, images: ArrayImages, as_chain: bool
):
    """Within 1e-6, by every recipe of both ways to INT8; 96 images in 1, 4, 14 and 96 batches."""
    with conditions(32, 1):
        expected = scales(model, images, as_chain=as_chain)
    assert {"minmax activations", "entropy channels"} <= expected.keys()
    assert as_chain == any(values.size for name, values in expected.items() if "channels" in name)
    for batch, threads in ((32, 2), (7, 1), (1, 2), (96, 2)):
        with conditions(batch, threads):
            assert -(-96 // batch) == len(list(images.batches()))
            found = scales(model, images, as_chain=as_chain)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-6, err_msg=f"{name} {batch}")


def exported(folder: Path, *words: str) -> Path:
    """An export as of one moment, into the same relative path."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "engine", "A0", *SMALL, *words, "--out", "bundle"],
        cwd=folder,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return folder / "bundle"


def digests(bundle: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bundle.iterdir()}


@pytest.mark.slow
def test_two_exports_without_an_engine_are_the_same_bytes(tmp_path: Path):
    """Every file, report and signatures included, under SOURCE_DATE_EPOCH."""
    key = tmp_path / "minisign.key"
    key.write_bytes(bytes(minisign.KeyPair.generate().secret_key))
    words = ("--target", "orin", "--sign", str(key))
    first, second = (digests(exported(tmp_path / name, *words)) for name in ("a", "b"))
    assert first == second
    assert {
        "model.onnx", "model.int8.onnx", "calibration.json", "calibration.cache", "reference.npz",
        "sbom.cdx.json", "parity.json", "report.html", "junit.xml", "engine.json", "manifest.json",
        "SHA256SUMS", "manifest.json.minisig", "SHA256SUMS.minisig",
    } == first.keys()  # fmt: skip
    manifest = json.loads((tmp_path / "a" / "bundle" / "manifest.json").read_text())
    assert "2023-11-14T22:13:20+00:00" == manifest["created"]


@pytest.mark.slow
def test_of_two_exports_with_an_engine_all_but_what_tells_of_it_is_the_same(tmp_path: Path):
    """Graphs, evidence and SBOM; the builder's log does not name the folder of the run."""
    made = [
        exported(tmp_path / name, "--precision", "fp16", "--target", "sm86") for name in ("a", "b")
    ]
    first, second = ({name: digest for name, digest in digests(bundle).items()
                      if name not in NOT_THE_SAME} for bundle in made)  # fmt: skip
    assert first == second
    assert {
        "model.onnx", "model.fp16.onnx", "reference.npz", "sbom.cdx.json", "parity.json",
        "junit.xml",
    } == first.keys()  # fmt: skip
    log = (made[0] / "build.log").read_text()
    assert re.search(r"Input filename: +model\.fp16\.onnx$", log, re.MULTILINE)
    assert str(tmp_path) not in log


def test_a_file_tells_no_wall_time_where_it_must_be_reproducible(monkeypatch):
    """The ladder's seconds are null under SOURCE_DATE_EPOCH, and what they were otherwise."""
    rung = Rung(recipe="full", seconds=1.234)
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert (1.23, 0.5) == (rung.to_json()["seconds"], recorded_seconds(0.5))
    for epoch, expected in (("1700000000", None), ("0", None), ("soon", 1.23), ("", 1.23)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
        assert expected == rung.to_json()["seconds"]


def test_a_report_without_times_has_all_its_stations(report_content: ReportContent):
    """The stages are there, an engine that was built too; no time is, in words or figures."""
    timed = html(report_content)
    untold = replace(report_content, seconds=dict.fromkeys(report_content.seconds))
    page = html(untold)
    for words in ("quantize", "built, not run"):
        assert words in timed
        assert words in page
    for words in ("Time of the export", "14.9\u00a0s", "and its time"):
        assert words in timed
        assert words not in page
