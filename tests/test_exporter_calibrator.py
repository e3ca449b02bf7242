"""Calibration runs: which tensors are observed, and what the table says about them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from calibration.images import Preprocess
from calibration.table import CalibrationTable
from calibration.threshold import Method, activation_scale
from exporter.calibrator import PERCENTILE, observe_boundaries, observe_images, table_by
from exporter.errors import InputError
from exporter.graph import boundary_tensors
from exporter.quantize import quantize
from exporter.running.image_set import ArrayImages, FolderImages

PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[batch,3,8,8] images) => (float[batch,4] logits) {
    ["stage0.conv"] x0 = Conv <pads = [1,1,1,1], strides = [2,2]> (images, w0, b0)
    ["stage0.relu"] y0 = Relu (x0)
    ["stage1.conv"] x1 = Conv <pads = [1,1,1,1]> (y0, w1, b1)
    ["stage1.relu"] y1 = Relu (x1)
    ["stage2.conv"] x2 = Conv <pads = [1,1,1,1]> (y1, w2, b2)
    ["stage2.relu"] y2 = Relu (x2)
    ["head.pool"] p = GlobalAveragePool (y2)
    ["head.flatten"] f = Flatten (p)
    ["linear"] logits = Gemm <transB = 1> (f, w3, b3)
}
"""
SHAPES = {
    "w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "b1": (8,),
    "w2": (8, 8, 3, 3), "b2": (8,), "w3": (4, 8), "b3": (4,),
}  # fmt: skip
PREPROCESS = Preprocess(image_size=(8, 8), crop_fraction=1.0)


def calibrate(
    model: onnx.ModelProto, data: ArrayImages | FolderImages, method: str, preprocess: Preprocess
) -> CalibrationTable:
    observers = observe_images(model, data)
    return table_by(method, observers, model, data.to_json(), preprocess)


def graph(**replaced: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(PLAIN)
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = replaced.get(name, 0.3 * generator.standard_normal(shape)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def images(count: int = 37) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 8, 8)).astype(np.float32)


def test_boundaries_are_what_int8_kernels_read() -> None:
    """The images, every ReLU's output but the last, and the flattened features, in order."""
    assert ("images", "y0", "y1", "f") == boundary_tensors(graph())
    assert ["images", "y0", "y1", "f"] == list(observe_boundaries(graph(), [(images(),)]))


def test_a_boundary_that_two_layers_read_is_listed_once() -> None:
    """boundary_tensors has no duplicates."""
    model = graph()
    model.graph.node[4].input[0] = "y0"
    assert ("images", "y0", "f") == boundary_tensors(model)


def test_every_value_of_every_image_is_counted() -> None:
    """Counts are images x elements; the images' own range is exact; ReLU outputs start at 0."""
    observers = observe_boundaries(graph(), [(images()[:20],), (images()[20:],)])
    sizes = {"images": 3 * 64, "y0": 8 * 16, "y1": 8 * 16, "f": 8}
    assert {name: 37 * size for name, size in sizes.items()} == {
        name: observer.count for name, observer in observers.items()
    }
    assert (float(images().min()), float(images().max())) == (
        observers["images"].minimum,
        observers["images"].maximum,
    )
    assert 0.0 == observers["y0"].minimum


@pytest.mark.parametrize("method", Method)
def test_scales_do_not_depend_on_the_batch_size(method: Method) -> None:
    """One image a step, 7 or all at once give the same scales up to float rounding."""
    scales = []
    for size in (1, 7, 37):
        batches = ((images()[start : start + size],) for start in range(0, 37, size))
        observers = observe_boundaries(graph(), batches)
        scales.append([activation_scale(observer, method) for observer in observers.values()])
    # One bin of the histogram is what rounding can move a clip value by.
    np.testing.assert_allclose(scales[0], scales[1], rtol=1e-3)
    np.testing.assert_allclose(scales[0], scales[2], rtol=1e-3)


def test_progress_counts_images() -> None:
    """After each batch the number of images done is reported, or their share."""
    seen: list[int] = []
    observe_boundaries(graph(), [(images(n),) for n in (5, 1, 3)], seen.append)
    assert [5, 6, 9] == seen
    shares: list[float] = []
    observe_images(graph(), ArrayImages.of(images()), shares.append)
    assert 1.0 == shares[-1]
    assert sorted(set(shares)) == shares


