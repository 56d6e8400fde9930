"""Constraints: all of them are satisfied, whatever the labels, the pairs and the order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.errors import DataError
from cdp.propagation.soft_labels import diffuse_labels
from cdp.review.constraints import (
    Constraints,
    apply_constraints,
    bar_labels,
    find_conflict,
    settle_pairs,
)
from cdp.types import UNLABELLED, PairTable

COUNT = 14
rows = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=5, unique=True).map(np.array)


def number(group):
    """Any grouping as labels: by smallest row, a row alone has none."""
    group = np.asarray(group)
    label = np.full(len(group), UNLABELLED, np.int64)
    found = 0
    for row in range(len(group)):
        members = np.flatnonzero(group == group[row])
        if len(members) > 1 and members[0] == row:
            label[members] = found
            found += 1
    return label


@st.composite
def worlds(draw):
    label = number(draw(st.lists(st.integers(0, 5), min_size=COUNT, max_size=COUNT)))
    known = draw(st.lists(st.tuples(*[st.integers(0, COUNT - 1)] * 2), max_size=40))
    found = sorted({(min(p), max(p)) for p in known if p[0] != p[1]})
    table = np.array(found, np.int64).reshape(-1, 2)
    probability = draw(
        st.lists(st.floats(0, 1, width=32), min_size=len(table), max_size=len(table))
    )
    return label, PairTable(table[:, 0], table[:, 1]), np.array(probability, np.float32)


@st.composite
def constraint_sets(draw):
    """Constraints that can all hold: contradicting ones are left out, as the review page does."""
    constraints = Constraints(COUNT)
    for kind in draw(st.lists(st.sampled_from(["same", "apart", "rejected"]), max_size=6)):
        same, apart, rejected = constraints.same, constraints.apart, constraints.rejected
        if kind == "same":
            same = (*same, draw(rows))
        elif kind == "apart":
            apart = (*apart, (draw(rows), draw(rows)))
        else:
            rejected = np.union1d([] if rejected is None else rejected, draw(rows)).astype(int)
        more = Constraints(COUNT, same, apart, rejected)
        constraints = constraints if find_conflict(more) else more
    return constraints


@settings(max_examples=150, deadline=None)
@given(worlds(), constraint_sets())
def test_every_constraint_is_satisfied(world, constraints):
    label, pairs, probability = world
    found = apply_constraints(
        label, pairs, settle_pairs(pairs, probability, constraints), constraints
    )
    for group in constraints.same:
        if len(group) > 1:
            assert len(set(found[group])) == 1
            assert found[group[0]] != UNLABELLED
    for one, other in constraints.apart:
        assert not set(found[one]) & set(found[other]) - {UNLABELLED}
    if constraints.rejected is not None:
        assert (found[constraints.rejected] == UNLABELLED).all()
    assert (found == number(np.where(found == UNLABELLED, 100 + np.arange(COUNT), found))).all()


@settings(max_examples=100, deadline=None)
@given(worlds(), constraint_sets(), st.randoms(use_true_random=False))
def test_the_order_does_not_matter_and_twice_is_once(world, constraints, random):
    label, pairs, probability = world
    found = apply_constraints(label, pairs, probability, constraints)
    assert (apply_constraints(found, pairs, probability, constraints) == found).all()
    same = [group[::-1] for group in random.sample(constraints.same, len(constraints.same))]
    apart = [(b, a) for a, b in random.sample(constraints.apart, len(constraints.apart))]
    shuffled = Constraints(COUNT, tuple(same), tuple(apart), constraints.rejected)
    assert (apply_constraints(label, pairs, probability, shuffled) == found).all()


@settings(max_examples=100, deadline=None)
@given(worlds(), constraint_sets())
def test_clusters_without_a_constraint_keep_their_rows(world, constraints):
    label, pairs, probability = world
    named = np.zeros(COUNT, bool)
    for group in [
        *constraints.same,
        *(g for pair in constraints.apart for g in pair),
        constraints.rejected,
    ]:
        if group is not None:
            named[group] = True
    found = apply_constraints(label, pairs, probability, constraints)
    for cluster in range(label.max(initial=-1) + 1):
        members = np.flatnonzero(label == cluster)
        if not named[members].any():
            assert list(np.flatnonzero(found == found[members[0]])) == list(members)


@settings(max_examples=150, deadline=None)
@given(worlds(), constraint_sets())
def test_soft_labels_satisfy_cannot_links_too(world, constraints):
    label, pairs, probability = world
    settled = settle_pairs(pairs, probability, constraints)
    label = apply_constraints(label, pairs, settled, constraints)
    soft = bar_labels(diffuse_labels(label, pairs, settled, threshold=0.2), label, constraints)
    held = [set(soft.label[soft.row == row]) for row in range(COUNT)]
    for one, other in constraints.apart:
        for here, there in ((one, other), (other, one)):
            for row in here:
                assert not held[row] & set(label[there])
    for row in [] if constraints.rejected is None else constraints.rejected:
        assert not held[row]
    for row in range(COUNT):
        assert not held[row] or soft.weight[soft.row == row].sum() == pytest.approx(1, abs=1e-5)
        assert label[row] == UNLABELLED or label[row] in held[row]


def test_no_constraint_changes_nothing():
    label = np.array([0, 0, -1, 1, 1])
    pairs = PairTable(np.array([0, 1]), np.array([1, 3]))
    probability = np.array([0.1, 0.9], np.float32)
    constraints = Constraints(5)
    assert (apply_constraints(label, pairs, probability, constraints) == label).all()
    assert (settle_pairs(pairs, probability, constraints) == probability).all()


def test_one_image_moved_takes_no_other_along():
    """Row 2 belongs to the second identity; rows 0 and 1 stay, whatever their pairs."""
    label = np.array([0, 0, 0, 1, 1])
    pairs = PairTable(np.array([0, 1, 2, 3, 0]), np.array([1, 2, 3, 4, 3]))
    probability = np.array([0.9, 0.9, 0.4, 0.9, 0.2], np.float32)
    constraints = Constraints(5, (np.array([2, 3, 4]),), ((np.array([2]), np.array([0, 1])),))
    assert list(apply_constraints(label, pairs, probability, constraints)) == [0, 0, 1, 1, 1]


def test_a_pair_weighs_as_often_as_it_is_listed():
    """Row 3 was taken out; whether row 2 stays with 0 and 1 depends on its two pairs."""
    label = np.zeros(4, np.int64)
    ends = np.array([0, 0, 1]), np.array([1, 2, 2])
    probability = np.array([0.99, 0.9, 0.02], np.float32)
    constraints = Constraints(4, (), ((np.array([3]), np.array([0])),))
    for listings, stays in ((None, False), (np.array([1, 10, 1], np.int32), True)):
        found = apply_constraints(label, PairTable(*ends, listings), probability, constraints)
        assert found[0] == found[1] != found[3]
        assert (found[2] == found[0]) == stays


def test_new_rows_follow_the_cluster_of_their_pairs():
    """Rows 0-3 were merged by a reviewer; row 4 joined the second cluster later by its pairs."""
    label = np.array([0, 0, 1, 1, 1, 2, 2])
    pairs = PairTable(np.array([0, 2, 2, 3, 5]), np.array([1, 3, 4, 4, 6]))
    probability = np.full(5, 0.95, np.float32)
    constraints = Constraints(7, (np.array([0, 1, 2, 3]),))
    assert list(apply_constraints(label, pairs, probability, constraints)) == [0] * 5 + [1, 1]


def test_settled_pairs_are_certain():
    pairs = PairTable(np.array([0, 0, 1, 2]), np.array([1, 2, 3, 3]))
    constraints = Constraints(
        4, (np.array([0, 1]),), ((np.array([1]), np.array([2])),), np.array([3])
    )
    settled = settle_pairs(pairs, np.full(4, 0.5, np.float32), constraints)
    assert list(settled) == [1, 0, 0, 0]
    assert settled.dtype == np.float32


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints(3, (np.array([0, 1]),), ((np.array([1]), np.array([0])),)), "different"),
        (
            Constraints(3, (np.array([0, 1]), np.array([1, 2])), ((np.array([2]), np.array([0])),)),
            "different",
        ),
        (Constraints(3, (np.array([0, 1]),), (), np.array([1])), "row 1 is rejected"),
    ],
)
def test_contradictions_are_refused(constraints, message):
    with pytest.raises(DataError, match=message):
        apply_constraints(
            np.zeros(3, np.int64), PairTable(*np.empty((2, 0), np.int64)), np.empty(0), constraints
        )
