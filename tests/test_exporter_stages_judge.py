"""Which images a stage is judged on, and what is said when it fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.errors import GateFailedError
from exporter.network import torch_runner
from exporter.profiles import SizeProfile
from exporter.running.image_set import ArrayImages
from exporter.sources.custom import example_tensors, module_source
from exporter.sources.source import Source
from exporter.spec import ExportSpec, Precision
from exporter.stages import judge as judge_module
from exporter.stages import judged_images
from exporter.stages.judge import Judge

IMAGES = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)


class Doubled(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return 2 * image


def made(
    size: SizeProfile | None = None, precision: Precision = Precision.FP32
) -> tuple[Judge, Source]:
    spec = ExportSpec(
        variant=None, name="Doubled", precision=precision, out=Path("b"), dynamic_size=size
    )
    network = Doubled()
    example = example_tensors(torch.zeros(1, 3, 8, 8), network)
    source = module_source(network, example, size)
    assert source.interface is not None
    return Judge(spec, source, ArrayImages.of(IMAGES), source.interface), source


def test_every_stage_sees_all_images() -> None:
    """The original's outputs are those of the whole set; the ledger counts the images."""
    judge, source = made()
    np.testing.assert_array_equal(2 * IMAGES, judge.original["output"])
    assert (40, ()) == (judge.ledger.image_count, judge.images.notes)
    assert source.interface is not None
    judge.check("onnx", torch_runner(source.module, source.interface))
    assert ["pass"] == [row.status for row in judge.ledger.stages]


def test_what_leads_to_the_built_graph_is_judged_on_as_many_images_as_its_pixels_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph that is built is judged on all of them, and so is all with a free size."""
    monkeypatch.setattr(judged_images, "PIXELS_ON_THE_WAY", 39 * 8 * 8)
    seen: list[int] = []

    def run(batch: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        seen.append(len(batch[0]))
        return {"output": 2 * batch[0]}

    def images(judge: Judge, stage: str) -> tuple[int | None, int]:
        seen.clear()
        return judge.score(stage, run).images, sum(seen)

    judge, _ = made(precision=Precision.FP16)
    assert dict.fromkeys(judge_module.ON_THE_WAY, (32, 32)) == {
        stage: images(judge, stage) for stage in judge_module.ON_THE_WAY
    }
    assert (40, 40) == images(judge, "fp16")
    judge, _ = made(precision=Precision.FP32)
    assert (32, 32) == images(judge, "simplified")
    judge.check("simplified", run)
    judge.recheck("simplified", run)
    assert [40] == [row.images for row in judge.ledger.stages]
    free, _ = made(SizeProfile((8, 8, 8), (8, 8, 8)), Precision.FP16)
    assert (40, 40) == images(free, "onnx")
    monkeypatch.setattr(judged_images, "PIXELS_ON_THE_WAY", 1)
    assert (16, 16) == images(judge, "onnx")


def test_a_wrong_image_beyond_the_first_ones_fails_the_graph_that_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the stages before it did not look at, it is still held against."""
    monkeypatch.setattr(judged_images, "PIXELS_ON_THE_WAY", 16 * 8 * 8)
    judge, _ = made(precision=Precision.FP16)

    def wrong_at_the_end(batch: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        values = 2 * batch[0]
        return {"output": -values if len(values) < 16 else values}

    judge.check("simplified", wrong_at_the_end)
    with pytest.raises(GateFailedError, match="parity failed at stage fp16: SQNR"):
        judge.check("fp16", wrong_at_the_end)


def test_a_stage_that_changes_nothing_has_the_row_of_the_one_before() -> None:
    """Figures, images and the worst of them."""
    judge, source = made()
    assert source.interface is not None
    judge.check("onnx", torch_runner(source.module, source.interface))
    judge.carry_over("onnx", "simplified")
    first, second = judge.ledger.to_json()["stages"]
    assert {**first, "stage": "simplified"} == second
    assert judge.ledger.worst_images is not None
    assert "simplified" == judge.ledger.worst_images.stage


def test_worst_images_are_those_of_the_graph_that_was_judged_last() -> None:
    """Also where it replaces one that was judged before; not where another row is the last."""
    judge, _ = made()

    def worst_by(factor: float) -> float:
        judge.recheck("simplified", lambda batch: {"output": factor * batch[0]})
        assert judge.ledger.worst_images is not None
        return judge.ledger.worst_images.rows[0].max_abs

    judge.check("simplified", lambda batch: {"output": 2 * batch[0]})
    assert 0 == worst_by(2) < worst_by(2.00001)
    judge.check("fp16", lambda batch: {"output": 2 * batch[0]})
    assert 0 == worst_by(2.00001)


def test_large_outputs_are_compared_on_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept stays within the limit, at least one batch; a note says so."""
    monkeypatch.setattr(judged_images, "MAX_OUTPUT_BYTES", 32 * 3 * 64 * 4)
    judge, _ = made()
    assert (32, (32, 3, 8, 8)) == (judge.ledger.image_count, judge.original["output"].shape)
    assert "parity is measured on the first 32 of 40 images" in judge.images.notes[0]
    monkeypatch.setattr(judged_images, "MAX_OUTPUT_BYTES", 1)
    assert 16 == made()[0].ledger.image_count


def test_both_ends_of_a_dynamic_size_are_compared_too() -> None:
    """The first batch is scaled to them; an end that is the images' own size is not repeated."""
    judge, _ = made(SizeProfile((8, 8, 16), (8, 12, 24)))
    assert {"output": (40, 3, 8, 8), "output@16x24": (16, 3, 16, 24)} == {
        name: values.shape for name, values in judge.original.items()
    }
    assert [(2, 3, 8, 8), (2, 3, 16, 24)] == [batch[0].shape for batch in judge.images.samples(2)]


def test_a_stage_that_fails_ends_the_run() -> None:
    """The row is kept in the ledger; the message names stage and figure."""
    judge, _ = made()
    with pytest.raises(GateFailedError, match="parity failed at stage simplified: largest") as got:
        judge.check("simplified", lambda batch: {"output": 2.1 * batch[0]})
    assert ["fail"] == [row.status for row in judge.ledger.stages]
    assert judge.ledger.to_json() == got.value.evidence
