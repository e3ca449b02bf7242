"""Patch products from autocorrelations equal those of unfolded patches, integer by integer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.autocorrelation import correlates, patch_products
from calibration.chain import ConvStage
from calibration.convolution import unfold
from calibration.rounding import InputMoments
from calibration.sequential import SequentialOptions, input_moments


def stage_of(channels: int, groups: int, **options: tuple[int, ...]) -> ConvStage:
    return ConvStage(
        name="c",
        weight=np.ones((groups, channels // groups, 3, 3)),
        bias=np.zeros(groups),
        groups=groups,
        **{"padding": (1, 1, 1, 1), **options},
    )


@settings(deadline=None)
@given(
    st.sampled_from([(4, 1), (6, 2), (3, 3)]),
    st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 99),
)
def test_products_are_those_of_unfolded_patches(
    channels: tuple[int, int], shape: tuple[int, int, int], seed: int
) -> None:
    """For any size, down to a single pixel, and any number of groups."""
    stage = stage_of(*channels)
    q = np.random.default_rng(seed).integers(-128, 128, (channels[0], *shape)).astype(np.float32)
    patches = unfold(stage, q).astype(np.float64)
    expected = patches @ patches.swapaxes(1, 2)
    assert expected.tolist() == patch_products(q, channels[1]).tolist()


def test_sums_of_many_positions_stay_exact() -> None:
    """Products of the largest integers over more positions than float32 can add up."""
    q = np.full((2, 3, 40, 40), -128, np.float32)
    q[1] = 127
    stage = stage_of(2, 1)
    patches = unfold(stage, q)[0].astype(np.int64)
    assert (patches @ patches.T).tolist() == patch_products(q, 1)[0].tolist()


def test_moments_are_those_of_patches() -> None:
    """A stage's moments are the same objects whichever way they are found."""
    stage = stage_of(4, 2)
    q = np.random.default_rng(0).integers(0, 128, (4, 5, 6, 7)).astype(np.float32)
    expected = InputMoments(2, 18)
    expected.update(unfold(stage, q))
    assert expected == input_moments(stage, q, SequentialOptions())


@pytest.mark.parametrize(
    "options", [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"padding": (1, 1, 0, 1)}]
)
def test_other_convolutions_are_unfolded(options: dict[str, tuple[int, ...]]) -> None:
    """Only stride 1, dilation 1 and padding 1 have the shortcut."""
    assert correlates(stage_of(2, 1))
    assert not correlates(stage_of(2, 1, **options))
