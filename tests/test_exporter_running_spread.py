"""Work in parts: how it is cut, that nothing shows of it, and what becomes of processes."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image

from calibration.images import Preprocess
from exporter.calibrator import observe_images
from exporter.errors import EnvironmentLackError, InputError
from exporter.network import classifier_interface, torch_runner
from exporter.onnx_export import export_onnx
from exporter.precision import larger, largest_magnitudes
from exporter.profiles import SizeProfile
from exporter.quantization.chain_observer import observe_chain, observe_ranges
from exporter.quantization.plain_chain import read_chain
from exporter.running.image_set import BATCH_SIZE, FolderImages
from exporter.running.onnx_runner import OnnxRunner
from exporter.running.spread import LocalSpread, cut, run_pickled
from exporter.sources.source import Source
from exporter.spec import ExportSpec, Precision
from exporter.stages.judge import Judge
from models import RepVGG, Variant
from models.fusion import reparameterize

COUNT = 70
SIZE = (16, 16)
PREPROCESS = Preprocess(image_size=SIZE, crop_fraction=1.0)
TINY = Variant(name="tiny", num_blocks=(1, 2, 1, 1), width_multiplier=(0.25, 0.25, 0.25, 0.125))
PID = "__import__('os').getpid()"

counts = st.integers(1, COUNT)
widths = st.integers(1, 5)


class Travelling:
    """Helpers whose work and results are pickled, but who are this process."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.helped = 0

    def start(self, work: Callable[[Any], Any], items: Sequence[Any]) -> list[Callable[[], Any]]:
        self.helped += len(items)
        text = pickle.dumps(work)
        return [partial(self._result, text, pickle.dumps(item)) for item in items]

    def _result(self, work: bytes, item: bytes) -> Any:
        return pickle.loads(pickle.dumps(run_pickled(work, pickle.loads(item))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, a file of which is there twice."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for index in range(COUNT):
        pixels = generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{index:02}.png")
    (root / "60.png").write_bytes((root / "03.png").read_bytes())
    return root


def opened(root: Path, count: int, width: int | None = None) -> FolderImages:
    spread = None if width is None else Travelling(width)
    return FolderImages.open(root, PREPROCESS, "noise", count=count, skip_bad=False, spread=spread)


@pytest.fixture(scope="module")
def network(one_thread: None) -> RepVGG:
    torch.manual_seed(0)
    return RepVGG(TINY, num_classes=6).eval()


@pytest.fixture(scope="module")
def model(network: RepVGG) -> onnx.ModelProto:
    return export_onnx(reparameterize(network), SIZE, {}, free_size=True)


@given(count=st.integers(0, 300), parts=st.integers(1, 12), step=st.integers(1, 40))
def test_parts_are_the_whole_in_order_and_begin_with_a_step(
    count: int, parts: int, step: int
) -> None:
    """They differ by one step at most, but for the last one's rest."""
    found = cut(count, parts, step)
    assert list(range(count)) == [index for part in found for index in part]
    assert all(part.start % step == 0 for part in found)
    assert min(parts, max(1, -(-count // step))) == len(found)
    steps = [-(-len(part) // step) for part in found]
    assert max(steps) - min(steps) <= 1


@settings(deadline=None)
@given(count=counts, width=widths)
def test_batches_of_the_parts_are_those_of_the_whole(folder: Path, count: int, width: int) -> None:
    """And each part knows how many images come before it."""
    images = opened(folder, count, width)
    parts = images.in_parts(_first_and_batches)
    assert isinstance(images.spread, Travelling)
    assert (len(parts) - 1, min(width, -(-count // BATCH_SIZE))) == (
        images.spread.helped, len(parts),
    )  # fmt: skip
    found = [batch for _, batches in parts for batch in batches]
    expected = [batch for (batch,) in images.batches()]
    assert [b.tobytes() for b in expected] == [b.tobytes() for b in found]
    lengths = [sum(map(len, batches)) for _, batches in parts]
    assert [sum(lengths[:index]) for index in range(len(parts))] == [first for first, _ in parts]


def _first_and_batches(images: FolderImages, _advance: object) -> tuple[int, list[np.ndarray]]:
    return images.first, [batch for (batch,) in images.batches()]


@settings(max_examples=25, deadline=None)
@given(count=counts, width=widths)
def test_calibration_in_parts_is_calibration(
    folder: Path, model: onnx.ModelProto, count: int, width: int
) -> None:
    """Histograms, ranges and the sample: every bit."""
    whole, parts = opened(folder, count), opened(folder, count, width)
    assert observe_images(model, whole) == observe_images(model, parts)
    plain = read_chain(model)
    assert plain is not None
    assert observe_ranges(model, plain, whole) == observe_ranges(model, plain, parts)


@pytest.mark.parametrize("width", [2, 5])
def test_what_a_chain_is_rounded_by_does_not_show_the_parts(
    folder: Path, model: onnx.ModelProto, width: int
) -> None:
    plain = read_chain(model)
    assert plain is not None
    whole, parts = (observe_chain(model, plain, opened(folder, COUNT, w)) for w in (None, width))
    assert whole.sample.tobytes() == parts.sample.tobytes()
    assert len(whole.sample) < COUNT
    assert (whole.data_sha256, whole.image_count) == (parts.data_sha256, parts.image_count)
    for left, right in zip(whole.statistics, parts.statistics, strict=True):
        for name in ("minimum", "maximum", "mean", "mean_square", "positive"):
            assert getattr(left, name).tobytes() == getattr(right, name).tobytes()


def judge(network: RepVGG, images: FolderImages, size: SizeProfile | None) -> Judge:
    spec = ExportSpec(
        variant=None, name="tiny", precision=Precision.FP32, out=Path("b"), dynamic_size=size
    )
    source = Source(module=network, variant=TINY, form="train", origin={"source": "file"}, notes=())
    return Judge(spec, source, images, classifier_interface(SIZE, 6, size))


@settings(max_examples=25, deadline=None)
@given(cut_into=st.tuples(counts, widths), free=st.booleans())
def test_what_is_judged_in_parts_is_judged(
    folder: Path,
    network: RepVGG,
    model: onnx.ModelProto,
    cut_into: tuple[int, int],
    free: bool,
) -> None:
    """The original's answers, a stage's row, and the magnitudes that half must hold."""
    count, width = cut_into
    size = SizeProfile((16, 16, 32), (16, 16, 32)) if free else None
    judges = [judge(network, opened(folder, count, w), size) for w in (None, width)]
    originals = [
        {name: values.tobytes() for name, values in each.original.items()} for each in judges
    ]
    assert originals[0] == originals[1]
    assert (1 + free) == len(originals[0])
    for run in (OnnxRunner(model).run, torch_runner(network, classifier_interface(SIZE, 6, None))):
        rows = [each.score("onnx", run) for each in judges]
        assert rows[0].to_json() == rows[1].to_json()
    work = partial(largest_magnitudes, model)
    expected = largest_magnitudes(model, judges[0].images.batches())
    (first, *others) = judges[1].images.in_parts(work)
    for other in others:
        first = larger(first, other)
    assert expected == first


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_what_is_wrong_is_said_as_by_one_process(
    folder: Path, model: onnx.ModelProto, tmp_path: Path, width: int
) -> None:
    """The first file that cannot be read; the first images whose tensors are not finite."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("40.png", "65.png"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(InputError, match=r"40\.png cannot be decoded .* --skip-bad-images") as one:
        observe_images(model, opened(tmp_path, COUNT))
    with pytest.raises(InputError) as other:
        observe_images(model, opened(tmp_path, COUNT, width))
    assert (str(one.value), one.value.exit_code) == (str(other.value), other.value.exit_code)
    large = onnx.ModelProto()
    large.CopyFrom(model)
    for tensor in large.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1e20), tensor.name))
    with pytest.raises(InputError, match=r"images 0 to 15: .* NaN or infinite"):
        observe_images(large, opened(folder, COUNT, width))


def test_errors_count_images_from_the_first_of_the_whole(folder: Path, tmp_path: Path) -> None:
    """A black image, whose logarithm is infinite, is in the third batch."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", SIZE).save(tmp_path / "40.png")
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "logarithm (float[batch,3,16,16] images) => (float[batch,4,16,16] y)"
        "{ p = Exp (images) q = Sub (p, least) r = Log (q) y = Conv (r, w) }"
    )
    unit = Preprocess(image_size=SIZE, crop_fraction=1.0, mean=(0, 0, 0), std=(1, 1, 1))
    initializers = {"least": np.float32([1]), "w": np.ones((4, 3, 1, 1), np.float32)}
    for name, values in initializers.items():
        graph.graph.initializer.append(numpy_helper.from_array(values, name))
    said = set()
    for path in folder.iterdir():
        # No other black pixel.
        pixels = np.maximum(np.asarray(Image.open(tmp_path / path.name)), 1)
        if path.name != "40.png":
            Image.fromarray(pixels).save(tmp_path / path.name)
    for width in (1, 3, 5):
        images = FolderImages.open(
            tmp_path, unit, "", count=COUNT, skip_bad=False, spread=Travelling(width)
        )
        with pytest.raises(InputError) as caught:
            observe_images(graph, images)
        said.add(str(caught.value))
    assert {"calibration failed: tensor 'r', images 32 to 47: 768 of 12288 values are NaN or "
            "infinite"} == said  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(count=counts, width=widths)
def test_progress_grows_to_all(
    folder: Path, model: onnx.ModelProto, count: int, width: int
) -> None:
    heard: list[float] = []
    observe_images(model, opened(folder, count, width), heard.append)
    assert sorted(heard) == heard
    assert 1 == heard[-1]


def test_processes_help_in_order_and_each_place_has_its_own() -> None:
    """They are begun when there is something for them, and ended with the block."""
    with LocalSpread(3) as spread:
        first = [wait() for wait in spread.start(eval, [PID, PID])]
        second = [wait() for wait in spread.start(eval, [PID, f"{PID} + 0.5"])]
        assert [first[0], first[1] + 0.5] == second
        assert {os.getpid()}.isdisjoint(first)
        assert 2 == len(set(first))
    for pid in first:
        assert is_gone(pid)


def test_processes_compute_with_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with LocalSpread(2) as spread:
        (wait,) = spread.start(eval, ["__import__('os').environ['OMP_NUM_THREADS']"])
        assert "3" == wait()


def test_what_was_raised_there_is_raised_here() -> None:
    with LocalSpread(2) as spread:
        (wait,) = spread.start(eval, ["1 / 0"])
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            wait()


def test_a_part_whose_process_is_killed_gets_a_second_one(tmp_path: Path) -> None:
    """Killed at work, or while it had nothing to do; a second time it is an error."""
    kill = f"__import__('os').kill({PID}, 9)"
    once = f"(m := __import__('pathlib').Path({str(tmp_path / 'once')!r})).exists() and {PID} or "
    with LocalSpread(2) as spread:
        (wait,) = spread.start(eval, [f"{once}(m.touch(), {kill})"])
        helper = wait()
        assert isinstance(helper, int)
        os.kill(helper, signal.SIGKILL)
        assert is_gone(helper)
        (wait,) = spread.start(eval, [PID])
        assert helper != wait()
        (wait,) = spread.start(eval, [kill])
        with pytest.raises(EnvironmentLackError, match="killed twice; fewer --shards need less"):
            wait()


def test_no_process_outlives_one_that_was_killed() -> None:
    script = (
        "import os\n"
        "from exporter.running.spread import LocalSpread\n"
        "spread = LocalSpread(2)\n"
        f"print(spread.start(eval, [{PID!r}])[0](), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert -signal.SIGKILL == done.returncode, done.stderr
    assert is_gone(int(done.stdout))


def is_gone(pid: int) -> bool:
    """Within some seconds; nobody may collect what an orphan leaves."""
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False
