"""bfloat16 graphs computed in float32: rounded where the graph stores, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from exporter.graph import with_outputs
from exporter.precision import BFLOAT16, to_type
from exporter.running.emulation import emulated
from exporter.running.onnx_runner import OnnxRunner

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[batch,3,24,24] images) => (float[batch,10] logits) {
    x0 = Conv <pads = [1,1,1,1], strides = [2,2]> (images, w0, b0)
    y0 = Relu (x0)
    x1 = Conv <pads = [1,1,1,1], group = 4> (y0, w1, b1)
    y1 = Relu (x1)
    p = GlobalAveragePool (y1)
    f = Flatten (p)
    logits = Gemm <transB = 1> (f, w2, b2)
}
"""
SHAPES = {
    "w0": (32, 3, 3, 3), "b0": (32,), "w1": (64, 8, 3, 3), "b1": (64,), "w2": (10, 64), "b2": (10,),
}  # fmt: skip
IMAGES = np.random.default_rng(1).standard_normal((6, 3, 24, 24)).astype(np.float32)


@pytest.fixture(scope="module")
def narrow() -> onnx.ModelProto:
    """The bfloat16 graph of a chain with a grouped convolution."""
    model = onnx.parser.parse_model(CHAIN)
    generator = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = 0.2 * generator.standard_normal(shape)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return to_type(BFLOAT16, model)


def bf16_by_bits(values: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, by integer arithmetic on the bits of float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    kept = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    return kept.astype(np.uint32).view(np.float32).reshape(np.shape(values))


def test_each_layer_is_torchs_own_bfloat16_but_for_sums_at_a_tie(narrow: onnx.ModelProto) -> None:
    """Given the same inputs, nearly all outputs of a layer are equal; others are one step apart."""
    weights = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float32)).bfloat16()
        for tensor in narrow.graph.initializer
    }
    names = ["images.bf16", "x0", "y0", "x1", "y1", "p", "f", "logits.bf16"]
    found = OnnxRunner(with_outputs(emulated(narrow), names), optimize=False).run((IMAGES,))
    given_ = {name: torch.from_numpy(values).bfloat16() for name, values in found.items()}

    def conv(x: str, layer: int, stride: int, groups: int) -> torch.Tensor:
        weight, bias = weights[f"w{layer}"], weights[f"b{layer}"]
        return torch.nn.functional.conv2d(given_[x], weight, bias, stride, 1, 1, groups)

    expected = {
        "images.bf16": torch.from_numpy(IMAGES).bfloat16(),
        "x0": conv("images.bf16", 0, 2, 1),
        "y0": given_["x0"].relu(),
        "x1": conv("y0", 1, 1, 4),
        "y1": given_["x1"].relu(),
        "p": given_["y1"].mean((2, 3), keepdim=True),
        "f": given_["p"].flatten(1),
        "logits.bf16": torch.nn.functional.linear(given_["f"], weights["w2"], weights["b2"]),
    }
    for name, values in expected.items():
        wanted = values.float().numpy()
        differ = found[name] != wanted
        assert differ.mean() <= 0.002, name
        step = 2.0**-7 * np.abs(wanted)
        # Sums that cancel are compared with what was summed up.
        step = np.maximum(step, 2.0**-16 * np.abs(wanted).max())
        assert (np.abs(found[name] - wanted) <= step).all(), name


def test_the_first_layer_is_the_formula_of_the_docstring(narrow: onnx.ModelProto) -> None:
    """Rounded inputs and weights, a float64 sum, one rounding: equal but for a tie now and then."""
    run = OnnxRunner(with_outputs(emulated(narrow), ["x0", "x0.exact"]), optimize=False).run
    found = run((IMAGES,))
    tensors = {t.name: numpy_helper.to_array(t).astype(float) for t in narrow.graph.initializer}
    padded = np.pad(bf16_by_bits(IMAGES).astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))[:, :, ::2, ::2]
    exact = np.einsum("nchwij,ocij->nohw", windows, tensors["w0"]) + tensors["b0"][:, None, None]
    assert found["x0.exact"] == pytest.approx(exact, abs=1e-5)
    assert np.array_equal(bf16_by_bits(found["x0.exact"]), found["x0"])
    assert (bf16_by_bits(exact.astype(np.float32)) != found["x0"]).mean() <= 0.002


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100),
        min_size=1,
        max_size=64,
    )
)
def test_rounding_is_to_the_nearest_ties_to_even(values: list[float]) -> None:
    """ONNX Runtime's casts do what the bits say, zero, subnormals and both signs included."""
    array = np.array([values], np.float32)
    assert np.array_equal(bf16_by_bits(array), _identity()(array))


_RUNNERS: list[OnnxRunner] = []


def _identity() -> OnnxRunner:
    """The emulation of a bfloat16 graph that returns its input."""
    if not _RUNNERS:
        text = """
        <ir_version: 8, opset_import: ["" : 17]>
        same (float[batch,n] x) => (float[batch,n] y) { y = Identity (x) }
        """
        _RUNNERS.append(OnnxRunner(emulated(to_type(BFLOAT16, onnx.parser.parse_model(text)))))
    return _RUNNERS[0]


def test_every_stored_tensor_is_rounded_once(narrow: onnx.ModelProto) -> None:
    """Each node between the ends is followed by a cast to bfloat16 and one back."""
    types = [node.op_type for node in emulated(narrow).graph.node]
    rounding = ["Cast", "Cast"]
    expected = [
        *rounding,
        *(t for op in ("Conv", "Relu", "Conv", "Relu") for t in (op, *rounding)),
        *(t for op in ("GlobalAveragePool", "Flatten", "Gemm") for t in (op, *rounding)),
        "Cast",
    ]
    assert expected == types


def test_interface_and_names_stay_and_the_graph_is_untouched(narrow: onnx.ModelProto) -> None:
    """Inputs and outputs are the same; initializers hold the same numbers in float32."""
    before = narrow.SerializeToString()
    wide = emulated(narrow)
    assert before == narrow.SerializeToString()
    assert list(narrow.graph.input) == list(wide.graph.input)
    assert list(narrow.graph.output) == list(wide.graph.output)
    for old, new in zip(narrow.graph.initializer, wide.graph.initializer, strict=True):
        assert (old.name, TensorProto.FLOAT) == (new.name, new.data_type)
        assert np.array_equal(
            numpy_helper.to_array(old).astype(np.float32), numpy_helper.to_array(new)
        )
