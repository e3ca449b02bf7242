"""From the text of a builder's verbose log to records, ONNX nodes and the layer table.

The log is a sequence of records ``[SEVERITY] message``; a message may span lines. Three kinds are
read here, all as TensorRT-RTX 1.7 prints them at detailed profiling verbosity:

1. ``NAME [Conv] inputs: [TENSOR -> (shape)[TYPE]], ...`` and ``... outputs: ...``, from the ONNX
   parser: which nodes exist and which ReLU reads which convolution.
2. ``Layers:`` and one line a layer: its type, the data types of its inputs, constants and outputs,
   and ``Metadata: [ONNX Layer: NAME]...``, the ONNX nodes that went into it.
3. ``Total Activation Memory: N bytes`` and ``Total Weights Memory: N bytes``.

Everything here is a pure function of text; nothing raises on a log that lacks a part.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
_NOISE = "catchCudaError"
"""Marks messages about the missing driver, which building does not need."""

_RECORD = re.compile(r"^\[(" + "|".join(SEVERITIES) + r")\] ", re.MULTILINE)
_NODE = re.compile(r"^(?P<name>.*) \[(?P<op>\w+)\] (?P<side>inputs|outputs): (?P<tensors>.*)$")
_NODE_TENSOR = re.compile(r"\[(?P<name>[^\[\]]+?) -> \(")
_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>.*?), StreamId: .*?Metadata: ?(?P<metadata>.*)$"
)
_LAYER_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\],.*? Datatype: (?P<type>\w+),"
)
_NEXT_ORIGIN = re.compile(r"\]\x1f?\[ONNX Layer: ")
"""Between the origins of a layer stands an unprintable unit separator."""

_MEMORY = re.compile(r"Total (?P<what>Activation|Weights) Memory: (?P<bytes>\d+) bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One message of the builder's logger."""

    severity: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxNode:
    """A node as the ONNX parser saw it."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """A tensor of the engine: data type (``Int8``, ``Half``, ``Float``, ...) and shape.

    An extent that the batch profile leaves open is -1.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements; meaningless with open extents."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One line of the layer table; ``onnx_names`` are the ONNX nodes it stems from."""

    name: str
    type: str
    inputs: tuple[TensorType, ...]
    constants: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]
    tactic: str
    onnx_names: frozenset[str]


def format_record(severity: str, message: str) -> str:
    """One log record as `read_records` reads it back, with its final line break."""
    return f"[{severity}] {message}\n"


def read_records(log: str) -> tuple[Record, ...]:
    """Split a log into its records; text before the first one is dropped."""
    starts = list(_RECORD.finditer(log))
    ends = [*(match.start() for match in starts), len(log)][1:]
    return tuple(
        Record(severity=match[1], message=log[match.end() : end].rstrip("\n"))
        for match, end in zip(starts, ends, strict=True)
    )


def without_noise(text: str) -> str:
    """``text`` without the lines that only say that there is no driver."""
    return "\n".join(line for line in text.splitlines() if _NOISE not in line).strip()


def messages(records: tuple[Record, ...], *severities: str) -> tuple[str, ...]:
    """Messages of these severities in order, each once, without the driver's noise."""
    found = (without_noise(r.message) for r in records if r.severity in severities)
    return tuple(dict.fromkeys(message for message in found if message))


def read_nodes(records: tuple[Record, ...]) -> tuple[OnnxNode, ...]:
    """The ONNX nodes in the order the parser met them."""
    nodes: list[OnnxNode] = []
    inputs: tuple[str, ...] = ()
    for record in records:
        match = _NODE.match(record.message)
        if match is None:
            continue
        tensors = tuple(found["name"] for found in _NODE_TENSOR.finditer(match["tensors"]))
        if match["side"] == "inputs":
            inputs = tensors
            continue
        nodes.append(OnnxNode(name=match["name"], op=match["op"], inputs=inputs, outputs=tensors))
        inputs = ()
    return tuple(nodes)


def read_layers(records: tuple[Record, ...]) -> tuple[Layer, ...]:
    """The layer table; empty if the log holds none."""
    lines = (
        line
        for record in records
        if record.message.startswith("Layers:")
        for line in record.message.split("\n")
    )
    return tuple(_layer(match) for match in map(_LAYER.match, lines) if match)


def _layer(match: re.Match[str]) -> Layer:
    metadata = match["metadata"].removeprefix("[ONNX Layer: ").removesuffix("]")
    return Layer(
        name=match["name"],
        type=match["type"],
        inputs=_tensors(match["inputs"]),
        constants=_tensors(match["constants"]),
        outputs=_tensors(match["outputs"]),
        tactic=match["tactic"],
        onnx_names=frozenset(filter(None, _NEXT_ORIGIN.split(metadata))),
    )


def _tensors(text: str) -> tuple[TensorType, ...]:
    return tuple(
        TensorType(
            name=match["name"],
            datatype=match["type"],
            shape=tuple(int(extent) for extent in match["shape"].split(",") if extent),
        )
        for match in _LAYER_TENSOR.finditer(text)
    )


def read_memory(records: tuple[Record, ...]) -> Mapping[str, int]:
    """Bytes of ``Activation`` and ``Weights`` memory, as far as the log states them."""
    found = (_MEMORY.search(record.message) for record in records if record.severity == "INFO")
    return {match["what"]: int(match["bytes"]) for match in found if match}
