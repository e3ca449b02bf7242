"""Per-channel ranges and statistics, and the image sample: merge laws, order, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.moments import ChannelStatistics, RangeObserver
from calibration.observer import ObservationError
from calibration.sample import ImageSample, fingerprint, sample_size

BATCHES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(0, 6), st.just(3), st.integers(1, 4)),
    elements=st.floats(-(2.0**60), 2.0**60, width=32),
)


def observed(*batches: np.ndarray) -> RangeObserver:
    observer = RangeObserver(3)
    for batch in batches:
        observer.update(batch)
    return observer


def sampled(*batches: np.ndarray, size: int = 3) -> ImageSample:
    sample = ImageSample(size)
    for batch in batches:
        sample.update(batch)
    return sample


@given(BATCHES, BATCHES.filter(lambda a: a.shape[2] > 1))
def test_merge_equals_observing_the_union(a: np.ndarray, b: np.ndarray) -> None:
    """observe(A u B) equals merge(observe(A), observe(B)) bit for bit, in either order."""
    assert observed(a, b) == observed(a).merge(observed(b)) == observed(b).merge(observed(a))


@given(BATCHES.filter(len), st.randoms(use_true_random=False), st.integers(1, 7))
def test_order_and_batches_do_not_matter(values: np.ndarray, random, size: int) -> None:
    """Any permutation of images, in batches of any size, gives the same statistics bit for bit."""
    shuffled = values[random.sample(range(len(values)), len(values))]
    batches = [shuffled[i : i + size] for i in range(0, len(values), size)]
    assert observed(values) == observed(*batches)


@given(BATCHES.filter(len))
def test_figures_of_images_add_up_to_their_values(values: np.ndarray) -> None:
    """Adding each image's smallest and largest value equals observing the values."""
    observer = RangeObserver(3)
    observer.add(values.min(axis=2), values.max(axis=2))
    assert observed(values) == observer


@settings(deadline=None)
@given(BATCHES.filter(len))
def test_statistics_are_those_of_all_values(values: np.ndarray) -> None:
    """Range and share are exact; moments agree with numpy's to float64 rounding."""
    found = ChannelStatistics.of(values.swapaxes(0, 1))
    by_channel = np.moveaxis(values, 1, 0).reshape(3, -1).astype(np.float64)
    assert by_channel.max(axis=1).tolist() == found.maximum.tolist()
    assert by_channel.min(axis=1).tolist() == found.minimum.tolist()
    assert (by_channel > 0).mean(axis=1).tolist() == found.positive.tolist()
    magnitude = np.abs(by_channel).max()
    np.testing.assert_allclose(
        found.mean, by_channel.mean(axis=1), rtol=1e-12, atol=1e-12 * magnitude
    )
    np.testing.assert_allclose(found.mean_square, (by_channel**2).mean(axis=1), rtol=1e-12)


@settings(deadline=None)
@given(BATCHES.filter(len), BATCHES)
def test_range_of_more_images_contains_the_statistics(a: np.ndarray, b: np.ndarray) -> None:
    """Statistics of a part with the range of the whole have the range of the whole."""
    whole = observed(a).merge(observed(b))
    found = ChannelStatistics.of(a.swapaxes(0, 1)).within(whole)
    assert whole.maximum.tolist() == found.maximum.tolist()
    assert whole.minimum.tolist() == found.minimum.tolist()


@settings(deadline=None)
@given(BATCHES.filter(len))
def test_scaled_statistics_are_those_of_scaled_values(values: np.ndarray) -> None:
    """Dividing by powers of two commutes with taking statistics, bit for bit."""
    scales = np.array([0.25, 1.0, 0.125])
    divided = (values / scales[:, None]).astype(np.float32)
    expected = ChannelStatistics.of(divided.swapaxes(0, 1))
    found = ChannelStatistics.of(values.swapaxes(0, 1)).divided_by(scales)
    assert expected.abs_max.tolist() == found.abs_max.tolist()
    assert expected.mean.tolist() == found.mean.tolist()
    assert expected.variance.tolist() == found.variance.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused(bad: float) -> None:
    """NaN and infinity are refused with a count, and nothing is added."""
    observer = observed(np.ones((1, 3, 2), np.float32))
    with pytest.raises(ObservationError, match="1 of 6 values"):
        observer.update(np.array([[[1, bad], [0, 0], [0, 0]]], np.float32))
    assert observed(np.ones((1, 3, 2), np.float32)) == observer


def test_wrong_input_is_refused() -> None:
    """Another dtype, another number of channels and figures of NaN are refused."""
    observer = RangeObserver(3)
    with pytest.raises(TypeError, match="float32"):
        observer.update(np.zeros((1, 3, 2)))
    with pytest.raises(ObservationError, match="is not"):
        observer.update(np.zeros((1, 4, 2), np.float32))
    with pytest.raises(ObservationError, match="1 of 3 channels"):
        observer.add(np.array([[0, np.nan, 0]], np.float32), np.zeros((1, 3), np.float32))


IMAGES = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 8), st.just(2)), elements=st.floats(0, 4, width=16)
)


@given(IMAGES, IMAGES)
def test_samples_merge_exactly(a: np.ndarray, b: np.ndarray) -> None:
    """A sample of a union is the merge of the samples of its parts."""
    assert sampled(a, b) == sampled(a).merge(sampled(b)) == sampled(b).merge(sampled(a))


@given(IMAGES.filter(len), st.randoms(use_true_random=False))
def test_sample_ignores_order_and_repetition(images: np.ndarray, random) -> None:
    """Shuffled and repeated images give the same sample, in the same order."""
    shuffled = images[random.sample(range(len(images)), len(images))]
    expected = sampled(images).images
    assert expected.tolist() == sampled(shuffled, images).images.tolist()
    assert len(expected) == min(3, len(np.unique(images, axis=0)))


def test_sample_refusals() -> None:
    """An empty sample, a size below one and a merge of unlike samples are refused."""
    with pytest.raises(ObservationError, match="no calibration images"):
        _ = sampled().images
    with pytest.raises(ValueError, match="at least one"):
        ImageSample(0)
    with pytest.raises(ObservationError, match="do not merge"):
        sampled().merge(sampled(size=4))


def test_small_images_ask_for_more_of_them() -> None:
    """32 images of 224 x 224 are enough, and up to 512 of smaller ones."""
    assert (32, 98, 512, 32) == tuple(sample_size((s, s)) for s in (224, 128, 32, 640))


@given(
    st.lists(st.tuples(st.integers(0, 26), st.integers(0, 31)), min_size=1, max_size=4, unique=True)
)
def test_images_that_differ_in_a_few_bits_have_different_fingerprints(
    flips: list[tuple[int, int]],
) -> None:
    """Whichever bits they are, highest ones included; an equal image has an equal one."""
    image = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)
    other = image.copy()
    bits = other.reshape(-1).view(np.uint32)
    for place, bit in flips:
        bits[place] ^= np.uint32(1) << np.uint32(bit)
    assert fingerprint(image) == fingerprint(image.copy())
    assert fingerprint(image) != fingerprint(other)
    assert fingerprint(image) != fingerprint(image.reshape(1, 9, 3))
