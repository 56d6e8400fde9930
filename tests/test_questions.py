"""Questions: worth is the number of wrong pairs an answer removes, and the best come first."""

import numpy as np

from cdp.review.constraints import Constraints
from cdp.review.questions import filter_answered, rank_questions
from cdp.types import PairTable


def join(groups, links):
    """Complete pairs inside each group at .99, and the given links between rows."""
    found = {(i, j): 0.99 for rows in groups for i in rows for j in rows if i < j}
    found.update({(min(a, b), max(a, b)): p for a, b, p in links})
    keys = sorted(found)
    table = np.array(keys)
    return PairTable(table[:, 0], table[:, 1]), np.array([found[k] for k in keys], np.float32)


def test_a_weak_bridge_is_shown_with_its_two_sides():
    pairs, probability = join([range(3), range(3, 8)], [(2, 3, 0.3)])
    (first, *_) = rank_questions(np.zeros(8, np.int64), pairs, probability, kinds=("bridge",))
    assert first.kind == "bridge"
    assert list(first.one) == [3, 4, 5, 6, 7]
    assert list(first.other) == [0, 1, 2]
    assert abs(first.chance - 0.3) < 1e-6
    assert abs(first.worth - 0.7 * 15) < 1e-5


def test_a_likely_merge_counts_the_pairs_it_would_win():
    label = np.array([0] * 3 + [1] * 5 + [-1])
    between = [(i, j, 0.4) for i in range(3) for j in range(3, 8)]
    pairs, probability = join([range(3), range(3, 8)], between + [(j, 8, 0.4) for j in range(3, 8)])
    found = rank_questions(label, pairs, probability, kinds=("merge",))
    assert [(len(q.one), len(q.other)) for q in found] == [(3, 5), (5, 1)]
    assert np.allclose([q.worth for q in found], [0.4 * 15, 0.4 * 5], atol=1e-5)


def test_one_pair_between_two_dense_clusters_is_no_likely_merge():
    label = np.array([0] * 3 + [1] * 5)
    pairs, probability = join([range(3), range(3, 8)], [(2, 3, 0.4)])
    (single,) = rank_questions(label, pairs, probability, kinds=("merge",))
    # of fifteen pairs one is there: its odds fall by the square root of that
    assert abs(single.chance - 1 / (1 + 1.5 * 15**0.5)) < 1e-6


def test_kinds_are_on_one_scale_and_sorted():
    label = np.array([0] * 8 + [1] * 4)
    pairs, probability = join([range(3), range(3, 8), range(8, 12)], [(2, 3, 0.3), (7, 8, 0.1)])
    found = rank_questions(label, pairs, probability)
    assert [q.worth for q in found] == sorted((q.worth for q in found), reverse=True)
    assert found[0].kind == "bridge"
    assert {q.kind for q in found} == {"bridge", "merge", "cluster"}
    assert len(rank_questions(label, pairs, probability, limit=2)) == 2


def test_without_clusters_there_is_little_to_ask():
    nothing = PairTable(*np.empty((2, 0), np.int64))
    assert rank_questions(np.full(4, -1), nothing, np.empty(0)) == []
    pairs = PairTable(np.array([0]), np.array([1]))
    assert [q.kind for q in rank_questions(np.full(4, -1), pairs, np.array([0.2]))] == ["merge"]


def test_what_was_answered_is_not_asked_again():
    label = np.array([0] * 3 + [1] * 5 + [2] * 2)
    pairs, probability = join(
        [range(3), range(3, 8), range(8, 10)], [(2, 3, 0.4), (7, 8, 0.4), (0, 9, 0.3)]
    )
    asked = rank_questions(label, pairs, probability)
    first, second, third = (np.flatnonzero(label == cluster) for cluster in range(3))
    constraints = Constraints(10, (np.concatenate([second, third]),), ((first[:1], second),))
    left = filter_answered(asked, constraints, checked={frozenset(first.tolist())})
    shown = {(q.kind, q.one[0], *q.other[:1]) for q in left}
    assert not [key for key in shown if key[0] == "merge"]  # third is one with second
    assert ("bridge", first[0]) in {(kind, row) for kind, row, *_ in shown}
    assert ("cluster", first[0]) not in shown
    assert ("cluster", second[0]) not in shown
    assert filter_answered(asked, Constraints(10)) == asked
