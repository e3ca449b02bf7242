"""onnxsim in its own process: the same function comes back, or a clear error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import numpy_helper

from exporter.errors import EnvironmentLackError, GateFailedError
from exporter.running.onnx_runner import OnnxRunner
from exporter.simplify import SIMPLIFIER, simplify, started_simplifier

PLAIN = """
<ir_version: 8, opset_import: ["" : 17]>
plain (float[batch,3,8,8] images) => (float[batch,2] logits) {
    ["stage0.conv"] x = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (images, w0, b0)
    ["stage0.relu"] y = Relu (x)
    ["stage1.conv"] z = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (y, w1, b1)
    [again] same = Identity (z)
    ["stage1.relu"] r = Relu (same)
    ["head.pool"] p = GlobalAveragePool (r)
    ["head.flatten"] f = Flatten (p)
    [linear] logits = Gemm <transB = 1> (f, w2, b2)
}
"""


def graph() -> onnx.ModelProto:
    """An Identity that onnxsim removes, and two equal biases that it would store once."""
    model = onnx.parser.parse_model(PLAIN)
    generator = np.random.default_rng(0)
    shapes = {"w0": (3, 3, 3, 3), "w1": (3, 3, 3, 3), "w2": (2, 3), "b2": (2,)}
    arrays = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
    arrays["b0"] = arrays["b1"] = np.full(3, 0.5)
    model.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()
    )
    onnx.helper.set_model_props(model, {"variant": "A0"})
    onnx.checker.check_model(model)
    return model


def sample() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, 3, 8, 8)).astype(np.float32)


def program(text: str) -> tuple[str, ...]:
    """A stand-in for onnxsim: ``text`` sees the input path as argv[1] and the output as argv[2]."""
    return (sys.executable, "-c", f"import sys\nsys.stdin.readline()\n{text}")


def simplified(
    model: onnx.ModelProto, command: Sequence[str] = SIMPLIFIER, timeout_s: float = 300
) -> onnx.ModelProto:
    with started_simplifier(command) as simplifier:
        return simplify(model, [(sample(),)], simplifier, timeout_s=timeout_s)


EDIT = """
import onnx, numpy as np
from onnx import numpy_helper
model = onnx.load(sys.argv[1])
{edit}
onnx.save(model, sys.argv[2])
"""


@pytest.fixture(autouse=True)
def no_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens, no temporary folder and no child process is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = psutil.Process()
    before = process.children()
    yield
    assert [] == list(tmp_path.iterdir())
    assert set(process.children()) <= set(before)


def test_onnxsim_keeps_the_function_names_and_metadata() -> None:
    """The real onnxsim drops the Identity; logits, parameters' names and metadata stay."""
    model = graph()
    found = simplified(model)
    expected = [node.name for node in model.graph.node if node.name != "again"]
    assert expected == [node.name for node in found.graph.node]
    np.testing.assert_allclose(
        OnnxRunner(model)(sample()), OnnxRunner(found)(sample()), rtol=0, atol=1e-5
    )
    parameters = {node.name: list(node.input[1:]) for node in found.graph.node}
    assert ["w0", "b0"] == parameters["stage0.conv"]
    assert ["w1", "b1"] == parameters["stage1.conv"]
    assert {"w0", "b0", "w1", "b1", "w2", "b2"} == {t.name for t in found.graph.initializer}
    assert {"variant": "A0"} == {p.key: p.value for p in found.metadata_props}
    assert [] == list(found.graph.value_info)
    assert model == graph()


def test_a_graph_with_nothing_to_simplify_comes_back_itself() -> None:
    """Node for node and weight for weight; a second look at it would prove nothing."""
    plain = simplified(graph())
    assert plain is simplified(plain)
    newer = "model.opset_import[0].version += 1"
    assert plain is not simplified(plain, command=program(EDIT.format(edit=newer)))


def test_merged_parameters_are_given_back_to_each_node() -> None:
    """A simplifier that stores equal tensors once does not make two layers share one."""
    edit = 'model.graph.node[2].input[2] = "b0"'
    found = simplified(graph(), command=program(EDIT.format(edit=edit)))
    assert ["b0", "b1"] == [n.input[2] for n in found.graph.node if n.op_type == "Conv"]
    assert "b1" in {tensor.name for tensor in found.graph.initializer}


