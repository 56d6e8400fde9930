"""Questions: worth is the number of wrong pairs an answer removes, and the best come first."""

from dataclasses import replace

import numpy as np
import pytest

from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.missed_pairs import MissedPairs
from cdp.propagation.quality import estimate_quality
from cdp.propagation.representatives import link_rows
from cdp.review.constraints import Constraints, apply_constraints, find_conflict, settle_pairs
from cdp.review.questions import (
    QuestionRanking,
    filter_answered,
    find_new_clusters,
    rank_questions,
)
from cdp.types import UNLABELLED, PairTable


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


def draw_rings(random, sizes=(60, 45, 30, 20, 12, 6, 3), reach=5):
    """Sparse pairs of rows of a few identities, each with its next ones, and some between them.

    Likely pairs join the first two, and the next two.
    """
    found, start = {(0, 60): 0.9, (1, 61): 0.95, (105, 135): 0.8, (110, 140): 0.97}, 0
    for size in sizes:
        for row in range(size):
            for step in range(1, min(reach, size - 1) + 1):
                one, other = sorted((row, (row + step) % size))
                found[start + one, start + other] = random.uniform(0.6, 1)
        start += size
    for one, other in random.integers(0, start, (60, 2)):
        if one != other:
            found.setdefault((min(one, other), max(one, other)), random.uniform(0, 0.4))
    table = np.array(sorted(found))
    listings = random.integers(1, 5, len(table)).astype(np.int32)
    probability = np.array([found[key] for key in sorted(found)], np.float32)
    return PairTable(table[:, 0], table[:, 1], listings), probability, start


def draw_decision(random, constraints, label):
    """One more decision on one or two clusters, or the undo of an earlier one."""
    rows = [np.flatnonzero(label == each) for each in range(int(label.max()) + 1)]
    one, other = random.integers(0, len(rows), 2)
    kind = random.integers(5)
    if kind == 0:
        return replace(constraints, same=(*constraints.same, np.union1d(rows[one], rows[other])))
    if kind == 1:
        half = random.permutation(rows[one])
        parts = half[: len(half) // 2], half[len(half) // 2 :]
        return replace(constraints, apart=(*constraints.apart, parts))
    if kind == 2:
        return replace(constraints, rejected=np.append(constraints.rejected, rows[one][:1]))
    if kind == 3 and constraints.same:
        return replace(constraints, same=constraints.same[1:])
    return replace(constraints, apart=constraints.apart[1:])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("near_equal", [False, True])
def test_ranking_after_an_answer_is_ranking_from_the_start(seed, near_equal):
    random = np.random.default_rng(seed)
    pairs, probability, count = draw_rings(random)
    representative = np.arange(count)
    if near_equal:
        representative = np.repeat(np.arange(count) * 2, 2)[: 2 * count - 20]
        representative = np.append(representative, np.arange(2 * count - 20, 2 * count - 10))
        pairs, probability = link_rows(pairs, probability, representative, listings=4)
        count = len(representative)
    published = agglomerate(pairs, probability, count, threshold=0.5).label
    missed = MissedPairs(np.array([[2, 0.2], [9, 0.1]]), 1.0)
    ranking = QuestionRanking(pairs, representative, missed=missed)
    constraints, label, agreed = Constraints(count, rejected=np.empty(0, np.int64)), published, 0
    for _ in range(25):
        settled = settle_pairs(pairs, probability, constraints)
        label = apply_constraints(published, pairs, settled, constraints, threshold=0.5)
        found = ranking.rank(label, settled)
        expected = rank_questions(label, pairs, settled, representative=representative)
        assert [list_values(each) for each in found] == [list_values(each) for each in expected]
        whole = estimate_quality(label, pairs, settled, representative, missed=missed)
        assert (ranking.quality.precision, ranking.quality.f) == (whole.precision, whole.f)
        np.testing.assert_array_equal(ranking.quality.confidence, whole.confidence)
        more = draw_decision(random, constraints, label)
        agreed += find_conflict(more) is None
        constraints = constraints if find_conflict(more) else more
    assert agreed > 5


def list_values(question):
    """What a question holds, comparable."""
    return (
        question.kind, question.one.tolist(), question.other.tolist(), question.chance,
        question.worth,
    )  # fmt: skip


def test_an_answer_merges_its_own_clusters_again(monkeypatch):
    pairs, probability, count = draw_rings(np.random.default_rng(0))
    label = agglomerate(pairs, probability, count, threshold=0.5).label
    merged = []

    def watch(given, *others, **named):
        merged.append(set(np.unique(label[given.source]).tolist()))
        return agglomerate(given, *others, **named)

    monkeypatch.setattr("cdp.review.questions.agglomerate", watch)
    monkeypatch.setattr("cdp.propagation.thin_merges.agglomerate", watch)
    ranking = QuestionRanking(pairs)
    ranking.rank(label, probability)
    clusters = set(range(int(label.max()) + 1))
    assert merged[0] == clusters
    assert len(merged[1]) > 1, "some clusters are large and sparse"
    merged.clear()
    ranking.rank(label, probability)
    assert set().union(*merged) == set()
    rows = np.flatnonzero(label == 0)
    accepted = settle_pairs(pairs, probability, Constraints(count, same=(rows,)))
    ranking.rank(label, accepted)
    assert set().union(*merged) == {0}


def test_clusters_are_new_where_their_rows_are():
    before = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3, -1, -1])
    now = np.array([1, 1, 0, 0, 2, 2, -1, 3, 3, 3, -1])
    assert find_new_clusters(before, now).tolist() == [False, False, True, True]
    assert find_new_clusters(now, before).tolist() == [False, False, True, True]
    nobody = np.full(11, UNLABELLED)
    assert find_new_clusters(nobody, now).all()
    assert find_new_clusters(now, nobody).tolist() == []
    split = np.array([0, 0, 0, 1, 1])
    assert find_new_clusters(np.zeros(5, np.int64), split).tolist() == [True, True]
    assert find_new_clusters(split, np.zeros(5, np.int64)).tolist() == [True]
