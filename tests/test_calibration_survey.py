"""The float chain's run: its statistics and means, and how they move with the chain's scales."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.chain import Chain, Classifier, ConvStage, rescale
from calibration.convolution import channel_first, convolve, run_chain, run_stage
from calibration.moments import ChannelStatistics
from calibration.parallel import on_all_cores
from calibration.survey import observe_inputs, survey


def chain_of(seed: int = 0) -> Chain:
    rng = np.random.default_rng(seed)
    stages = tuple(
        ConvStage(
            name=f"s{index}",
            weight=rng.normal(0, 0.3, (6, 6, 3, 3)),
            bias=rng.normal(0, 0.1, 6),
            padding=(1, 1, 1, 1),
        )
        for index in range(3)
    )
    classifier = Classifier(weight=rng.normal(0, 1, (4, 6)), bias=np.zeros(4))
    return Chain(stages=stages, classifier=classifier)


IMAGES = np.random.default_rng(1).normal(0, 1, (10, 6, 8, 8)).astype(np.float32)


def test_a_survey_is_a_run_of_the_chain() -> None:
    """Logits, mean results and statistics are those of running the stages one by one."""
    chain = chain_of()
    found = survey(chain, IMAGES)
    assert run_chain(chain, IMAGES).tolist() == found.logits.tolist()
    x = channel_first(IMAGES)
    for stage, mean, statistics in zip(chain.stages, found.means, found.statistics, strict=False):
        assert ChannelStatistics.of(x).mean.tolist() == statistics.mean.tolist()
        expected = convolve(stage, x).mean(axis=(1, 2, 3), dtype=np.float64) + stage.bias
        np.testing.assert_allclose(mean, expected, atol=1e-6)
        x = run_stage(stage, x)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99))
def test_a_survey_moves_with_the_scales(seed: int) -> None:
    """The survey of a rescaled chain is the survey divided by the scales."""
    chain = chain_of(seed)
    rng = np.random.default_rng(seed)
    scales = [2.0 ** rng.uniform(-3, 3, 6), None, 2.0 ** rng.uniform(-3, 3, 6)]
    expected = survey(rescale(chain, scales), IMAGES)
    found = survey(chain, IMAGES).divided_by(scales)
    for left, right in zip(expected.means, found.means, strict=True):
        np.testing.assert_allclose(right, left, rtol=1e-4, atol=1e-4 * np.abs(left).max())
    for left, right in zip(expected.statistics, found.statistics, strict=True):
        np.testing.assert_allclose(right.mean_square, left.mean_square, rtol=1e-4)
        np.testing.assert_allclose(right.abs_max, left.abs_max, rtol=1e-4)


def test_histograms_see_every_input_once() -> None:
    """One observer a stage has counted each value that the stage read."""
    observers, logits = observe_inputs(chain_of(), IMAGES)
    assert [IMAGES.size] * 3 == [observer.count for observer in observers]
    assert run_chain(chain_of(), IMAGES).tolist() == logits.tolist()


def test_the_number_of_cores_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one core and on five the survey has the same bits."""
    found = []
    for cores in (1, 5):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        survey_of = survey(chain_of(), IMAGES)
        found.append([survey_of.logits.tolist(), [mean.tolist() for mean in survey_of.means]])
    assert found[0] == found[1]


def test_results_come_in_the_order_of_the_items() -> None:
    """Work on all cores returns as a list comprehension does, and raises what failed."""
    assert [i * i for i in range(20)] == on_all_cores(lambda i: i * i, range(20))
    assert [] == on_all_cores(lambda i: i, [])
    with pytest.raises(ZeroDivisionError):
        on_all_cores(lambda i: 1 / i, [1, 0, 2])