def test_the_simplifier_ignores_files_of_the_current_directory(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with an onnx.py in it is no obstacle."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "onnx.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert 7 == len(simplified(graph(), command=SIMPLIFIER).graph.node)


def test_a_crash_by_signal_is_named() -> None:
    """A simplifier killed by a signal is an environment error that gives the signal's number."""
    with pytest.raises(EnvironmentLackError, match="onnxsim crashed with signal 11"):
        simplified(graph(), command=program("import os; os.kill(os.getpid(), 11)"))


def test_a_hang_is_stopped() -> None:
    """After the time limit the simplifier is killed and the limit is named."""
    start = time.monotonic()
    with pytest.raises(EnvironmentLackError, match=r"did not end within 0\.5 s and was stopped"):
        simplified(graph(), timeout_s=0.5, command=program("import time; time.sleep(60)"))
    assert time.monotonic() - start < 20


def test_a_failure_passes_on_its_last_line() -> None:
    """A non-zero exit is a failed gate with the simplifier's own last line."""
    command = program("print('context', file=sys.stderr); sys.exit('unsupported operator Foo')")
    with pytest.raises(GateFailedError, match=r"^onnxsim failed: unsupported operator Foo$"):
        simplified(graph(), command=command)


def test_a_silent_failure_says_so() -> None:
    """A non-zero exit without a word is reported as having no message."""
    with pytest.raises(GateFailedError, match=r"^onnxsim failed: no message$"):
        simplified(graph(), command=program("sys.exit(3)"))


def test_undecodable_output_does_not_hide_the_failure() -> None:
    """Bytes that are no UTF-8 on stderr still end in the clear error."""
    command = program("sys.stderr.buffer.write(b'bad \\xff\\xfe bytes'); sys.exit(1)")
    with pytest.raises(GateFailedError, match="onnxsim failed: bad"):
        simplified(graph(), command=command)


def test_a_missing_onnxsim_says_how_to_install_it() -> None:
    """Without the library the error names it and the extra."""
    with pytest.raises(EnvironmentLackError, match=r"No module named 'no_sim'.*\[export\]"):
        simplified(graph(), command=program("import no_sim"))


def test_a_program_that_cannot_start_is_an_environment_error() -> None:
    """A command that does not exist is reported, not raised as OSError."""
    with pytest.raises(EnvironmentLackError, match=r"onnxsim cannot be started: .*no-such-program"):
        simplified(graph(), command=("/no-such-program",))


def test_writing_nothing_is_an_error() -> None:
    """Exit 0 without a graph is no success."""
    with pytest.raises(GateFailedError, match="without writing a graph"):
        simplified(graph(), command=program("pass"))


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xffgarbage" * 50, b"not a graph\n"], ids=["empty", "bytes", "text"]
)
def test_garbage_is_an_invalid_graph(content: bytes) -> None:
    """What cannot be decoded or checked as ONNX is refused in one line."""
    command = program(f"open(sys.argv[2], 'wb').write({content!r})")
    with pytest.raises(GateFailedError, match=r"onnxsim wrote an invalid graph: .") as caught:
        simplified(graph(), command=command)
    assert "\n" not in str(caught.value)


def test_changed_weights_are_a_wrong_result() -> None:
    """A graph that computes something else is refused with the size of the error."""
    edit = (
        "t = model.graph.initializer[0]\n"
        "t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * np.float32(1.01), t.name))"
    )
    with pytest.raises(GateFailedError, match=r"computes something else: logits differs by 0\.0"):
        simplified(graph(), command=program(EDIT.format(edit=edit)))


def test_nan_is_a_wrong_result() -> None:
    """A graph that answers NaN does not slip through the comparison."""
    edit = (
        "t = model.graph.initializer[0]\n"
        "t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(t) * np.float32('nan'), t.name))"
    )
    with pytest.raises(GateFailedError, match="logits differs by nan"):
        simplified(graph(), command=program(EDIT.format(edit=edit)))


def test_renamed_outputs_are_refused() -> None:
    """The error says what the output was called and what it is called now."""
    edit = "model.graph.node[-1].output[0] = model.graph.output[0].name = 'scores'"
    expected = (
        r"changed the graph's outputs from logits FLOAT \[batch, 2\] to scores FLOAT \[batch, 2\]"
    )
    with pytest.raises(GateFailedError, match=expected):
        simplified(graph(), command=program(EDIT.format(edit=edit)))


def test_a_fixed_batch_axis_is_refused() -> None:
    """The same names with another shape are another interface."""
    edit = "model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1"
    with pytest.raises(GateFailedError, match=r"inputs from .*\[batch, 3, 8, 8\] to .*\[1, 3, 8"):
        simplified(graph(), command=program(EDIT.format(edit=edit)))


def test_a_graph_that_cannot_run_is_refused() -> None:
    """A graph that passes the checker and fails in ONNX Runtime is a failed gate."""
    edit = (
        "t = model.graph.initializer[2]\n"
        "t.CopyFrom(numpy_helper.from_array(np.zeros((2, 5), np.float32), t.name))"
    )
    with pytest.raises(GateFailedError, match="ONNX Runtime"):
        simplified(graph(), command=program(EDIT.format(edit=edit)))


def test_a_full_disk_is_no_fault_of_the_graph() -> None:
    """The simplifier ends with the system's number, and whoever owns the folder names it."""
    with pytest.raises(OSError, match="No space left on device"):
        simplified(graph(), command=program("sys.exit(28)"))


WAITING = """
import time
from exporter.simplify import started_simplifier
with started_simplifier() as simplifier:
    simplifier.process.stdout.readline()
    print(simplifier.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it")
def test_a_killed_parent_takes_the_simplifier_with_it(tmp_path: Path) -> None:
    """SIGKILL cannot be handled: the program asked the kernel before it did anything else."""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True, env=environment
    )
    with parent:
        assert parent.stdout is not None
        simplifier = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 60
    while simplifier.is_running() and simplifier.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the simplifier works on"
        time.sleep(0.02)
    for left in tmp_path.iterdir():
        shutil.rmtree(left)
