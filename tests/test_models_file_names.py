"""Names that are no text: what native libraries refuse is read by Python."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exporter.conversion import convert
from exporter.engine import network_parser
from exporter.engine.capabilities import Api
from exporter.running.onnx_runner import OnnxRunner
from models.checkpoint import read_checkpoint_file
from models.file_names import is_text
from models.registry import bundled_weights

NO_TEXT = os.fsdecode(b"und\xff\xe9cod")
GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[batch,3] x) => (float[batch,3] y) { y = Relu (x) }
"""


@given(st.binary(min_size=1, max_size=8).filter(lambda name: b"\0" not in name))
def test_text_is_what_utf8_can_write(name: bytes) -> None:
    """Any name that a file can have is one or the other."""
    try:
        name.decode("utf-8")
        expected = True
    except UnicodeDecodeError:
        expected = False
    assert expected == is_text(Path(os.fsdecode(name)))


def test_a_checkpoint_of_any_name_is_read_and_written(tmp_path: Path) -> None:
    """The same tensors come back."""
    source = bundled_weights("A0").checkpoint
    out = tmp_path / f"{NO_TEXT}.safetensors"
    convert(source, out, form="train")
    assert [out] == list(tmp_path.iterdir())
    expected, found = (read_checkpoint_file(path).tensors for path in (source, out))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_graph_in_a_folder_of_any_name_runs(tmp_path: Path) -> None:
    """As `verify` runs it."""
    (tmp_path / NO_TEXT).mkdir()
    path = tmp_path / NO_TEXT / "model.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    found = OnnxRunner(path)(np.float32([[-1, 0, 1]]))
    np.testing.assert_array_equal([[0, 0, 1]], found)


def test_the_engine_builder_reads_it_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parser is given text, which leads to the file from where its process stands then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / NO_TEXT).mkdir()
    (tmp_path / NO_TEXT / "model.onnx").write_text("the graph")
    read: list[str] = []

    def parse(name: str) -> bool:
        name.encode()
        read.append(Path(name).read_text())
        return True

    trt = SimpleNamespace(OnnxParser=lambda *_: SimpleNamespace(parse_from_file=parse))
    api = Api(trt=trt, capabilities=frozenset())
    network_parser.parse(api, None, None, tmp_path / NO_TEXT / "model.onnx")
    assert ["the graph"] == read
