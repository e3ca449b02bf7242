"""A bundle that takes pixels, made by export() and used on the device; what cannot take them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from calibration.cache_text import parse_cache_text
from calibration.images import Preprocess
from calibration.table import CalibrationTable
from exporter import Bundle, export
from exporter.device import RunBackend
from exporter.device.timing import Effort
from exporter.errors import InputError
from exporter.graph import graph_sha256
from exporter.graph.prologue import read_prologue, without_prologue
from exporter.inspection import inspect_file
from exporter.latency import benchmark
from exporter.verify import verify
from models import RepVGG, Variant
from models.repvgg import RepVGGBlock
from models.variants import ConvLayer

TINY = Variant(name="tiny", num_blocks=(1, 1, 2, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))
PREPROCESS = Preprocess(image_size=(32, 32), mean=(0.5, 0.4, 0.6), std=(0.25, 0.3, 0.2))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Noise, smooth enough that the pictures are not all alike."""
    generator = np.random.default_rng(0)
    level = generator.integers(0, 200, (48, 1, 1, 3))
    return (level + generator.integers(0, 56, (48, 32, 32, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def images(pixels: np.ndarray) -> np.ndarray:
    return PREPROCESS.normalize(pixels)


@pytest.fixture(scope="module")
def network(images: np.ndarray) -> RepVGG:
    """A small network whose BatchNorms have seen the images."""
    torch.manual_seed(0)
    module = RepVGG(TINY, num_classes=6)
    with torch.no_grad():
        for _ in range(20):
            module.train()(torch.from_numpy(images[:32]))
    return module.eval()


@pytest.fixture(scope="module")
def exported(network: RepVGG, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory):
    """``exported(with_preprocess="nchw")`` -> a bundle of the small network."""
    folder = tmp_path_factory.mktemp("prologue")
    stated = folder / "preprocess.json"
    stated.write_text(json.dumps(PREPROCESS.to_json()))

    def run(name: str, **options: object) -> Bundle:
        return export(
            network,
            example_input=torch.zeros(1, 3, 32, 32),
            out=folder / name,
            **{
                "targets": "sm86",
                "calibration": images,
                "min_agreement": 0.0,
                "preprocess": str(stated),
                **options,
            },
        )

    return run


@pytest.fixture(scope="module")
def plain(exported) -> Bundle:
    return exported("plain")


@pytest.fixture(scope="module")
def bundle(exported) -> Bundle:
    return exported("pixels", with_preprocess="nhwc")


def row(bundle: Bundle, stage: str) -> dict:
    return next(row for row in bundle.parity["stages"] if row["stage"] == stage)


def test_the_manifest_says_what_the_graphs_take(bundle: Bundle, plain: Bundle) -> None:
    """Data type, layout, mean and std at the port; the operators beside the contract's verdict."""
    assert [
        {
            "name": "images",
            "shape": ["batch", 32, 32, 3],
            "dtype": "uint8",
            "layout": "nhwc",
            "mean": [0.5, 0.4, 0.6],
            "std": [0.25, 0.3, 0.2],
        }
    ] == bundle.manifest["inputs"]
    contract = dict(bundle.manifest["contract"])
    assert ["Cast", "Sub", "Mul", "Transpose"] == contract.pop("prologue")
    before = dict(plain.manifest["contract"])
    assert [] == before.pop("prologue")
    assert before == contract
    assert ("nhwc", None) == tuple(b.manifest["spec"]["with_preprocess"] for b in (bundle, plain))


def test_both_graphs_take_pixels_and_are_the_plain_ones_behind(
    bundle: Bundle, plain: Bundle
) -> None:
    """Byte for byte, the Q/DQ graph too."""
    for name in ("model.onnx", "model.int8.onnx"):
        model = onnx.load(bundle.path / name)
        assert read_prologue(model) is not None
        expected = graph_sha256(onnx.load(plain.path / name))
        assert expected == graph_sha256(without_prologue(model))


def test_the_rows_are_measured_on_pixels_with_the_gates_of_the_plain_graph(
    bundle: Bundle, plain: Bundle
) -> None:
    """Same stages, same gates, the same figures to rounding; the reference inputs are pixels."""
    stages = [[row["stage"] for row in made.parity["stages"]] for made in (bundle, plain)]
    assert stages[0] == stages[1]
    for stage in ("simplified", "int8"):
        found, expected = row(bundle, stage), row(plain, stage)
        assert ("pass", expected["tolerance"]) == (found["status"], found["tolerance"])
    assert row(bundle, "simplified")["sqnr_db"] > 100
    assert row(plain, "int8")["sqnr_db"] == pytest.approx(row(bundle, "int8")["sqnr_db"], abs=0.1)


def test_reference_and_run_take_pixels(bundle: Bundle, plain: Bundle, pixels: np.ndarray) -> None:
    """The stored inputs are the images' own pixels; run() computes what the plain bundle does."""
    stored, logits = bundle.reference()
    np.testing.assert_array_equal(pixels[: len(stored)], stored)
    expected = plain.run(PREPROCESS.normalize(stored))
    np.testing.assert_allclose(bundle.run(stored), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(plain.reference()[1], logits)


def test_floats_for_a_bundle_that_takes_pixels_are_refused(
    bundle: Bundle, images: np.ndarray
) -> None:
    """The sentence says what is expected."""
    with pytest.raises(InputError) as refusal:
        bundle.run(images[:2])
    assert (
        "input is float32 [2, 3, 32, 32], expected uint8 [N, 32, 32, 3], RGB pixels that are not "
        "normalized, with N at least 1"
    ) == str(refusal.value)


def test_the_device_half_feeds_pixels(bundle: Bundle) -> None:
    """verify and benchmark run both graphs on them."""
    ledger = verify(bundle)
    assert [("simplified", "pass"), ("int8", "pass")] == [
        (stage.stage, stage.status) for stage in ledger.stages[:2]
    ]
    effort = Effort(seconds=0, warmup=0)
    timed = benchmark(bundle, RunBackend.ONNXRUNTIME, batches=[1, 4], effort=effort)
    assert [1, 4] == [latency.batch for latency in timed.rows]


def test_the_table_is_the_networks_and_the_cache_is_the_graphs(
    bundle: Bundle, plain: Bundle
) -> None:
    """Only the cache names the tensor behind the prologue: implicit INT8 reads model.onnx."""
    table = (bundle.path / "calibration.json").read_text()
    assert (plain.path / "calibration.json").read_text() == table
    model = onnx.load(bundle.path / "model.onnx")
    assert CalibrationTable.loads(table).onnx_sha256 == graph_sha256(without_prologue(model))
    own, before = (
        parse_cache_text((made.path / "calibration.cache").read_text()) for made in (bundle, plain)
    )
    scale = before.pop("images")
    assert {**before, "images.normalized": scale} == own
    assert own.keys() <= {name for node in model.graph.node for name in node.output}


@pytest.mark.slow
def test_a_table_serves_with_and_without_a_prologue(
    exported, bundle: Bundle, plain: Bundle
) -> None:
    """The integers are the same again, in the other layout and without one."""
    table = str(bundle.path / "calibration.json")
    expected = graph_sha256(onnx.load(plain.path / "model.int8.onnx"))
    for layout in ("nchw", None):
        again = exported(f"again-{layout}", with_preprocess=layout, calibration_table=table)
        found = without_prologue(onnx.load(again.path / "model.int8.onnx"))
        assert expected == graph_sha256(found)


def test_the_engine_has_no_kernel_more(bundle: Bundle, plain: Bundle) -> None:
    """Convolutions, fused epilogues and other kernels are those without a prologue."""
    engines = [
        json.loads((made.path / "engine.json").read_text())["per_target"]
        for made in (bundle, plain)
    ]
    assert engines[0] == engines[1]


def test_inspect_tells_of_the_prologue(bundle: Bundle) -> None:
    """Of the bundle and of its graphs."""
    found = inspect_file(bundle.path).details
    assert ["Cast", "Sub", "Mul", "Transpose"] == found["prologue"]
    assert bundle.manifest["inputs"] == found["inputs"]
    for name in ("model.onnx", "model.int8.onnx"):
        found = inspect_file(bundle.path / name).details["prologue"]
        assert ("uint8", "nhwc", [0.5, 0.4, 0.6]) == tuple(
            found[key] for key in ("dtype", "layout", "mean")
        )
    assert inspect_file(bundle.path / "model.onnx").details["inputs"] == {
        "images": ["batch", 32, 32, 3]
    }


def test_open_sizes_are_compared_on_whole_pixels(exported, images) -> None:
    """At both ends of the profile, with the gates as they are."""
    bundle = exported(
        "open",
        precision="fp32",
        with_preprocess="nhwc",
        calibration=None,
        evaluation=images,
        dynamic_size="32:32:64",
    )
    assert ["batch", "height", "width", 3] == bundle.manifest["inputs"][0]["shape"]
    assert {"logits", "logits@64x64"} == set(row(bundle, "simplified")["outputs"])
    assert ["pass"] * 3 == [row["status"] for row in bundle.parity["stages"][:3]]
    assert bundle.run(np.zeros((2, 40, 48, 3), np.uint8)).shape == (2, 6)
    engine = json.loads((bundle.path / "engine.json").read_text())
    assert engine["convolutions"]["total"] == engine["convolutions"]["float"]


def test_a_cache_of_a_graph_without_prologue_is_refused(
    exported, bundle: Bundle, plain: Bundle, images: np.ndarray, tmp_path: Path
) -> None:
    """Before anything is built; one that cannot be read is refused as well."""
    cache = plain.path / "calibration.cache"
    wanted = {"with_preprocess": "nhwc", "targets": "sm87"}
    with pytest.raises(InputError) as refusal:
        exported("cache", calibration_cache=str(cache), **wanted)
    assert (
        f"calibration cache {cache} has a scale for images, which takes pixels, in place of "
        "images.normalized: it is of an export without --with-preprocess"
    ) == str(refusal.value)
    with pytest.raises(InputError, match=r"calibration cache .*absent cannot be used: "):
        exported("cache", calibration_cache=str(tmp_path / "absent"), **wanted)
    own = bundle.path / "calibration.cache"
    made = exported("cache", calibration_cache=str(own), **wanted)
    assert "deferred" == json.loads((made.path / "engine.json").read_text())["status"]


class Blind(nn.Module):
    """Takes ``count`` images of ``channels`` channels."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        layer = ConvLayer(name="", in_channels=channels, out_channels=8, stride=1, groups=1)
        self.stem = RepVGGBlock(layer)
        self.count = count

    def forward(self, image: Tensor) -> Tensor:
        return self.stem(image).mean((2, 3))


class Pair(Blind):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.stem(left + right).mean((2, 3))


@pytest.mark.parametrize(
    ("module", "channels", "count", "sentence"),
    [
        (Pair, 3, 2, "--with-preprocess is for networks of one image; this one takes left, right"),
        (
            Blind,
            1,
            1,
            "--with-preprocess is for RGB images [N, 3, H, W]; input image is [batch, 1, 16, 16]",
        ),
        (
            Blind,
            3,
            1,
            "--with-preprocess needs to know how images become the arrays that were passed: name "
            "their mean and std with preprocess=",
        ),
    ],
    ids=["inputs", "channels", "unstated"],
)
def test_networks_that_cannot_take_pixels_are_refused(
    tmp_path: Path, module: type[Blind], channels: int, count: int, sentence: str
) -> None:
    """Exit code 2, before any work, nothing is left behind."""
    arrays = (np.zeros((4, channels, 16, 16), np.float32),) * count
    with pytest.raises(InputError) as refusal:
        export(
            module(channels, count).eval(),
            example_input=(torch.zeros(1, channels, 16, 16),) * count,
            precision="fp32",
            evaluation=arrays,
            with_preprocess="nhwc",
            targets="sm86",
            out=tmp_path / "out",
        )
    assert (2, sentence) == (refusal.value.exit_code, str(refusal.value))
    assert not list(tmp_path.iterdir())


def test_arrays_of_another_preprocessing_are_refused(exported, images: np.ndarray) -> None:
    """They are no whole pixels under the one that is stated."""
    with pytest.raises(InputError) as refusal:
        exported("wrong", precision="fp32", evaluation=images * 1.01, with_preprocess="nhwc")
    assert 2 == refusal.value.exit_code
    assert (
        "--with-preprocess compares on pixels, but these arrays are not normalized ones: under the "
        "preprocessing they are up to 1.5 grey values away from whole pixels; pass preprocess= as "
        "they were made, or evaluation= with an image folder"
    ) == str(refusal.value)
