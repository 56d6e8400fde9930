"""The consensus split, against a slow one that recomputes every mean at every step."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.errors import ConfigError, DataError
from cdp.propagation import average_linkage
from cdp.propagation.average_linkage import LOG_ODDS_LIMIT, SCALE, agglomerate
from cdp.types import PairTable


def log_odds(p: float) -> float:
    return float(np.clip(np.log(p) - np.log1p(-p), -LOG_ODDS_LIMIT, LOG_ODDS_LIMIT))


def slow(pairs, probability, count, stop=0.0, max_size=10**9, listings=None):
    """Groups as sets of rows, exact fractions, everything recomputed; the naming rule as stated."""
    groups = {row: {row} for row in range(count)}
    weight = {
        (min(a, b), max(a, b)): Fraction(round(log_odds(float(p)) * SCALE), int(SCALE))
        for (a, b), p in zip(pairs, probability, strict=True)
    }
    times = dict.fromkeys(weight, 1)
    if listings is not None:
        times = dict(zip(weight, listings, strict=True))
    heights = []
    while True:
        between = {}
        for a, b in itertools.combinations(sorted(groups), 2):
            across = [(min(i, j), max(i, j)) for i in groups[a] for j in groups[b]]
            found = [pair for pair in across if pair in weight]
            if found:
                total = sum(times[pair] * weight[pair] for pair in found)
                between[a, b] = total / sum(times[pair] for pair in found)
        allowed = [
            (-mean, a, b)
            for (a, b), mean in between.items()
            if mean > Fraction(stop) and len(groups[a]) + len(groups[b]) <= max_size
        ]
        if not allowed:
            break
        mean, a, b = min(allowed)
        heights.append(float(-mean))
        keep, gone = (a, b) if len(groups[a]) >= len(groups[b]) else (b, a)
        groups[keep] |= groups.pop(gone)
    label = np.full(count, -1)
    clusters = sorted((min(g), g) for g in groups.values() if len(g) > 1)
    for number, (_, rows) in enumerate(clusters):
        label[list(rows)] = number
    return label, heights


@st.composite
def graphs(draw):
    count = draw(st.integers(2, 12))
    possible = list(itertools.combinations(range(count), 2))
    chosen = draw(st.lists(st.sampled_from(possible), unique=True, max_size=len(possible)))
    # few distinct values, so that ties are common
    value = st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.6, 0.8, 0.9, 0.9, 1.0])
    probability = [draw(value) for _ in chosen]
    return np.array(chosen, np.int64).reshape(-1, 2), np.array(probability), count


@given(graphs(), st.sampled_from([0.5, 0.7, 0.3]), st.sampled_from([None, 3, 5]))
@settings(max_examples=40, deadline=None)
def test_equals_the_slow_one(graph, threshold, max_size):
    pairs, probability, count = graph
    got = agglomerate(pairs, probability, count, threshold=threshold, max_size=max_size)
    with np.errstate(divide="ignore"):
        label, heights = slow(pairs, probability, count, log_odds(threshold), max_size or 10**9)
    np.testing.assert_array_equal(got.label, label)
    np.testing.assert_allclose(got.height, heights, atol=1e-8)


@pytest.mark.parametrize("batch", [1, 40, 10**6])
def test_batches_of_components_change_nothing(batch, monkeypatch):
    pairs, probability, count, _ = planted(4, noise=0.7)
    want = agglomerate(pairs, probability, count, threshold=0.6)
    monkeypatch.setattr(average_linkage, "BATCH_PAIRS", batch)
    merged = []
    whole = average_linkage._merge_batch

    def note(table, fixed, chosen, rows, *rest):
        merged.append(len(chosen))
        return whole(table, fixed, chosen, rows, *rest)

    monkeypatch.setattr(average_linkage, "_merge_batch", note)
    got = agglomerate(pairs, probability, count, threshold=0.6)
    np.testing.assert_array_equal(got.label, want.label)
    np.testing.assert_array_equal(got.height, want.height)
    assert len(merged) == 1 if batch == 10**6 else len(merged) > 1
    assert sum(merged) < len(pairs)  # pairs between components are left out


@given(graphs(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_a_pair_weighs_as_often_as_it_is_listed(graph, random):
    pairs, probability, count = graph
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs, probability = pairs[order], probability[order]
    listings = np.array([random.randint(1, 6) for _ in pairs], np.int32)
    got = agglomerate(PairTable(pairs[:, 0], pairs[:, 1], listings), probability, count)
    with np.errstate(divide="ignore"):
        label, heights = slow(pairs, probability, count, listings=listings.tolist())
    np.testing.assert_array_equal(got.label, label)
    np.testing.assert_allclose(got.height, heights, atol=1e-8)


@given(graphs(), st.randoms())
@settings(max_examples=50, deadline=None)
def test_order_and_orientation_of_the_pairs_do_not_matter(graph, random):
    pairs, probability, count = graph
    order = list(range(len(pairs)))
    random.shuffle(order)
    turned = pairs[order][:, ::-1] if random.random() < 0.5 else pairs[order]
    one = agglomerate(pairs, probability, count)
    other = agglomerate(turned, probability[order], count)
    np.testing.assert_array_equal(one.label, other.label)
    np.testing.assert_array_equal(one.height, other.height)


def planted(seed, identities=150, within=0.6, noise=1.5):
    random = np.random.default_rng(seed)
    identity = random.integers(0, identities, identities * 8)
    count = len(identity)
    a, b = random.integers(0, count, (2, count * 10))
    same_a = random.integers(0, count, count * 5)
    order = np.argsort(identity, kind="stable")
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    same_b = order[np.clip(place[same_a] + random.integers(-6, 7, len(same_a)), 0, count - 1)]
    pairs = np.stack([np.r_[a, same_a], np.r_[b, same_b]], 1)
    pairs = np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], 1), axis=0)
    truth = identity[pairs[:, 0]] == identity[pairs[:, 1]]
    z = np.where(truth, 2.0, -2.0) + random.normal(size=len(pairs)) * noise
    return pairs, 1 / (1 + np.exp(-z)), count, identity


@pytest.mark.parametrize("seed", range(3))
def test_merges_never_gain_height_and_prefixes_are_stricter_cuts(seed):
    pairs, probability, count, _ = planted(seed)
    whole = agglomerate(pairs, probability, count)
    assert (np.diff(whole.height) <= 1e-9).all()
    for threshold in (0.5, 0.7, 0.9, 0.99):
        again = agglomerate(pairs, probability, count, threshold=threshold)
        np.testing.assert_array_equal(whole.cut(threshold), again.label)


def test_all_pairs_between_two_groups_decide():
    """One likely pair between two groups of ten is outweighed; a component cut joins them."""
    one, other = (
        list(itertools.combinations(range(10), 2)),
        [(a + 10, b + 10) for a, b in itertools.combinations(range(10), 2)],
    )
    across = [(a, a + 10) for a in range(10)]
    pairs = np.array(one + other + across)
    probability = np.array([0.95] * 90 + [0.94] + [0.1] * 9)
    np.testing.assert_array_equal(agglomerate(pairs, probability, 20).label, np.repeat([0, 1], 10))


def test_a_hundred_thousand_rows_of_chains_and_stars():
    """Shapes that break a naive merge: a path (deep) and a star (one group of high degree)."""
    count = 100_000
    path = np.stack([np.arange(count - 1), np.arange(1, count)], 1)
    assert agglomerate(path, np.full(count - 1, 0.9), count).cluster_count == 1
    star = np.stack([np.zeros(count - 1, np.int64), np.arange(1, count)], 1)
    probability = np.linspace(0.51, 0.99, count - 1)
    assert agglomerate(star, probability, count).cluster_count == 1


def test_small_and_empty_input():
    empty = agglomerate(np.zeros((0, 2), np.int64), np.zeros(0), 3)
    np.testing.assert_array_equal(empty.label, [-1, -1, -1])
    assert empty.cluster_count == 0
    assert len(agglomerate(np.zeros((0, 2), np.int64), np.zeros(0), 0).label) == 0
    table = PairTable(np.array([0]), np.array([2]))
    np.testing.assert_array_equal(agglomerate(table, np.array([0.9]), 3).label, [0, -1, 0])
    # a self pair is nothing, a repeated pair counts once and at its highest
    got = agglomerate(np.array([[1, 1], [0, 1], [1, 0]]), np.array([1.0, 0.9, 0.01]), 2)
    np.testing.assert_array_equal(got.label, [0, 0])


def test_bad_input_is_one_clear_message():
    pairs = np.array([[0, 1]])
    with pytest.raises(DataError, match="rows go from 0 to 0"):
        agglomerate(pairs, np.array([0.5]), 1)
    with pytest.raises(DataError, match="cosines"):
        agglomerate(pairs, np.array([-0.2]), 2)
    with pytest.raises(DataError, match="NaN"):
        agglomerate(pairs, np.array([np.nan]), 2)
    with pytest.raises(DataError, match="one probability a pair"):
        agglomerate(pairs, np.array([0.5, 0.5]), 2)
    with pytest.raises(DataError, match="PairTable"):
        agglomerate(np.array([[0.0, 1.0]]), np.array([0.5]), 2)
    with pytest.raises(ConfigError, match="threshold"):
        agglomerate(pairs, np.array([0.5]), 2, threshold=1.0)
    with pytest.raises(ConfigError, match="max_size"):
        agglomerate(pairs, np.array([0.5]), 2, max_size=0)
