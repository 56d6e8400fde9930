"""training sets: tables of classes, the order of images, shares that add up, errors."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdp.errors import ConfigError, DataError
from cdp.models.heads import build_head
from cdp.training.batches import Order, apportion
from cdp.training.plan import TrainingPlan
from cdp.training.sets import FaceRows, MaskedNegatives, SoftTargets, TrainingSet

pytestmark = pytest.mark.torch


def make(label: list[int], **options) -> TrainingSet:
    images = np.zeros((len(label), 4, 4, 3), np.uint8)
    head = build_head("softmax", 4, max(max(label) + 1, 2))
    return TrainingSet(head, images, np.array(label), **options)


def test_order_visits_each_image_once_a_pass() -> None:
    order = Order(make([0] * 10), seed=0, number=0)
    rows = np.concatenate([order.take(start, 4)[0] for start in range(0, 40, 4)])
    for start in range(0, 40, 10):
        assert sorted(rows[start : start + 10]) == list(range(10))
    assert not np.array_equal(rows[:10], rows[10:20])
    # Anywhere in the sequence can be had at once, and longer than the set is no matter.
    rows_again, seeds = Order(make([0] * 10), seed=0, number=0).take(7, 30)
    np.testing.assert_array_equal(rows_again, rows[7:37])
    assert len(set(seeds.tolist())) == 30


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 3), st.integers(0, 99))
def test_sampling_by_identity_takes_each_equally_often(labels, each, start) -> None:
    training_set = make(labels)
    options = {"sampling": "identity", "images_per_identity": each}
    people = len(set(labels))
    order = Order(training_set, seed=1, number=0, **options)
    rows, _ = order.take(0, 3 * people * each)
    shown = np.array(labels)[rows]
    for turn in range(3):
        part = shown[turn * people * each : (turn + 1) * people * each].reshape(people, each)
        assert (part == part[:, :1]).all()
        assert sorted(part[:, 0]) == sorted(set(labels))
    for place in range(0, len(rows), each):
        group = rows[place : place + each]
        # An image comes twice only where its person has no other left.
        assert len(set(group)) == min(each, labels.count(labels[group[0]]))
    again, _ = Order(training_set, seed=1, number=0, **options).take(start, 20)
    beyond, _ = order.take(0, start + 20)
    np.testing.assert_array_equal(again, beyond[start:])


def test_sampling_by_identity_reaches_every_image() -> None:
    order = Order(make([0] * 9 + [1]), seed=0, number=0, sampling="identity")
    rows, _ = order.take(0, 400)
    assert set(rows) == set(range(10))
    assert (rows == 9).sum() == 200


def test_batches_are_apportioned() -> None:
    assert apportion(64, np.array([0.25, 0.75])) == [16, 48]
    assert apportion(10, np.array([1 / 3, 2 / 3])) == [3, 7]
    assert apportion(8, np.array([0.001, 0.999])) == [1, 7]


def test_soft_targets_are_found_and_scaled() -> None:
    soft = SoftTargets(np.array([0, 0, 3]), np.array([5, 6, 7]), np.array([1.0, 3.0, 0.2]))
    place, classes, weight = soft.take(np.array([3, 1, 0]), np.array([9, 8, 4]))
    assert place.tolist() == [0, 1, 2, 2]
    assert classes.tolist() == [7, 8, 5, 6]
    np.testing.assert_allclose(weight, [1, 1, 0.25, 0.75])
    none = SoftTargets(np.array([], int), np.array([], int), np.array([]))
    place, classes, weight = none.take(np.array([1, 1]), np.array([3, 3]))
    assert (place.tolist(), classes.tolist(), weight.tolist()) == ([0, 1], [3, 3], [1, 1])


def test_soft_targets_are_renumbered() -> None:
    soft = SoftTargets(np.array([0, 2, 2, 5]), np.array([1, 1, 4, 9]), np.arange(1.0, 5))
    kept = soft.renumber(np.array([2, 5]), np.array([4, 9]))
    assert kept.row.tolist() == [0, 1]
    assert kept.label.tolist() == [0, 1]
    assert kept.weight.tolist() == [3, 4]


def test_masked_negatives_are_found_and_renumbered() -> None:
    masked = MaskedNegatives(np.array([0, 0, 3]), np.array([5, 6, 7]))
    place, classes = masked.take(np.array([3, 1, 0, 3]))
    assert place.tolist() == [0, 2, 2, 3]
    assert classes.tolist() == [7, 5, 6, 7]
    kept = masked.renumber(np.array([0, 2, 3]), np.array([4, 5, 7]))
    assert (kept.row.tolist(), kept.label.tolist()) == ([0, 2], [1, 2])


def test_face_rows_stand_for_an_array() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)
    rows = FaceRows(images, np.array([5, 1, 2]))
    assert (len(rows), rows.shape, rows.dtype, rows.ndim) == (3, (3, 4, 4, 3), images.dtype, 4)
    np.testing.assert_array_equal(rows[np.array([2, 0])], images[[2, 5]])


def test_errors() -> None:
    training_set = make([0, 1, 2])
    teacher = np.zeros((3, 4), np.float32)
    with pytest.raises(DataError, match=r"labels in 0\.\.2 expected, got -1\.\."):
        dataclasses.replace(training_set, label=training_set.label - 1)
    with pytest.raises(DataError, match="labels expected, got none"):
        dataclasses.replace(training_set, label=None)
    with pytest.raises(DataError, match="without images"):
        dataclasses.replace(training_set, images=training_set.images[:0])
    with pytest.raises(DataError, match="uint8 expected"):
        dataclasses.replace(training_set, images=training_set.images.astype(np.float32))
    with pytest.raises(DataError, match="weights"):
        dataclasses.replace(training_set, weight=np.full(3, np.nan))
    with pytest.raises(DataError, match="used for distillation only"):
        TrainingSet(None, training_set.images, None)
    with pytest.raises(DataError, match="used for distillation only"):
        TrainingSet(None, training_set.images, training_set.label, teacher=teacher)
    with pytest.raises(DataError, match="3 teacher vectors"):
        dataclasses.replace(training_set, teacher=teacher[:2])
    for wrong in ({"sampling": "person"}, {"images_per_identity": 0}):
        with pytest.raises(ConfigError, match="sampling of image, identity"):
            TrainingPlan(**wrong)
    one = np.array([0])
    with pytest.raises(DataError, match=r"got 0\.\.7"):
        dataclasses.replace(training_set, soft=SoftTargets(one, np.array([7]), np.ones(1)))
    with pytest.raises(DataError, match=r"rows 0\.\.2 expected, got 3\.\.3"):
        dataclasses.replace(training_set, soft=SoftTargets(one + 3, one, np.ones(1)))
    with pytest.raises(DataError, match="ascending"):
        SoftTargets(np.array([1, 0]), np.array([0, 0]), np.ones(2))
    with pytest.raises(DataError, match="above 0"):
        SoftTargets(one, one, np.zeros(1))
    with pytest.raises(DataError, match="one length"):
        SoftTargets(one, one, np.ones(2))
    with pytest.raises(DataError, match="own class"):
        dataclasses.replace(
            training_set, masked_negatives=MaskedNegatives(one, training_set.label[:1])
        )
    with pytest.raises(DataError, match="ascending"):
        MaskedNegatives(np.array([1, 0]), np.array([0, 0]))
    with pytest.raises(DataError, match="one length"):
        MaskedNegatives(one, np.array([0, 1]))
