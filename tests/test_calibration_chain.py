"""Rescaling a chain is exact, whatever its convolutions are and wherever its gates stand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.chain import Chain, ChainError, Classifier, ConvStage, Gate, rescale
from calibration.convolution import channel_first, convolve, finish, run_chain
from calibration.effects import gradients

CHANNELS = 6
IMAGES = np.random.default_rng(9).normal(0, 1, (4, CHANNELS, 7, 9)).astype(np.float32)


def stage_of(index: int, groups: int, kernel: int, gate: str, relu: bool) -> ConvStage:
    rng = np.random.default_rng(index)
    weight = rng.normal(0, 1, (CHANNELS, CHANNELS // groups, kernel, kernel))
    found = Gate(
        down=rng.normal(0, 2, (3, CHANNELS)),
        down_bias=rng.normal(0, 1, 3),
        up=rng.normal(0, 1, (CHANNELS, 3)),
        up_bias=rng.normal(0, 1, CHANNELS),
        after_relu=gate == "after",
    )
    return ConvStage(
        name=f"stage {index}",
        weight=weight * np.sqrt(2 / weight[0].size),
        bias=rng.normal(0, 0.3, CHANNELS),
        groups=groups,
        padding=(kernel // 2,) * 4,
        gate=found if gate else None,
        relu=relu,
    )


STAGE = st.tuples(
    st.sampled_from([1, 2, CHANNELS]),
    st.sampled_from([1, 3]),
    st.sampled_from(["", "before", "after"]),
    st.booleans(),
)


def chain_of(kinds: list[tuple[int, int, str, bool]]) -> Chain:
    rng = np.random.default_rng(7)
    stages = tuple(stage_of(index, *kind) for index, kind in enumerate(kinds))
    weight, bias = rng.normal(0, 1, (5, CHANNELS)), rng.normal(0, 1, 5)
    return Chain(stages=stages, classifier=Classifier(weight=weight, bias=bias))


CHAINS = st.builds(chain_of, st.lists(STAGE, min_size=1, max_size=4))


def exact_stage(stage: ConvStage, x: np.ndarray) -> np.ndarray:
    """The definition in float64, ``[N, C, H, W]``: a sum over taps and groups."""
    taps = stage.weight.shape[2]
    margin = taps // 2
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    y = np.zeros((len(x), stage.groups, CHANNELS // stage.groups, height, width))
    kernel = stage.weight.reshape(stage.groups, -1, *stage.weight.shape[1:])
    for i in range(taps):
        for j in range(taps):
            window = padded[:, :, i : i + height, j : j + width]
            split = window.reshape(len(x), stage.groups, -1, height, width)
            y += np.einsum("goi,ngihw->ngohw", kernel[..., i, j], split)
    y = y.reshape(len(x), CHANNELS, height, width) + stage.bias[:, None, None]
    gate = stage.gate
    if gate is not None and not gate.after_relu:
        y = y * exact_opening(gate, y)
    if stage.relu:
        y = np.maximum(y, 0)
    if gate is not None and gate.after_relu:
        y = y * exact_opening(gate, y)
    return y


def exact_opening(gate: Gate, y: np.ndarray) -> np.ndarray:
    hidden = np.maximum(y.mean(axis=(2, 3)) @ gate.down.T + gate.down_bias, 0)
    return 1 / (1 + np.exp(-(hidden @ gate.up.T + gate.up_bias)))[:, :, None, None]


def exact_logits(chain: Chain) -> np.ndarray:
    x = IMAGES.astype(np.float64)
    for stage in chain.stages:
        x = exact_stage(stage, x)
    return x.mean(axis=(2, 3)) @ chain.classifier.weight.T + chain.classifier.bias


@settings(max_examples=40, deadline=None)
@given(CHAINS, st.integers(0, 99))
def test_rescaling_changes_no_logit(chain: Chain, seed: int) -> None:
    """By 2^U(-4, 4) a channel: 1e-10 of the range in float64, 1e-5 in the executor's float32."""
    rng = np.random.default_rng(seed)
    moved = rescale(chain, [2.0 ** rng.uniform(-4, 4, CHANNELS) for _ in chain.stages])
    expected = exact_logits(chain)
    span = float(np.ptp(expected))
    assert np.abs(exact_logits(moved) - expected).max() <= 1e-10 * span
    assert np.abs(run_chain(chain, IMAGES) - expected).max() <= 1e-5 * span
    assert np.abs(run_chain(moved, IMAGES) - expected).max() <= 1e-5 * span


