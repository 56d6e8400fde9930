"""Quality estimated without ground truth, against the truth the pairs were drawn from."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cdp.committee.pairs import make_pairs
from cdp.errors import ConfigError, DataError
from cdp.knn.graph import build_knn_graphs
from cdp.metrics.clustering import score_pairwise
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.group_pairs import compare_groups
from cdp.propagation.missed_pairs import MissedPairs
from cdp.propagation.quality import are_lists_full, estimate_quality
from cdp.propagation.threshold import TARGET_THRESHOLDS, choose_cut
from cdp.types import PairTable

pytestmark = pytest.mark.torch


def draw(seed, identities=300, strength=6.0):
    """Images come in tight atoms; all pairs between two atoms repeat one piece of evidence.

    That is what the estimates assume of real pairs: those between the same groups are far from
    independent. Every pair within a block of two identities is a candidate.
    """
    random = np.random.default_rng(seed)
    atom_identity = np.repeat(np.arange(identities), random.integers(1, 4, identities))
    atom = np.repeat(np.arange(len(atom_identity)), random.integers(1, 5, len(atom_identity)))
    identity = atom_identity[atom]
    block = identity // 2
    listed = [
        pair
        for b in range(identities // 2)
        for pair in itertools.combinations(np.flatnonzero(block == b), 2)
    ]
    pairs = np.array(listed)
    one, other = atom[pairs[:, 0]], atom[pairs[:, 1]]
    same_atom = one == other
    _, key = np.unique(one * len(atom_identity) + other, return_inverse=True)
    same = identity[pairs[:, 0]] == identity[pairs[:, 1]]
    # two normal classes at +-s/2 with variance s have log-odds equal to their value, plus the prior
    shared = random.normal(size=key.max() + 1)[key]
    value = np.where(same, 0.5, -0.5) * strength + shared * strength**0.5
    rate = same[~same_atom].mean()
    value = np.where(same_atom, 12.0, value + np.log(rate / (1 - rate)))
    return PairTable(pairs[:, 0], pairs[:, 1]), 1 / (1 + np.exp(-value)), identity


@pytest.mark.parametrize("strength", [6.0, 10.0])
def test_estimates_are_near_the_truth(strength):
    pairs, probability, identity = draw(0, strength=strength)
    label = agglomerate(pairs, probability, len(identity)).label
    precision, recall, f = score_pairwise(identity, label)
    found = estimate_quality(label, pairs, probability)
    assert found.f == pytest.approx(f, abs=0.05)
    assert found.precision == pytest.approx(precision, abs=0.06)
    assert found.recall == pytest.approx(recall, abs=0.06)


def test_certain_pairs_give_certain_clusters_and_a_wrong_row_has_the_least_confidence():
    listed = list(itertools.combinations(range(5), 2))
    pairs = PairTable(np.array([a for a, _ in listed]), np.array([b for _, b in listed]))
    sure = np.full(10, 0.999999)
    found = estimate_quality(np.zeros(5, np.int64), pairs, sure)
    assert found.expected_precision[0] > 0.999
    assert found.recall == 1
    doubtful = np.where(pairs.target == 4, 0.05, sure)
    found = estimate_quality(np.zeros(5, np.int64), pairs, doubtful)
    assert found.confidence.argmin() == 4
    # four of ten pairs hang on row 4
    assert found.expected_precision[0] == pytest.approx(0.62, abs=0.01)


def test_pairs_of_one_row_are_correlated():
    """Ten of .7 weigh as 10 / (1 + 9 / 2) independent ones."""
    pairs = PairTable(np.zeros(10, np.int64), np.arange(1, 11))
    found = estimate_quality(np.zeros(11, np.int64), pairs, np.full(10, 0.7))
    odds = np.log(0.7 / 0.3)
    assert found.confidence[0] == pytest.approx(1 / (1 + np.exp(-odds * 10 / 5.5)), abs=1e-6)
    np.testing.assert_allclose(found.confidence[1:], 0.7, atol=1e-6)


def test_groups_with_few_of_their_pairs_are_less_likely_one():
    listed = [*itertools.combinations(range(3), 2), *itertools.combinations(range(3, 8), 2), (2, 3)]
    pairs = PairTable(np.array([a for a, _ in listed]), np.array([b for _, b in listed]))
    group = np.repeat([0, 1], [3, 5])
    probability = np.append(np.full(len(listed) - 1, 0.9), 0.4)
    found = compare_groups(group, pairs, probability)
    assert (found.first.tolist(), found.second.tolist()) == ([0], [1])
    odds = np.log(0.4 / 0.6) - 0.5 * np.log(15)
    assert found.chance[0] == pytest.approx(1 / (1 + np.exp(-odds)))
    none = compare_groups(np.zeros(8, np.int64), pairs, probability)
    assert len(none.chance) == 0


def test_a_pair_weighs_as_often_as_it_is_listed():
    pairs, probability, identity = draw(0, strength=6.0)
    label = agglomerate(pairs, probability, len(identity)).label
    plain = estimate_quality(label, pairs, probability)
    alike = replace(pairs, listings=np.full(len(pairs), 3, np.int32))
    same = estimate_quality(label, alike, probability)
    assert (same.precision, same.recall) == pytest.approx((plain.precision, plain.recall))
    two = PairTable(np.array([0, 0]), np.array([1, 2]), np.array([1, 3], np.int32))
    odds = np.array([2.0, -1.0])
    apart = compare_groups(np.array([0, 1, 1]), two, 1 / (1 + np.exp(-odds)))
    # no pair within the second group: as many across as could be expected
    assert np.log(apart.chance / (1 - apart.chance)) == pytest.approx([(2 - 3) / 4])


def test_no_label_and_no_pair():
    none = PairTable(np.zeros(0, np.int64), np.zeros(0, np.int64))
    found = estimate_quality(np.full(3, -1), none, np.zeros(0))
    assert (found.precision, found.recall, found.f) == (None, None, None)
    assert "no two images share a cluster" in found.reasons[0]
    assert len(found.expected_precision) == 0
    np.testing.assert_array_equal(found.confidence, 0)


def test_target_precision_trades_recall():
    pairs, probability, identity = draw(1)
    found = agglomerate(pairs, probability, len(identity), threshold=0.2)
    options = {"pairs": pairs, "probability": probability, "loosest": 0.2}
    recall = []
    for target in (0.9, 0.97, 0.99):
        label = found.cut(choose_cut(found.cut, target_precision=target, **options))
        precision, got, _ = score_pairwise(identity, label)
        assert precision >= target - 0.02
        recall.append(got)
    assert recall == sorted(recall, reverse=True)
    with pytest.raises(ConfigError, match="target_precision"):
        choose_cut(found.cut, target_precision=1.0, **options)
    assert choose_cut(found.cut, target_precision=0.01, **options) == 0.2
    assert choose_cut(found.cut, target_precision=1 - 1e-9, **options) == TARGET_THRESHOLDS[-1]


def test_bad_input():
    one = PairTable(np.array([0]), np.array([1]))
    with pytest.raises(DataError, match="one probability"):
        estimate_quality(np.array([0, 0]), one, np.zeros(2))
    with pytest.raises(DataError, match="lie in"):
        estimate_quality(np.array([0, 0]), one, np.array([2.0]))


def test_an_estimate_can_be_withheld_with_reasons():
    pairs, probability, identity = draw(0)
    label = agglomerate(pairs, probability, len(identity)).label
    found = estimate_quality(label, pairs, probability)
    assert found.withhold("") is found
    half = found.withhold("lists are full", recall_only=True)
    assert (half.precision, half.recall, half.f) == (found.precision, None, None)
    whole = half.withhold("too few", "lists are full")
    assert (whole.precision, whole.reasons) == (None, ("lists are full", "too few"))
    np.testing.assert_array_equal(whole.confidence, found.confidence)
    assert not np.isnan(whole.expected_precision).any()
    hidden = whole.withhold_clusters()
    assert np.isnan(hidden.expected_precision).all()
    assert len(hidden.expected_precision) == len(found.expected_precision)


def test_pairs_that_no_list_names_lower_recall():
    pairs, probability, identity = draw(0)
    label = agglomerate(pairs, probability, len(identity)).label
    seen = estimate_quality(label, pairs, probability)
    missed = MissedPairs(np.array([[2, 0.2], [1000, 0.2]]))
    unseen = estimate_quality(label, pairs, probability, missed=missed)
    assert unseen.recall == pytest.approx(0.8 * seen.recall)
    assert unseen.precision == seen.precision
    assert unseen.f < seen.f


@pytest.mark.parametrize(("frames", "full"), [(30, True), (5, False), (200, False)])
def test_lists_filled_by_one_cluster_are_seen(frames, full):
    """Bursts of 30 frames fill lists of 10; 5 frames leave room; 200 were found across lists."""
    generator = np.random.default_rng(0)
    burst = np.repeat(np.arange(8), frames)
    rows = generator.normal(size=(8, 16))[burst] + 0.05 * generator.normal(size=(8 * frames, 16))
    pairs = make_pairs(build_knn_graphs([rows], 10, backend="exact"))
    assert are_lists_full(burst, pairs, 10) is full
