"""ONNX Runtime's convolutions and transposed convolutions agree with numpy's."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calibration.chain import ChainError, ConvStage
from calibration.convolution import channel_first, convolve, fold, products
from exporter.quantization.onnx_kernels import OnnxKernels

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))
STAGES = st.builds(
    lambda seed, groups, kernel, stride, padding, dilation: ConvStage(
        name="c",
        weight=np.random.default_rng(seed).normal(size=(4, 4 // groups, *kernel)),
        bias=np.zeros(4),
        groups=groups,
        stride=stride,
        padding=padding,
        dilation=dilation,
    ),
    st.integers(0, 99),
    st.sampled_from([1, 2, 4]),
    PAIRS,
    PAIRS,
    st.tuples(*[st.integers(0, 2)] * 4),
    PAIRS,
)


@settings(max_examples=80, deadline=None)
@given(STAGES, st.tuples(st.integers(3, 9), st.integers(3, 9)), st.booleans())
def test_both_agree_with_numpy(stage: ConvStage, size: tuple[int, int], batched: bool) -> None:
    """For any stride, padding, dilation and groups, whatever the layout in memory."""
    try:
        rows, columns = stage.output_size(*size)
    except ChainError:
        assume(False)
    rng = np.random.default_rng(1)
    x = channel_first(rng.normal(size=(2, 4, *size)).astype(np.float32))
    gradient = rng.normal(size=(4, 2, rows, columns)).astype(np.float32)
    if batched:
        x = np.ascontiguousarray(x)
    kernels = OnnxKernels()
    np.testing.assert_allclose(kernels.convolution(stage)(x), convolve(stage, x), atol=1e-4)
    np.testing.assert_allclose(
        kernels.folding(stage)(gradient, x.shape), fold(stage, gradient, x.shape), atol=1e-4
    )


def test_results_are_the_same_every_time() -> None:
    """Two kernels give the same bits, for all images at once and for each by itself."""
    rng = np.random.default_rng(0)
    stage = ConvStage(
        name="c", weight=rng.normal(size=(32, 16, 3, 3)), bias=np.zeros(32), padding=(1,) * 4
    )
    x = channel_first(rng.normal(size=(5, 16, 14, 14)).astype(np.float32))
    first, second = (OnnxKernels().convolution(stage) for _ in range(2))
    alone = np.concatenate([second(x[:, i : i + 1]) for i in range(5)], axis=1)
    assert first(x).tolist() == second(x).tolist() == alone.tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(-128, 0), st.integers(1, 3))
def test_products_are_exact(seed: int, lowest: int, blocks: int) -> None:
    """Products of integers are those of 64-bit integers, signed or not, and numpy's."""
    rng = np.random.default_rng(seed)
    left = rng.integers(lowest, 128, (blocks, 3, 70000 // blocks)).astype(np.int8)
    right = rng.integers(-128, 128, (blocks, 70000 // blocks, 2)).astype(np.int8)
    exact = left.astype(np.int64) @ right.astype(np.int64)
    assert exact.tolist() == OnnxKernels().products(left, right).tolist()
    assert exact.tolist() == products(left, right).tolist()
