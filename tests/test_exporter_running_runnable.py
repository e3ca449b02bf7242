"""What ONNX Runtime is handed for a graph of each precision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from exporter.errors import EnvironmentLackError, GateFailedError
from exporter.precision import BFLOAT16, to_type
from exporter.running.runnable import require_timeable, runnable

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
small (float[batch,4] x) => (float[batch,4] y) { y = Relu (x) }
"""


@pytest.mark.parametrize(
    ("precision", "optimize"), [("fp32", True), ("int8", True), ("fp16", False), ("fp8", False)]
)
def test_a_graph_that_it_knows_is_run_as_it_is(precision: str, *, optimize: bool) -> None:
    """Half graphs without optimizations; nothing has to be said about either."""
    way = runnable(Path("model.onnx"), precision)
    assert (Path("model.onnx"), optimize, ()) == (way.model, way.optimize, way.notes)


@pytest.mark.parametrize("content", [b"", b"\x08\x08", b"no graph"])
def test_what_cannot_be_emulated_is_refused_in_a_sentence(tmp_path: Path, content: bytes) -> None:
    """As ONNX Runtime refuses the graphs that it is handed itself."""
    (tmp_path / "model.bf16.onnx").write_bytes(content)
    with pytest.raises(GateFailedError, match=r"^(the graph cannot|ONNX Runtime)"):
        runnable(tmp_path / "model.bf16.onnx", "bf16").open()


def test_bf16_is_emulated_from_the_file_and_said(tmp_path: Path) -> None:
    """The graph handed over has no bfloat16 operator left, only casts to it."""
    path = tmp_path / "model.bf16.onnx"
    onnx.save(to_type(BFLOAT16, onnx.parser.parse_model(TEXT)), path)
    way = runnable(path, "bf16")
    assert isinstance(way.model, onnx.ModelProto)
    assert ["Cast", "Cast", "Relu", "Cast", "Cast", "Cast"] == [
        n.op_type for n in way.model.graph.node
    ]
    assert (
        "the bf16 row was computed in float32 and rounded wherever the graph stores bfloat16: "
        "ONNX Runtime has no such convolution on the CPU",
    ) == way.notes


def test_without_onnx_a_bf16_graph_cannot_be_emulated() -> None:
    """On a device that has only ONNX Runtime the error says what to install."""
    code = (
        "import sys; sys.modules['onnx'] = None\n"
        "from pathlib import Path; from exporter.running.runnable import runnable\n"
        "from exporter.errors import EnvironmentLackError\n"
        "try: runnable(Path('model.bf16.onnx'), 'bf16')\n"
        "except EnvironmentLackError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert (
        "ONNX Runtime has no bf16 convolutions on the CPU, and emulating them needs the onnx "
        "package: pip install onnx, or run the engine on a GPU\n"
    ) == done.stdout


def test_the_time_of_an_emulation_is_refused() -> None:
    """It says nothing about the precision; others may be timed."""
    for precision in ("fp32", "fp16", "int8"):
        require_timeable(precision)
    with pytest.raises(EnvironmentLackError, match="ONNX Runtime has no fp8 convolutions"):
        require_timeable("fp8")
    with pytest.raises(EnvironmentLackError) as caught:
        require_timeable("bf16")
    assert (
        "ONNX Runtime has no bf16 convolutions on the CPU and emulates them in float32, whose "
        "time says nothing: measure the engine on a GPU"
    ) == str(caught.value)