def test_a_gate_that_keeps_its_weights_changes_the_logits() -> None:
    """The columns of its first matrix have to take the scale up, before and after the ReLU."""
    for gate in ("before", "after"):
        chain = chain_of([(1, 3, gate, True)])
        moved = rescale(chain, [np.full(CHANNELS, 4.0)])
        stale = replace(moved.stages[0], gate=chain.stages[0].gate)
        moved = replace(moved, stages=(stale,))
        expected = exact_logits(chain)
        assert np.abs(exact_logits(moved) - expected).max() > 1e-3 * np.ptp(expected)


def test_the_gate_in_front_of_the_relu_is_another_network() -> None:
    """Its place is part of the chain."""
    before, after = (chain_of([(1, 3, gate, True)]) for gate in ("before", "after"))
    found, other = run_chain(before, IMAGES), run_chain(after, IMAGES)
    assert np.abs(found - other).max() > 1e-2 * np.ptp(found)


def result_of(stage: ConvStage, x: np.ndarray) -> np.ndarray:
    return np.asarray(convolve(stage, x) + stage.bias.astype(np.float32)[:, None, None, None])


@pytest.mark.parametrize("gate", ["", "before", "after"])
def test_gradients_are_those_of_the_logits(gate: str) -> None:
    """With the gates' values held, a small change of a result moves the logits as predicted."""
    chain = chain_of([(1, 3, gate, True), (2, 3, gate, True), (1, 1, gate, False)])
    held: list[np.ndarray] = []
    results: list[np.ndarray] = []
    image = IMAGES[:1]
    x = start = channel_first(image)
    for stage in chain.stages:
        y = result_of(stage, x)
        results.append(y.copy())
        bare = finish(replace(stage, gate=None), y.copy())
        x = finish(stage, y)
        held.append(np.divide(x, bare, out=np.zeros_like(x), where=bare != 0))

    def logits_from(index: int, y: np.ndarray) -> np.ndarray:
        x = start
        for place in range(index, len(chain.stages)):
            if place > index:
                y = result_of(chain.stages[place], x)
            x = finish(replace(chain.stages[place], gate=None), y.copy()) * held[place]
        return np.asarray(chain.classifier.weight @ x.mean(axis=(2, 3)).astype(np.float64))

    rng = np.random.default_rng(3)
    signs = np.random.default_rng(20260).choice(np.array([-1.0, 1.0]), size=(1, 5))
    steps = list(gradients(chain, image))
    assert len(chain.stages) == len(steps)
    for step in steps:
        error = 1e-3 * rng.normal(size=step.gradient.shape).astype(np.float32)
        y = results[step.index]
        moved = logits_from(step.index, y + error) - logits_from(step.index, y - error)
        expected = (signs.T * moved).sum(axis=0) / 2
        found = np.einsum("cnhw,cnhw->n", step.gradient, error)
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=1e-4)


def test_a_gate_must_fit_its_stage() -> None:
    """Matrices, biases and channels that do not fit are refused, and so is what is no number."""
    stage = stage_of(0, 1, 3, "after", relu=True)
    assert stage.gate is not None
    bad = {
        "two matrices": replace(stage.gate, up=np.ones((CHANNELS, 4))),
        "has 5 channels": replace(
            stage.gate, up=np.ones((5, 3)), down=np.ones((3, 5)), up_bias=np.ones(5)
        ),
        "biases do not fit": replace(stage.gate, up_bias=np.ones(3)),
        "NaN or infinite": replace(stage.gate, down=np.full((3, CHANNELS), np.nan)),
    }
    for words, gate in bad.items():
        with pytest.raises(ChainError, match=words):
            replace(stage, gate=gate)
