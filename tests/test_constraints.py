"""Constraints: every decision holds, whatever the labels, the evidence and the order."""

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
def words(draw):
    """Constraints that can all hold: contradicting ones are left out, as the review page does."""
    said = Constraints(COUNT)
    for kind in draw(st.lists(st.sampled_from(["same", "apart", "rejected"]), max_size=6)):
        same, apart, rejected = said.same, said.apart, said.rejected
        if kind == "same":
            same = (*same, draw(rows))
        elif kind == "apart":
            apart = (*apart, (draw(rows), draw(rows)))
        else:
            rejected = np.union1d([] if rejected is None else rejected, draw(rows)).astype(int)
        more = Constraints(COUNT, same, apart, rejected)
        said = said if find_conflict(more) else more
    return said


@settings(max_examples=150, deadline=None)
@given(worlds(), words())
def test_every_correction_holds(world, said):
    label, pairs, probability = world
    found = apply_constraints(label, pairs, settle_pairs(pairs, probability, said), said)
    for group in said.same:
        if len(group) > 1:
            assert len(set(found[group])) == 1
            assert found[group[0]] != UNLABELLED
    for one, other in said.apart:
        assert not set(found[one]) & set(found[other]) - {UNLABELLED}
    if said.rejected is not None:
        assert (found[said.rejected] == UNLABELLED).all()
    assert (found == number(np.where(found == UNLABELLED, 100 + np.arange(COUNT), found))).all()


@settings(max_examples=100, deadline=None)
@given(worlds(), words(), st.randoms(use_true_random=False))
def test_the_order_of_words_does_not_matter_and_twice_is_once(world, said, random):
    label, pairs, probability = world
    found = apply_constraints(label, pairs, probability, said)
    assert (apply_constraints(found, pairs, probability, said) == found).all()
    same = [group[::-1] for group in random.sample(said.same, len(said.same))]
    apart = [(b, a) for a, b in random.sample(said.apart, len(said.apart))]
    shuffled = Constraints(COUNT, tuple(same), tuple(apart), said.rejected)
    assert (apply_constraints(label, pairs, probability, shuffled) == found).all()


@settings(max_examples=100, deadline=None)
@given(worlds(), words())
def test_clusters_nobody_spoke_of_keep_their_rows(world, said):
    label, pairs, probability = world
    named = np.zeros(COUNT, bool)
    for group in [*said.same, *(g for pair in said.apart for g in pair), said.rejected]:
        if group is not None:
            named[group] = True
    found = apply_constraints(label, pairs, probability, said)
    for cluster in range(label.max(initial=-1) + 1):
        members = np.flatnonzero(label == cluster)
        if not named[members].any():
            assert list(np.flatnonzero(found == found[members[0]])) == list(members)


@settings(max_examples=150, deadline=None)
@given(worlds(), words())
def test_soft_labels_keep_people_apart_too(world, said):
    label, pairs, probability = world
    settled = settle_pairs(pairs, probability, said)
    label = apply_constraints(label, pairs, settled, said)
    soft = bar_labels(diffuse_labels(label, pairs, settled, threshold=0.2), label, said)
    held = [set(soft.label[soft.row == row]) for row in range(COUNT)]
    for one, other in said.apart:
        for here, there in ((one, other), (other, one)):
            for row in here:
                assert not held[row] & set(label[there])
    for row in [] if said.rejected is None else said.rejected:
        assert not held[row]
    for row in range(COUNT):
        assert not held[row] or soft.weight[soft.row == row].sum() == pytest.approx(1, abs=1e-5)
        assert label[row] == UNLABELLED or label[row] in held[row]


def test_nothing_said_changes_nothing():
    label = np.array([0, 0, -1, 1, 1])
    pairs = PairTable(np.array([0, 1]), np.array([1, 3]))
    probability = np.array([0.1, 0.9], np.float32)
    said = Constraints(5)
    assert (apply_constraints(label, pairs, probability, said) == label).all()
    assert (settle_pairs(pairs, probability, said) == probability).all()


def test_one_image_moved_takes_nobody_along():
    """Row 2 belongs to the second person; rows 0 and 1 stay, evidence or not."""
    label = np.array([0, 0, 0, 1, 1])
    pairs = PairTable(np.array([0, 1, 2, 3, 0]), np.array([1, 2, 3, 4, 3]))
    probability = np.array([0.9, 0.9, 0.4, 0.9, 0.2], np.float32)
    said = Constraints(5, (np.array([2, 3, 4]),), ((np.array([2]), np.array([0, 1])),))
    assert list(apply_constraints(label, pairs, probability, said)) == [0, 0, 1, 1, 1]


def test_a_pair_weighs_as_often_as_it_is_listed():
    """Row 3 was taken out; whether row 2 stays with 0 and 1 is for its two pairs to say."""
    label = np.zeros(4, np.int64)
    ends = np.array([0, 0, 1]), np.array([1, 2, 2])
    probability = np.array([0.99, 0.9, 0.02], np.float32)
    said = Constraints(4, (), ((np.array([3]), np.array([0])),))
    for listings, stays in ((None, False), (np.array([1, 10, 1], np.int32), True)):
        found = apply_constraints(label, PairTable(*ends, listings), probability, said)
        assert found[0] == found[1] != found[3]
        assert (found[2] == found[0]) == stays


def test_newcomers_follow_the_cluster_their_evidence_binds_them_to():
    """Rows 0-3 were merged by a person; row 4 joined the second cluster later on its evidence."""
    label = np.array([0, 0, 1, 1, 1, 2, 2])
    pairs = PairTable(np.array([0, 2, 2, 3, 5]), np.array([1, 3, 4, 4, 6]))
    probability = np.full(5, 0.95, np.float32)
    said = Constraints(7, (np.array([0, 1, 2, 3]),))
    assert list(apply_constraints(label, pairs, probability, said)) == [0] * 5 + [1, 1]


def test_settled_pairs_are_certain():
    pairs = PairTable(np.array([0, 0, 1, 2]), np.array([1, 2, 3, 3]))
    said = Constraints(4, (np.array([0, 1]),), ((np.array([1]), np.array([2])),), np.array([3]))
    settled = settle_pairs(pairs, np.full(4, 0.5, np.float32), said)
    assert list(settled) == [1, 0, 0, 0]
    assert settled.dtype == np.float32


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (Constraints(3, (np.array([0, 1]),), ((np.array([1]), np.array([0])),)), "different"),
        (
            Constraints(3, (np.array([0, 1]), np.array([1, 2])), ((np.array([2]), np.array([0])),)),
            "different",
        ),
        (Constraints(3, (np.array([0, 1]),), (), np.array([1])), "row 1 is rejected"),
    ],
)
def test_contradictions_are_refused(said, expected):
    with pytest.raises(DataError, match=expected):
        apply_constraints(
            np.zeros(3, np.int64), PairTable(*np.empty((2, 0), np.int64)), np.empty(0), said
        )
