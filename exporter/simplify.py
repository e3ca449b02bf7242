"""onnxsim, run so that a crash, a hang or a wrong result is an error and never a warning.

The simplifier is native code: it runs in a process of its own, with a time limit. Its result is
accepted only if it has the same inputs and outputs, passes onnx's checker and computes the same on
the samples. Names and metadata are the input's: onnxsim stores equal tensors once and writes a
diary into the metadata, both of which are undone.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from exporter.errors import EnvironmentLackError, GateFailedError
from exporter.localization import GraphPair, localize
from exporter.onnx_runner import Batch, FloatArray, OnnxRunner
from exporter.private_folder import require_space, scratch_folder

# The current directory is taken off the path, because its files could shadow the libraries. The
# process ends with its parent, also where that is killed; if it was killed before the kernel was
# told so, nobody reads the line.
_PROGRAM = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    print("started", flush=True)
sys.path = [folder for folder in sys.path if folder]
import onnx, onnxsim
model, ok = onnxsim.simplify(onnx.load(sys.argv[1]), check_n=0)
if not ok:
    sys.exit("onnxsim reports that its result differs from its input")
try:
    onnx.save(model, sys.argv[2])
except OSError as error:
    sys.exit(error.errno)
"""
SIMPLIFIER = (sys.executable, "-c", _PROGRAM)
MAX_RELATIVE_ERROR = 1e-4
"""Of an output's range: both graphs are float32 and differ at most in the order of additions."""


def simplify(
    model: onnx.ModelProto,
    samples: Sequence[Batch],
    *,
    timeout_s: float = 300.0,
    command: Sequence[str] = SIMPLIFIER,
) -> onnx.ModelProto:
    """Return the simplified graph.

    ``samples`` are small real batches, one for each image size that matters. ``command`` is the
    program that reads the graph at its first further argument and writes the simplified one at its
    second.

    Raises:
        OSError: if the disk is full.
        EnvironmentLackError: if the simplifier is missing, crashes or does not end in time.
        GateFailedError: if its result is no valid graph or computes something else.
    """
    with scratch_folder("simplify") as folder:
        source, target = folder / "in.onnx", folder / "out.onnx"
        onnx.save(model, source)
        _run([*command, str(source), str(target)], timeout_s, folder)
        if not target.is_file():
            raise GateFailedError("onnxsim ended without an error and without writing a graph")
        try:
            simplified = onnx.load(target)
            onnx.checker.check_model(simplified)
        except Exception as error:
            # protobuf's decoder and onnx's checker raise classes of their native libraries.
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GateFailedError(f"onnxsim wrote an invalid graph: {first_line}") from error
    _restore_parameters(model, simplified)
    onnx.helper.set_model_props(simplified, {p.key: p.value for p in model.metadata_props})
    del simplified.graph.value_info[:]
    _check_same_interface(model, simplified)
    _check_same_function(model, simplified, samples)
    return simplified


def _run(command: Sequence[str], timeout_s: float, folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EnvironmentLackError(
            f"onnxsim did not end within {timeout_s:g} s and was stopped"
        ) from error
    except OSError as error:
        raise EnvironmentLackError(f"onnxsim cannot be started: {error}") from error
    require_space(done.returncode, folder)
    if done.returncode < 0:
        raise EnvironmentLackError(f"onnxsim crashed with signal {-done.returncode}")
    if done.returncode > 0:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        if "No module named" in last:
            raise EnvironmentLackError(f"{last}; pip install 'repvgg-exporter[export]'")
        raise GateFailedError(f"onnxsim failed: {last}")


def _restore_parameters(model: onnx.ModelProto, simplified: onnx.ModelProto) -> None:
    """Give every node of ``simplified`` its own parameters again, under their old names."""
    known = {tensor.name for tensor in model.graph.initializer}
    parameters = {tensor.name: tensor for tensor in simplified.graph.initializer}
    names = {node.name: list(node.input) for node in model.graph.node if node.name}
    own: dict[str, onnx.TensorProto] = {}
    for node in simplified.graph.node:
        before = names.get(node.name, [])
        for index, name in enumerate(node.input):
            if name not in parameters:
                continue
            restored = before[index] if index < len(before) and before[index] in known else name
            own[restored] = onnx.TensorProto()
            own[restored].CopyFrom(parameters[name])
            own[restored].name = node.input[index] = restored
    del simplified.graph.initializer[:]
    simplified.graph.initializer.extend(own.values())


def _check_same_interface(model: onnx.ModelProto, simplified: onnx.ModelProto) -> None:
    for kind in ("input", "output"):
        before = [_signature(value) for value in getattr(model.graph, kind)]
        after = [_signature(value) for value in getattr(simplified.graph, kind)]
        if before != after:
            raise GateFailedError(
                f"onnxsim changed the graph's {kind}s from {', '.join(before)} to "
                f"{', '.join(after) or 'none'}"
            )


def _check_same_function(
    model: onnx.ModelProto, simplified: onnx.ModelProto, samples: Sequence[Batch]
) -> None:
    before, after = OnnxRunner(model), OnnxRunner(simplified)
    for sample in samples:
        expected, found = before.run(sample), after.run(sample)
        for name in before.output_names:
            try:
                _check_same_values(name, expected[name], found[name])
            except GateFailedError as error:
                pair = GraphPair(reference="onnx", good=model, bad=simplified)
                culprit = localize("simplified", pair, sample)
                if culprit is None:
                    raise
                raise GateFailedError(
                    f"{error}; {culprit.sentence}", localization=culprit.to_json()
                ) from error


def _check_same_values(name: str, expected: FloatArray, found: FloatArray) -> None:
    if expected.shape != found.shape:
        raise GateFailedError(
            f"onnxsim's graph computes {name} {list(found.shape)}, expected {list(expected.shape)}"
        )
    span = float(np.ptp(expected)) or 1.0
    error = float(np.max(np.abs(expected - found))) / span
    if not error <= MAX_RELATIVE_ERROR:
        raise GateFailedError(
            f"onnxsim's graph computes something else: {name} differs by {error:.2g} of its "
            f"range, at most {MAX_RELATIVE_ERROR:g} is rounding"
        )


def _signature(value: onnx.ValueInfoProto) -> str:
    """``images FLOAT [batch, 3, 64, 64]``."""
    tensor = value.type.tensor_type
    sizes = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
    return f"{value.name} {kind} [{', '.join(sizes)}]"
