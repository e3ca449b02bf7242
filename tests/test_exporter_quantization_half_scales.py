"""A Q/DQ graph in half: the same integers, and scales that half can hold."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, numpy_helper

from exporter.errors import GateFailedError
from exporter.parity.comparison import compare
from exporter.quantization.half_nodes import in_half
from exporter.quantization.half_scales import to_half_scales
from exporter.running.onnx_runner import OnnxRunner

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
quantized (float[batch,2,6,6] images) => (float[batch,4] logits)
<float sx = {0.02}, int8 zx = {0}, int8[4] zw = {0, 0, 0, 0}>
{
    ["images.q"] xq = QuantizeLinear (images, sx, zx)
    ["images.dq"] xr = DequantizeLinear (xq, sx, zx)
    ["w.dq"] wr = DequantizeLinear <axis = 0> (wq, sw, zw)
    ["conv"] y = Conv <pads = [1,1,1,1]> (xr, wr, b)
    ["relu"] r = Relu (y)
    ["pool"] p = ReduceMean <axes = [2, 3], keepdims = 0> (r)
    ["fc"] logits = Gemm (p, v, c)
}
"""
NORMAL = np.float32(2.0**-14)


def graph(scales=(0.01, 0.02, 0.003, 0.01), *, seed=0) -> onnx.ModelProto:
    """One quantized convolution and a float head; the weight's integers reach from -127 to 127."""
    model = onnx.parser.parse_model(GRAPH)
    random = np.random.default_rng(seed)
    constants = {
        "wq": random.integers(-127, 128, (4, 2, 3, 3)).astype(np.int8),
        "sw": np.array(scales, np.float32),
        "b": random.standard_normal(4, np.float32) * 0.1,
        "v": random.standard_normal((4, 4), np.float32),
        "c": random.standard_normal(4, np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return model


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def images(count=3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 2, 6, 6), np.float32)


def test_everything_but_inputs_outputs_and_integers_is_half():
    """Opset 19, scalar scales still 0-d, int8 weights and zero points as they were."""
    made = to_half_scales(graph())
    assert (19, 9) == (made.opset_import[0].version, made.ir_version)
    found = constants(made)
    assert {np.dtype(np.float16), np.dtype(np.int8), np.dtype(np.int64)} >= {
        value.dtype for value in found.values()
    }
    assert ((), np.float16) == (found["sx"].shape, found["sx"].dtype)
    np.testing.assert_array_equal(constants(graph())["wq"], found["wq"])
    for value in (*made.graph.input, *made.graph.output):
        assert TensorProto.FLOAT == value.type.tensor_type.elem_type
    assert "Cast" == made.graph.node[0].op_type


def test_it_computes_what_the_float_graph_does():
    """Within half's rounding, judged without optimizations."""
    float_logits = OnnxRunner(graph())(images())
    half = OnnxRunner(to_half_scales(graph()), optimize=False)(images())
    assert compare(float_logits, half).sqnr_db > 50


def test_layers_that_are_half_already_stay_so():
    """The casts around them go; those of the input and the output are all that is left."""
    mixed = in_half(graph(), ["fc"])
    half = to_half_scales(mixed)
    assert ["images", "logits.half"] == [n.input[0] for n in half.graph.node if n.op_type == "Cast"]
    reference = OnnxRunner(mixed)(images())
    found = OnnxRunner(half, optimize=False)(images())
    assert compare(reference, found).sqnr_db > 50


@settings(deadline=None)
@given(arrays(np.float32, 4, elements=st.floats(2.0**-30, 2.0**-8, width=32)), st.integers(0, 9))
def test_small_scales_stay_numbers_of_half_and_weights_stay_near(scales, seed):
    """|q' t - q s| <= t / 2 where t was raised, 2^-11 of the weight elsewhere; |q'| <= |q|."""
    before = constants(graph(scales, seed=seed))
    after = constants(to_half_scales(graph(scales, seed=seed)))
    raised = after["sw"].astype(np.float64)
    assert (raised > 0).all()
    small = scales < NORMAL
    assert (raised[small] >= scales[small]).all()
    assert (np.abs(after["wq"].astype(int)) <= np.abs(before["wq"].astype(int))).all()
    shape = (4, 1, 1, 1)
    weight = before["wq"] * scales.astype(np.float64).reshape(shape)
    error = np.abs(after["wq"] * raised.reshape(shape) - weight)
    bound = np.where(small.reshape(shape), raised.reshape(shape) / 2, np.abs(weight) * 2.0**-11)
    assert (error <= bound * (1 + 1e-5)).all()


def test_a_scale_below_half_does_not_become_zero():
    """Plain rounding to half would make the whole channel vanish, and with it the network."""
    tiny = (3e-8, 0.02, 1e-6, 0.01)
    assert 0 == np.float16(2.9e-8)
    float_logits = OnnxRunner(graph(tiny))(images())
    half = OnnxRunner(to_half_scales(graph(tiny)), optimize=False)(images())
    assert np.isfinite(half).all()
    assert compare(float_logits, half).sqnr_db > 45


def test_a_small_activation_scale_is_raised_and_clips_no_earlier():
    """One scale for Q and DQ, raised once."""
    model = graph()
    (scale,) = [t for t in model.graph.initializer if t.name == "sx"]
    scale.CopyFrom(numpy_helper.from_array(np.array(1e-6, np.float32), "sx"))
    found = constants(to_half_scales(model))["sx"]
    assert np.float32(1e-6) <= found <= np.float32(1.1e-6)


def test_a_scale_beyond_half_is_named():
    """As a weight beyond half is."""
    with pytest.raises(GateFailedError, match="half overflow in sw: its values reach 100000, half"):
        to_half_scales(graph((0.01, 1e5, 0.01, 0.01)))