def test_the_table_records_what_it_was_made_from(tmp_path: Path) -> None:
    """Hash of the graph as saved, hash and number of the images, method and preprocessing."""
    model, data = graph(), ArrayImages.of(images())
    onnx.save(model, tmp_path / "model.onnx")
    table = calibrate(model, data, "minmax", PREPROCESS)
    saved = hashlib.sha256((tmp_path / "model.onnx").read_bytes()).hexdigest()
    assert saved == table.onnx_sha256
    assert data.to_json()["sha256"] == table.data_sha256
    assert (37, "minmax", None) == (table.image_count, table.method, table.percentile)
    assert PREPROCESS.to_json() == table.preprocess


def test_the_percentile_is_recorded_where_it_was_used() -> None:
    """Only the percentile method has one."""
    data = ArrayImages.of(images())
    assert PERCENTILE == calibrate(graph(), data, "percentile", PREPROCESS).percentile


def test_minmax_scales_are_the_largest_magnitude_over_127() -> None:
    """The scale, range and clip value of the input follow from the images alone."""
    table = calibrate(graph(), ArrayImages.of(images()), "minmax", PREPROCESS)
    largest = float(np.abs(images()).max())
    assert float(np.float32(largest / 127)) == table.activation_scales["images"]
    assert largest == table.ranges["images"].threshold
    assert (float(images().min()), float(images().max())) == (
        table.ranges["images"].minimum,
        table.ranges["images"].maximum,
    )


@pytest.mark.parametrize("method", [method.value for method in Method])
def test_a_table_fits_its_graph(method: str) -> None:
    """Every method's table has exactly the scales that the quantizer asks for."""
    table = calibrate(graph(), ArrayImages.of(images()), method, PREPROCESS)
    assert set(boundary_tensors(graph())) == set(table.activation_scales)
    assert 4 == sum(n.op_type == "QuantizeLinear" for n in quantize(graph(), table).graph.node)


def test_the_graph_is_untouched() -> None:
    """Exposing the boundary tensors does not edit the caller's graph."""
    model = graph()
    calibrate(model, ArrayImages.of(images(2)), "minmax", PREPROCESS)
    assert graph() == model


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(value: float) -> None:
    """A bias of NaN or Inf in the second layer is found in the tensor behind it."""
    model = graph(b1=np.full(8, value))
    with pytest.raises(InputError, match=r"calibration failed: tensor 'y1', images 0 to 15: .*NaN"):
        calibrate(model, ArrayImages.of(images()), "minmax", PREPROCESS)


def test_a_nan_in_an_image_is_found_in_the_input() -> None:
    """The tensor that is named is the first one that is not finite."""
    data = images()
    data[20, 1, 2, 3] = np.nan
    with pytest.raises(InputError, match="tensor 'images', images 16 to 31: 1 of 3072"):
        calibrate(graph(), ArrayImages.of(data), "minmax", PREPROCESS)


def test_no_images_is_an_error() -> None:
    """An empty set is refused; no default range is made up."""
    with pytest.raises(InputError, match="there are no calibration images"):
        calibrate(graph(), ArrayImages.of(images()[:0]), "minmax", PREPROCESS)


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    """A corrupt file is an InputError with its path and the way out."""
    for index in range(3):
        Image.new("RGB", (8, 8), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    folder = FolderImages.open(tmp_path, PREPROCESS, "mine", count=9, skip_bad=False)
    with pytest.raises(InputError, match=r"1\.png cannot be decoded .*--skip-bad-images"):
        calibrate(graph(), folder, "minmax", PREPROCESS)


def test_a_folder_is_calibrated_like_its_arrays(tmp_path: Path) -> None:
    """Files through Preprocess and the same pixels as an array give the same scales."""
    generator = np.random.default_rng(4)
    for index in range(5):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    folder = FolderImages.open(tmp_path, PREPROCESS, "mine", count=9, skip_bad=False)
    array = np.concatenate([images for (images,) in folder.batches()])
    from_files = calibrate(graph(), folder, "mse", PREPROCESS)
    from_array = calibrate(graph(), ArrayImages.of(array), "mse", PREPROCESS)
    assert from_array.activation_scales == from_files.activation_scales
    assert folder.folder.sha256() == from_files.data_sha256
