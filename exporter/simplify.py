"""onnxsim, run so that a crash, a hang or a wrong result is an error and never a warning.

The simplifier is native code: it runs in a process of its own, with a time limit. Its result is
accepted only if it has the same inputs and outputs, passes onnx's checker and computes the same on
the samples. Names and metadata are the input's: onnxsim stores equal tensors once and writes a
diary into the metadata, both of which are undone.

Importing onnxsim takes longer than simplifying a RepVGG: a :class:`Simplifier` that is started
before there is a graph imports while others import and compute.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from exporter.errors import EnvironmentLackError, GateFailedError
from exporter.files.private_folder import require_space, scratch_folder
from exporter.localization.graphs import GraphPair, localize
from exporter.running.onnx_runner import Batch, FloatArray, OnnxRunner

# The current directory is taken off the path, because its files could shadow the libraries. The
# process ends with its parent, also where that is killed; if it was killed before the kernel was
# told so, nobody reads the line. Unloading the libraries would take half a second.
_PROGRAM = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    print("started", flush=True)
sys.path = [folder for folder in sys.path if folder]
import onnx, onnxsim
if not sys.stdin.readline():
    sys.exit("nobody brought a graph")
model, ok = onnxsim.simplify(onnx.load(sys.argv[1]), check_n=0)
if not ok:
    sys.exit("onnxsim reports that its result differs from its input")
try:
    onnx.save(model, sys.argv[2])
except OSError as error:
    sys.exit(error.errno)
os._exit(0)
"""
SIMPLIFIER = (sys.executable, "-c", _PROGRAM)
MAX_RELATIVE_ERROR = 1e-4
"""Of an output's range: both graphs are float32 and differ at most in the order of additions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simplifier:
    """A running onnxsim, which waits for one graph in its private ``folder``."""

    process: subprocess.Popen[str]
    folder: Path

    def run(self, model: onnx.ModelProto, timeout_s: float) -> onnx.ModelProto:
        """What onnxsim makes of ``model``, a valid graph and otherwise unchecked.

        Raises:
            OSError: if the disk is full.
            EnvironmentLackError: if the simplifier is missing, crashes or does not end in time.
            GateFailedError: if it fails, or its result is no valid graph.
        """
        source, target = _paths(self.folder)
        onnx.save(model, source)
        self._finish(timeout_s)
        if not target.is_file():
            raise GateFailedError("onnxsim ended without an error and without writing a graph")
        try:
            simplified = onnx.load(target)
            onnx.checker.check_model(simplified)
        except Exception as error:
            # protobuf's decoder and onnx's checker raise classes of their native libraries.
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise GateFailedError(f"onnxsim wrote an invalid graph: {first_line}") from error
        return simplified

    def _finish(self, timeout_s: float) -> None:
        """Say that the graph is there, and wait for the end."""
        try:
            _, errors = self.process.communicate("\n", timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise EnvironmentLackError(
                f"onnxsim did not end within {timeout_s:g} s and was stopped"
            ) from error
        code = self.process.returncode
        require_space(code, self.folder)
        if code < 0:
            raise EnvironmentLackError(f"onnxsim crashed with signal {-code}")
        if code > 0:
            last = (errors.strip() or "no message").splitlines()[-1]
            if "No module named" in last:
                raise EnvironmentLackError(f"{last}; pip install 'repvgg-exporter[export]'")
            raise GateFailedError(f"onnxsim failed: {last}")


@contextmanager
def started_simplifier(command: Sequence[str] = SIMPLIFIER) -> Iterator[Simplifier]:
    """A process that will read one graph; on leaving it is dead and its folder gone.

    ``command`` is a program that waits for a line on its standard input, then reads the graph at
    its first further argument and writes the simplified one at its second.

    Raises:
        EnvironmentLackError: if it cannot be started.
    """
    with scratch_folder("simplify") as folder:
        try:
            process = subprocess.Popen(
                [*command, *map(str, _paths(folder))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:
            raise EnvironmentLackError(f"onnxsim cannot be started: {error}") from error
        with process:
            try:
                yield Simplifier(process=process, folder=folder)
            finally:
                process.kill()


def simplify(
    model: onnx.ModelProto,
    samples: Sequence[Batch],
    simplifier: Simplifier,
    *,
    timeout_s: float = 300.0,
) -> onnx.ModelProto:
    """Return the simplified graph: ``model`` itself where there is nothing to simplify.

    ``samples`` are small real batches, one for each image size that matters.

    Raises:
        GateFailedError: if the result has another interface or computes something else.
        Others: as :meth:`Simplifier.run`.
    """
    simplified = simplifier.run(model, timeout_s)
    _restore_parameters(model, simplified)
    onnx.helper.set_model_props(simplified, {p.key: p.value for p in model.metadata_props})
    del simplified.graph.value_info[:]
    if (model.opset_import, model.graph) == (simplified.opset_import, simplified.graph):
        return model
    _check_same_interface(model, simplified)
    _check_same_function(model, simplified, samples)
    return simplified


def _paths(folder: Path) -> tuple[Path, Path]:
    """Of the graph before and after."""
    return folder / "in.onnx", folder / "out.onnx"


def _restore_parameters(model: onnx.ModelProto, simplified: onnx.ModelProto) -> None:
    """Give every node of ``simplified`` its own parameters again: old names, in the old order."""
    places = {tensor.name: place for place, tensor in enumerate(model.graph.initializer)}
    parameters = {tensor.name: tensor for tensor in simplified.graph.initializer}
    names = {node.name: list(node.input) for node in model.graph.node if node.name}
    own: dict[str, onnx.TensorProto] = {}
    for node in simplified.graph.node:
        before = names.get(node.name, [])
        for index, name in enumerate(node.input):
            if name not in parameters:
                continue
            restored = before[index] if index < len(before) and before[index] in places else name
            own[restored] = onnx.TensorProto()
            own[restored].CopyFrom(parameters[name])
            own[restored].name = node.input[index] = restored
    del simplified.graph.initializer[:]
    order = sorted(own, key=lambda name: places.get(name, len(places)))
    simplified.graph.initializer.extend(own[name] for name in order)


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
