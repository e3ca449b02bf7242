"""What an export looks at: whose classes the folders of its images can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from exporter.request import ExportRequest, validate
from exporter.sources.inputs import Inputs, prepare


def prepared(**options: str) -> Inputs:
    request = ExportRequest(model="A0", precision="fp32", image_size="32", **options)  # type: ignore[arg-type]
    return prepare(validate(request))


def has_labels(inputs: Inputs) -> bool:
    count = inputs.interface.num_classes
    assert count is not None
    return inputs.evaluation.labels(inputs.source.class_names, count) is not None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image in each of three class folders."""
    for name in ("n01", "n02", "n03"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / name / "a.png")
    return tmp_path


def test_the_bundled_images_have_labels_for_the_bundled_network_only() -> None:
    """Ten classes may be anything; a top-1 of digits would be nobody's."""
    assert has_labels(prepared())
    other = prepared(weights="random")
    assert not has_labels(other)
    assert any("not this network's kind" in note for note in other.notes)
    assert not any("no top-1" in note for note in other.notes)


def test_class_folders_that_are_of_no_use_are_not_missed_in_silence(folder: Path) -> None:
    """By number or by name."""
    inputs = prepared(weights="random", evaluation=str(folder))
    assert not has_labels(inputs)
    words = "no top-1: the images to compare on lie in folders of 3 classes, which are not the net"
    assert [note for note in inputs.notes if note.startswith(words)]


def test_images_without_folders_are_nothing_to_note(folder: Path) -> None:
    inputs = prepared(weights="random", evaluation=str(folder / "n01"))
    assert not has_labels(inputs)
    assert not any("no top-1" in note for note in inputs.notes)
