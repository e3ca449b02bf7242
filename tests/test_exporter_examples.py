"""The examples of networks of one's own reach an INT8 engine, parity passing."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from exporter import Bundle

ROOT = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("custom_segmentation", "custom_detector")
EXPECTED = {"custom_segmentation": (7, 6), "custom_detector": (19, 10)}
"""Convolutions, and fused blocks among them."""


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The example and the bundle that its main() makes."""
    module = load(request.param)
    return request.param, module, module.main(str(tmp_path_factory.mktemp("example") / "b"))


def test_the_engine_holds_every_convolution_in_int8(made: tuple[str, ModuleType, Bundle]) -> None:
    """Blocks, heads and laterals; the contract knows the blocks."""
    name, _, bundle = made
    total, blocks = EXPECTED[name]
    engine = json.loads((bundle.path / "engine.json").read_text())
    assert {"total": total, "int8": total, "half": 0, "float": 0, "bf16": 0, "fp8": 0} == engine[
        "convolutions"
    ]
    assert ["sm86"] == engine["targets"]
    contract = bundle.manifest["contract"]
    assert (total, blocks) == (contract["convolutions"], contract["blocks"])
    assert blocks == len(bundle.manifest["reparameterization"]["blocks"])


def test_parity_passes_with_room(made: tuple[str, ModuleType, Bundle]) -> None:
    """Every stage that ran passed; INT8 is at least 26 dB at its worst output."""
    _, _, bundle = made
    rows = {row["stage"]: row for row in bundle.parity["stages"]}
    assert ["reparameterized", "onnx", "simplified", "int8", "engine"] == list(rows)
    assert {"pass"} == {row["status"] for stage, row in rows.items() if stage != "engine"}
    assert rows["int8"]["sqnr_db"] >= 26
    assert len(rows["int8"]["outputs"]) == 3


def test_the_bundle_answers_like_the_network(made: tuple[str, ModuleType, Bundle]) -> None:
    """The recorded outputs have the shapes that the network is documented to have."""
    name, _, bundle = made
    images, outputs = bundle.reference()
    found = bundle.run(images)
    if name == "custom_segmentation":
        assert (8, 3, 64, 96) == outputs.shape == found.shape
        assert (1, 3, 128, 64) == bundle.run(torch.rand(1, 3, 128, 64).numpy()).shape
    else:
        shapes = {key: value.shape for key, value in found.items()}
        assert {
            "stride8": (8, 8, 12, 16), "stride16": (8, 8, 6, 8), "stride32": (8, 8, 3, 4),
        } == shapes  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short(name: str) -> None:
    """Under 125 lines, of which main() has fewer than 20; the README shows as few."""
    module = load(name)
    assert len((ROOT / f"{name}.py").read_text().splitlines()) < 125
    assert len(inspect.getsource(module.main).splitlines()) < 20
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert 2 == len(snippets)
    assert all(len(snippet.splitlines()) < 20 for snippet in snippets)
