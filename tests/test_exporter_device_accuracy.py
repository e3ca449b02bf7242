"""What an evaluation counts: ranks, the worst classes, shards that merge to the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.device.accuracy import Evaluation, Shard, merge, ranks
from exporter.errors import InputError

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
ANSWERS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), min_size=1, max_size=60
)


def evaluation(answers: list[tuple[int, int, bool]], shard: Shard = Shard()) -> Evaluation:  # noqa: B008
    """What counting these (true class, predicted class, in the top five) gives."""
    return Evaluation(
        bundle="b",
        bundle_sha256="00",
        precision="int8",
        backend="onnxruntime",
        library="onnxruntime 1",
        data="d",
        class_names=NAMES,
        confusion=Counter((true, predicted) for true, predicted, _ in answers),
        top5_correct=sum(top for *_, top in answers),
        folder_images=60,
        folder_names_sha256="ff",
        shards=(shard,),
        seconds=2.0,
    )


@given(answers=ANSWERS, parts=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_shards_merge_to_the_whole(answers, parts: int, order):
    """Counts of all shards, in any order, are those of one run, also through JSON."""
    parts = min(parts, len(answers))
    pieces = [
        evaluation(answers[index - 1 :: parts], Shard(index, parts))
        for index in range(1, parts + 1)
    ]
    order.shuffle(pieces)

    whole = merge([Evaluation.from_json(piece.to_json()) for piece in pieces])

    single = evaluation(answers)
    assert whole.shards == tuple(Shard(index, parts) for index in range(1, parts + 1))
    assert whole.seconds is None
    assert replace(whole, shards=single.shards, seconds=2.0) == single
    assert whole.to_json()["top1"] == single.to_json()["top1"]


@given(answers=ANSWERS)
def test_an_evaluation_survives_json(answers):
    """Reading back what was written changes nothing."""
    found = evaluation(answers)
    assert found == Evaluation.from_json(found.to_json())


@given(
    logits=st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=20),
    data=st.data(),
)
def test_rank_zero_is_the_arg_max(logits, data):
    """Equal logits included; every class of an image has a rank of its own."""
    values = np.array(logits, np.float32)
    labels = np.array(
        data.draw(st.lists(st.integers(0, 6), min_size=len(logits), max_size=len(logits)))
    )
    assert ((ranks(values, labels) == 0) == (values.argmax(axis=1) == labels)).all()
    of_all = [ranks(values, np.full(len(values), label)) for label in range(7)]
    assert (np.sort(np.stack(of_all), axis=0) == np.arange(7)[:, None]).all()


def test_the_worst_classes_come_first_with_what_they_were_taken_for():
    """Classes without a mistake are left out; mistakes are sorted by number, then order."""
    answers = [(0, 0, True)] * 3 + [(1, 1, True), (1, 2, True)] + [(2, 0, True), (2, 3, True)] * 2
    worst = evaluation(answers).worst_classes()
    assert [("cat", 4, 0), ("bee", 2, 1)] == [(w.name, w.images, w.correct) for w in worst]
    assert (("ant", 2), ("dog", 2)) == worst[0].taken_for
    assert {"class": "bee", "images": 2, "correct": 1, "taken_for": {"cat": 1}} == (
        worst[1].to_json()
    )


def test_figures_are_shares_of_the_images():
    """Top-1, top-5 and the rate follow from the counts."""
    figures = evaluation([(0, 0, True), (1, 2, True), (1, 3, False), (2, 2, True)]).to_json()
    assert (0.5, 0.75, 2.0) == (figures["top1"], figures["top5"], figures["images_per_second"])


@pytest.mark.parametrize(
    ("shards", "sentence"),
    [
        ((Shard(1, 3), Shard(3, 3)), "the shards 1/3, 3/3 are not each of 3 parts exactly once"),
        ((Shard(1, 2), Shard(1, 2)), "the shards 1/2, 1/2 are not each of 2 parts exactly once"),
        ((Shard(1, 2), Shard(2, 3)), "the shards 1/2, 2/3 are not each of 3 parts exactly once"),
    ],
)
def test_a_missing_or_doubled_shard_is_refused(shards, sentence: str):
    """A sum over some of the images is not the folder's figure."""
    with pytest.raises(InputError) as refusal:
        merge([evaluation([(0, 0, True)], shard) for shard in shards])
    assert sentence == str(refusal.value)


def test_evaluations_of_different_bundles_are_not_added():
    """The first difference is named with both parts."""
    one, other = (evaluation([(0, 0, True)], Shard(index, 2)) for index in (1, 2))
    with pytest.raises(InputError) as refusal:
        merge([one, replace(other, bundle_sha256="11")])
    assert (
        "these evaluations do not belong together: their bundle_sha256 differ (d 1/2, d 2/2)"
        == str(refusal.value)
    )


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        (
            {"folder_images": 61},
            "these evaluations do not belong together: their numbers of images in the folder "
            "differ (d 1/2, e 2/2)",
        ),
        (
            {"folder_names_sha256": "fe"},
            "these evaluations do not belong together: their names of images in the folder differ "
            "(d 1/2, e 2/2)",
        ),
        (
            {"folder_images": None, "folder_names_sha256": None},
            "evaluation e 2/2 is of an older version, which did not record what images the folder "
            "held; evaluate it again",
        ),
    ],
)
def test_shards_of_different_folders_are_not_added(folder, sentence: str):
    """Whatever their paths are: machines have the same images at different places."""
    one, other = (evaluation([(0, 0, True)], Shard(index, 2)) for index in (1, 2))
    elsewhere = replace(other, data="e")
    assert 2 == merge([one, elsewhere]).images
    with pytest.raises(InputError) as refusal:
        merge([one, replace(elsewhere, **folder)])
    assert sentence == str(refusal.value)


def test_results_of_older_versions_are_added_among_themselves():
    """They do not say what their folder held; their JSON has no such keys."""
    parts = []
    for index in (1, 2):
        content = evaluation([(0, 0, True)], Shard(index, 2)).to_json()
        del content["folder_images"], content["folder_names_sha256"]
        parts.append(Evaluation.from_json(content))
    assert (2, None) == (merge(parts).images, merge(parts).folder_images)


@pytest.mark.parametrize("text", ["2", "0/3", "4/3", "a/b", "1/2/3", "-1/2", "1/0"])
def test_a_bad_shard_is_refused(text: str):
    """The sentence quotes it."""
    with pytest.raises(ValueError, match=r"shard .*part"):
        Shard.parse(text)
    assert Shard(2, 4) == Shard.parse(" 2/4 ")
