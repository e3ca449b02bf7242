"""Observers: exact merge, independence of order and batches, constant memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calibration.observer import (
    BINS,
    ObservationError,
    TensorObserver,
    merge_observations,
    observe,
)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Mixes every magnitude with many small ones, so that growth by one and by many steps both occur.
VALUES = st.one_of(FINITE, st.floats(-2, 2, width=32), st.just(0.0), st.just(-0.0))
ARRAYS = hnp.arrays(np.float32, st.integers(0, 40), elements=VALUES)


def observed(*parts: np.ndarray) -> TensorObserver:
    observer = TensorObserver()
    for part in parts:
        observer.update(part)
    return observer


def exact_histogram(values: np.ndarray, width: float) -> list[int]:
    """Counts by exact rational arithmetic, one value at a time."""
    numerator, denominator = width.as_integer_ratio()
    counts = [0] * BINS
    for value in values.tolist():
        if value != 0:
            n, d = abs(value).as_integer_ratio()
            counts[n * denominator // (d * numerator)] += 1
    return counts


@given(ARRAYS, ARRAYS)
def test_merge_equals_observing_the_union(a: np.ndarray, b: np.ndarray) -> None:
    """observe(A u B) equals merge(observe(A), observe(B)) bit for bit."""
    assert observed(np.concatenate([a, b])) == observed(a).merge(observed(b))


@given(ARRAYS, ARRAYS, ARRAYS)
def test_merge_is_associative_and_commutative(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    """Partial results merge in any order and grouping, the empty observer being neutral."""
    x, y, z = observed(a), observed(b), observed(c)
    assert x.merge(y) == y.merge(x)
    assert x.merge(y).merge(z) == x.merge(y.merge(z))
    assert x.merge(TensorObserver()) == x


@given(ARRAYS, ARRAYS)
def test_merge_changes_neither_side(a: np.ndarray, b: np.ndarray) -> None:
    """Merging leaves both observers as they were."""
    x, y = observed(a), observed(b)
    x.merge(y).update(np.float32([3e38]))
    assert (x, y) == (observed(a), observed(b))


@given(ARRAYS, st.randoms(use_true_random=False), st.integers(1, 7))
def test_order_and_batches_do_not_matter(values: np.ndarray, random, size: int) -> None:
    """Any permutation, cut into batches of any size, gives the same observer."""
    shuffled = values[random.sample(range(len(values)), len(values))]
    batches = [shuffled[i : i + size] for i in range(0, len(values), size)]
    assert observed(values) == observed(*batches)


@given(ARRAYS.filter(len))
def test_histogram_is_exact(values: np.ndarray) -> None:
    """Every magnitude, subnormal or huge, lies in the bin that rational arithmetic gives."""
    observer = observed(values)
    assert exact_histogram(values, observer.bin_width) == observer.histogram.tolist()
    assert observer.histogram.sum() + observer.zeros == observer.count == values.size
    assert observer.zeros == np.count_nonzero(values == 0)


@given(ARRAYS.filter(len))
def test_range_is_exact(values: np.ndarray) -> None:
    """Minimum, maximum and abs_max are those of all the values."""
    observer = observed(values)
    found = (observer.minimum, observer.maximum, observer.abs_max)
    assert (float(values.min()), float(values.max()), float(np.abs(values).max())) == found


@given(FINITE.filter(bool))
def test_bin_width_is_the_smallest_that_fits(value: float) -> None:
    """The largest magnitude lies in the upper half of the bins, unless the width is at 2^-126."""
    observer = observed(np.float32([value]))
    place = abs(float(np.float32(value))) / observer.bin_width
    assert place < BINS
    assert place >= BINS / 2 or observer.bin_width == 2.0**-126


@pytest.mark.parametrize(
    ("largest", "width"),
    [
        (1.0, 2.0**-12),
        (np.nextafter(np.float32(1), np.float32(0)), 2.0**-13),
        (0.0, 2.0**-126),
        (2.0**-149, 2.0**-126),
        (1e38, 2.0 ** (127 - 13)),
        (np.finfo(np.float32).max, 2.0 ** (128 - 13)),
    ],
)
def test_width_at_the_borders(largest: float, width: float) -> None:
    """A power of two opens the next width, and the extremes of float32 have a bin."""
    observer = observed(np.float32([largest]))
    assert width == observer.bin_width
    assert observer.histogram.sum() == (largest != 0)


def test_negative_zero_is_zero() -> None:
    """The range of zeros is 0.0 whatever their sign, so that it does not depend on the order."""
    observer = observed(np.float32([-0.0]))
    signs = [math.copysign(1, value) for value in (observer.minimum, observer.maximum)]
    assert signs == [1, 1]
    assert (observer.zeros, observer.count) == (1, 1)


def test_growth_adds_neighbouring_bins() -> None:
    """A late large value leaves the counts that one look at all the values would give."""
    small = np.linspace(0.5, 1, 1000, endpoint=False, dtype=np.float32)
    late = observed(small, np.float32([4000]))
    assert observed(np.append(small, np.float32(4000))) == late
    assert late.histogram[:2].tolist() == [0, 1000]
    assert late.histogram[int(4000 / late.bin_width)] == 1


def test_memory_layout_does_not_matter() -> None:
    """Transposed and strided tensors count like contiguous ones."""
    values = np.random.default_rng(0).standard_normal((6, 5, 4, 3)).astype(np.float32)
    assert observed(values) == observed(values.transpose(0, 2, 3, 1))
    assert observed(values[:, ::2].copy()) == observed(values[:, ::2])


def test_chunk_borders_lose_nothing() -> None:
    """A tensor longer than one inner step equals the sum of its parts, ReLU zeros included."""
    values = np.random.default_rng(1).standard_normal(200_001).astype(np.float32)
    relu = np.maximum(values, 0)
    observer = observed(relu)
    assert observed(*np.array_split(relu, 7)) == observer
    assert exact_histogram(relu, observer.bin_width) == observer.histogram.tolist()


def test_histogram_is_a_copy() -> None:
    """Writing into the returned histogram does not reach the observer."""
    observer = observed(np.float32([1]))
    observer.histogram[:] = 7
    assert observer.histogram.sum() == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_refused_whole(bad: float) -> None:
    """NaN and infinity are counted in the message, and nothing of that tensor is added."""
    observer = observed(np.float32([1, 2]))
    with pytest.raises(ObservationError, match=r"^2 of 4 values are NaN or infinite$"):
        observer.update(np.float32([bad, 5, 6, bad]))
    assert observed(np.float32([1, 2])) == observer


def test_other_types_are_refused() -> None:
    """Only float32 arrays are observed, because only for them is binning exact."""
    with pytest.raises(TypeError, match=r"^observed values must be a float32 array, not float64$"):
        TensorObserver().update(np.zeros(3))
    with pytest.raises(TypeError, match=r"must be a float32 array, not list$"):
        TensorObserver().update([1.0])  # type: ignore[arg-type]


def test_an_empty_observer_has_no_range() -> None:
    """Before the first value there is no range, and the error says so."""
    observer = observed(np.empty((0, 3), dtype=np.float32))
    with pytest.raises(ObservationError, match="has no values yet"):
        _ = observer.abs_max
    assert (observer.count, observer.histogram.sum()) == (0, 0)


def test_memory_does_not_grow_with_the_stream() -> None:
    """A hundred times more images allocate no more than the first."""

    def images():
        rng = np.random.default_rng(2)
        for index in range(101):
            if index == 1:
                marks.append(tracemalloc.get_traced_memory()[0])
                tracemalloc.reset_peak()
            yield rng.standard_normal((1, 3, 64, 64), dtype=np.float32) * np.float32(index + 1)

    marks: list[int] = []
    tracemalloc.start()
    observe(lambda x: {"input": x, "relu": np.maximum(x, 0)}, images())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - marks[0] < 2_000_000


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6))
def test_observe_does_not_depend_on_batch_size(first: int, second: int) -> None:
    """The same images in other batches give equal observers for every tensor."""
    data = np.random.default_rng(3).standard_normal((7, 2, 3, 3)).astype(np.float32)

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return {"input": x, "relu": np.maximum(x, 0)}

    left, right = (observe(run, [data[i : i + n] for i in range(0, 7, n)]) for n in (first, second))
    assert left == right
    assert list(left) == ["input", "relu"]


def test_observe_reports_progress() -> None:
    """Progress is the number of images seen; empty batches are passed over."""
    seen: list[int] = []
    shapes = (2, 0, 3)
    observe(lambda x: {"x": x}, (np.ones((n, 1), np.float32) for n in shapes), seen.append)
    assert seen == [2, 5]


def test_observations_of_disjoint_sets_merge() -> None:
    """Merging two runs equals one run over all the images."""
    data = np.random.default_rng(4).standard_normal((5, 8)).astype(np.float32)

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        return {"a": x, "b": x * np.float32(100)}

    parts = [observe(run, [part]) for part in (data[:2], data[2:])]
    assert observe(run, [data]) == merge_observations(*parts)
    del parts[1]["b"]
    with pytest.raises(ObservationError, match=r"^tensor 'b' was observed on one side only$"):
        merge_observations(*parts)


ONE = np.ones((2, 3), dtype=np.float32)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([], "^there are no calibration images; give at least one$"),
        ([{}], "^the network returned no tensors to observe$"),
        ([{"a": ONE, "b": ONE}, {"a": ONE}], "^tensor 'b' is missing after 2 images$"),
        ([{"a": ONE}, {"a": ONE, "b": ONE}], "^tensor 'b' first appears after 2 images$"),
        ([{}, {"a": ONE}], "^tensor 'a' first appears after 2 images$"),
        ([{"a": ONE[:0]}], "^tensor 'a' is empty for every image$"),
        (
            [{"a": ONE}, {"a": np.where(np.eye(2, 3) == 1, np.nan, ONE).astype(np.float32)}],
            "^tensor 'a', images 2 to 3: 2 of 6 values are NaN or infinite$",
        ),
    ],
)
def test_observe_refuses(outputs: list[dict[str, np.ndarray]], message: str) -> None:
    """Missing images and tensors, and non-finite values, are errors that name the tensor."""
    results = iter(outputs)
    with pytest.raises(ObservationError, match=message):
        observe(lambda _: next(results), [ONE] * len(outputs))


def test_observe_names_the_tensor_of_a_wrong_type() -> None:
    """A tensor that is not float32 is refused by name."""
    with pytest.raises(TypeError, match=r"^tensor 'ids', images 0 to 1: .* not int64$"):
        observe(lambda _: {"ids": np.arange(3)}, [ONE])
