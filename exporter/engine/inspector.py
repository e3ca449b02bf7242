"""From the JSON of TensorRT's engine inspector to the layer table that `inventory` counts.

The shape is that of the documentation's "Engine Inspector" at detailed verbosity, TensorRT 8.6 to
11; one object a layer::

    {"Layers": [{"Name": "stage0.conv + stage0.relu", "LayerType": "CaskConvolution",
      "Inputs":  [{"Name": "x", "Dimensions": [1,3,64,64], "Format/Datatype": "... Int8 ..."}],
      "Outputs": [...], "ParameterType": "Convolution", "Weights": {"Type": "Int8", "Count": 1296},
      "Activation": "RELU", "TacticName": "sm80_xmma_fprop_i8i8_i8i32_f32_...",
      "Metadata": "[ONNX Layer: stage0.conv]\\u001e[ONNX Layer: stage0.relu]"}, ...]}

1. ``Format/Datatype`` names a type amid a layout, and says "N/A due to dynamic shapes" where the
   batch is open; TensorRT 11 splits the field. The type is then read from the weights, and where a
   layer tells none, from the name of its kernel.
2. ``Metadata`` names the ONNX nodes; where it is empty, as in 8.6, the layer's own name does, its
   parts joined by `` + ``, pointwise ones within ``PWN(...)``. Copies between layouts are named
   after the layer they serve and stem from no node.
3. From 10 on, kernels of the other code generator are listed as TensorRT-RTX lists them: types such
   as ``correlation`` and ``fusion``, and ``Constants`` in place of ``Weights``.
4. What runs on a DLA is one layer of type ``DLA``, whose content is not told.

Built on documents: no engine of full TensorRT was at hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from exporter.engine.build_log import Layer, OnnxNode, TensorType

UNKNOWN = ""
"""The data type of a tensor of which none is told."""

DLA_LAYER = "DLA"
_COPY = "Reformat"
_FORMAT_KEYS = ("Format/Datatype", "Format/DataType", "DataType", "Datatype", "Format")
_TYPES = (
    (re.compile(r"int8", re.IGNORECASE), "Int8"),
    (re.compile(r"bf16|bfloat16", re.IGNORECASE), "BFloat16"),
    (re.compile(r"fp8|float8", re.IGNORECASE), "FP8"),
    (re.compile(r"fp16|half|float16", re.IGNORECASE), "Half"),
    (re.compile(r"fp32|float", re.IGNORECASE), "Float"),
)
_KERNELS = (
    (re.compile(r"i8i8|i8i32|imma|int8", re.IGNORECASE), "Int8"),
    (re.compile(r"bf16", re.IGNORECASE), "BFloat16"),
    (re.compile(r"e4m3|fp8", re.IGNORECASE), "FP8"),
    (re.compile(r"f16f16|hmma|h884|h1688|h16816|fp16", re.IGNORECASE), "Half"),
    (re.compile(r"f32f32|tf32|sgemm|scudnn|fp32", re.IGNORECASE), "Float"),
)
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\s]*(?:\[ONNX Layer: |$))")
_POINTWISE = re.compile(r"PWN\((.*)\)")


def read_inspection(text: str) -> tuple[Layer, ...]:
    """The layers of the inspector's JSON; empty if it holds none or is no such JSON."""
    try:
        content = json.loads(text, strict=False)
    except ValueError:
        return ()
    layers = content.get("Layers") if isinstance(content, Mapping) else None
    if not isinstance(layers, list):
        return ()
    # Below detailed verbosity a layer is its name alone, which tells nothing to count.
    return tuple(_layer(entry) for entry in layers if isinstance(entry, Mapping))


def with_network_origins(
    layers: tuple[Layer, ...], nodes: tuple[OnnxNode, ...]
) -> tuple[Layer, ...]:
    """The same layers, their origins reduced to nodes of the network where it is known.

    Parts of a layer's name are guesses: only those that are nodes of the network count.
    """
    known = {node.name for node in nodes}
    if not known:
        return layers
    return tuple(
        Layer(
            name=layer.name,
            type=layer.type,
            inputs=layer.inputs,
            constants=layer.constants,
            outputs=layer.outputs,
            tactic=layer.tactic,
            onnx_names=layer.onnx_names & known,
        )
        for layer in layers
    )


def _layer(entry: Mapping[str, Any]) -> Layer:
    tactic = str(entry.get("TacticName", ""))
    constants = _weights(entry) or tuple(map(_tensor, _objects(entry.get("Constants"))))
    return Layer(
        name=str(entry.get("Name", "")),
        type=str(entry.get("LayerType", "")),
        inputs=tuple(_tensor(tensor) for tensor in _objects(entry.get("Inputs"))),
        constants=constants or _from_kernel(tactic),
        outputs=tuple(_tensor(tensor) for tensor in _objects(entry.get("Outputs"))),
        tactic=tactic,
        onnx_names=_origins(entry),
    )


def _objects(value: object) -> Iterable[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _tensor(entry: Mapping[str, Any]) -> TensorType:
    words = " ".join(str(entry[key]) for key in _FORMAT_KEYS if key in entry)
    shape = entry.get("Dimensions")
    return TensorType(
        name=str(entry.get("Name", "")),
        datatype=_type_in(words, _TYPES),
        shape=tuple(int(n) for n in shape) if isinstance(shape, list) else (),
    )


def _type_in(words: str, patterns: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    return next((name for pattern, name in patterns if pattern.search(words)), UNKNOWN)


def _weights(entry: Mapping[str, Any]) -> tuple[TensorType, ...]:
    weights = entry.get("Weights")
    if not isinstance(weights, Mapping) or not weights.get("Count"):
        return ()
    datatype = _type_in(str(weights.get("Type", "")), _TYPES)
    return (TensorType(name="weights", datatype=datatype, shape=(int(weights["Count"]),)),)


def _from_kernel(tactic: str) -> tuple[TensorType, ...]:
    datatype = _type_in(tactic, _KERNELS)
    return (TensorType(name="weights", datatype=datatype, shape=(1,)),) if datatype else ()


def _origins(entry: Mapping[str, Any]) -> frozenset[str]:
    if entry.get("LayerType") == _COPY:
        return frozenset()
    named = _ORIGIN.findall(str(entry.get("Metadata", "")))
    if named:
        return frozenset(named)
    parts = str(entry.get("Name", "")).split(" + ")
    inner = (_POINTWISE.fullmatch(part.strip()) for part in parts)
    return frozenset(
        (match[1] if match else part).strip() for match, part in zip(inner, parts, strict=True)
    )
