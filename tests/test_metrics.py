"""Scores against brute force over all pairs, hand-made cases and properties."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score

from cdp import metrics
from cdp.errors import DataError
from cdp.metrics import verification


def unit(rng, count, width=8):
    vectors = rng.normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@st.composite
def clusterings(draw, most=24):
    count = draw(st.integers(1, most))
    truth = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    label = draw(st.lists(st.integers(-1, 5), min_size=count, max_size=count))
    return np.array(truth), np.array(label)


def together(label, i, j):
    return label[i] == label[j] and (label[i] != -1 or i == j)


# --- partitions


@given(clusterings())
def test_pairwise_is_what_counting_pairs_gives(case):
    truth, label = case
    pairs = list(itertools.combinations(range(len(truth)), 2))
    both = sum(truth[i] == truth[j] and together(label, i, j) for i, j in pairs)
    true = sum(truth[i] == truth[j] for i, j in pairs)
    predicted = sum(together(label, i, j) for i, j in pairs)
    precision, recall, f = metrics.score_pairwise(truth, label)
    assert precision == (both / predicted if predicted else 1.0)
    assert recall == (both / true if true else 1.0)
    assert f == pytest.approx(
        2 * precision * recall / (precision + recall) if precision + recall else 0.0
    )


@given(clusterings())
def test_bcubed_is_what_averaging_over_images_gives(case):
    truth, label = case
    everyone = range(len(truth))
    precision, recall = [], []
    for i in everyone:
        cluster = [j for j in everyone if together(label, i, j)]
        own = [j for j in everyone if truth[i] == truth[j]]
        right = len(set(cluster) & set(own))
        precision.append(right / len(cluster))
        recall.append(right / len(own))
    scored = metrics.score_bcubed(truth, label)
    assert scored[:2] == pytest.approx((np.mean(precision), np.mean(recall)))


@given(clusterings(), st.integers(0, 3))
def test_scores_with_distractors_are_what_counting_gives(case, first_known):
    """Images of identities below `first_known` are distractors."""
    truth, label = case
    truth = np.where(truth < first_known, -1, truth)
    everyone = range(len(truth))
    known = [i for i in everyone if truth[i] >= 0]
    shares = [
        [
            np.mean([truth[j] == truth[i] for j in everyone if together(label, i, j)]),
            np.mean([together(label, i, j) for j in everyone if truth[j] == truth[i]]),
        ]
        for i in known
    ]
    precision, recall = np.mean(shares, axis=0) if shares else (1.0, 1.0)
    expected = (precision, recall, 2 * precision * recall / (precision + recall))
    assert metrics.score_with_distractors(truth, label) == pytest.approx(expected)


@given(clusterings())
def test_nmi_agrees_with_scikit_learn(case):
    truth, label = case
    alone = label == -1
    singled = label.copy()
    singled[alone] = 100 + np.arange(alone.sum())
    expected = normalized_mutual_info_score(truth, singled)
    assert metrics.score_nmi(truth, label) == pytest.approx(expected, abs=1e-9)


@given(clusterings(), st.randoms(use_true_random=False))
def test_scores_ignore_order_and_names(case, random):
    truth, label = case
    order = list(range(len(truth)))
    random.shuffle(order)
    renamed = np.where(label == -1, -1, 1000 - 7 * label)
    for score in (metrics.score_pairwise, metrics.score_bcubed, metrics.score_nmi):
        assert score(truth[order] * 3 + 1, renamed[order]) == pytest.approx(score(truth, label))


@given(clusterings())
def test_precision_and_recall_swap_with_truth_and_label(case):
    truth, label = case
    label = label + 1  # no -1: only truth may not hold it
    for score in (metrics.score_pairwise, metrics.score_bcubed):
        there, back = score(truth, label), score(label, truth)
        assert there == pytest.approx((back[1], back[0], back[2]))


def test_a_perfect_clustering_scores_one():
    truth = np.array([3, 3, 3, 9, 9, 4])
    for label in (np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, -1])):
        assert metrics.score_pairwise(truth, label) == (1.0, 1.0, 1.0)
        assert metrics.score_bcubed(truth, label) == pytest.approx((1.0, 1.0, 1.0))
        assert metrics.score_nmi(truth, label) == pytest.approx(1.0)


def test_discarding_everything_costs_all_recall():
    truth = np.array([0, 0, 1, 1])
    label = np.full(4, -1)
    assert metrics.score_pairwise(truth, label) == (1.0, 0.0, 0.0)
    assert metrics.score_bcubed(truth, label)[:2] == (1.0, 0.5)


def test_one_cluster_for_all():
    truth = np.array([0, 0, 1, 1])
    assert metrics.score_pairwise(truth, np.zeros(4, int))[:2] == (pytest.approx(2 / 6), 1.0)
    assert metrics.score_nmi(truth, np.zeros(4, int)) == 0.0
    assert metrics.score_nmi(np.zeros(4, int), np.zeros(4, int)) == 1.0


def test_no_pair_and_no_image():
    single = np.array([0, 1, 2])
    assert metrics.score_pairwise(single, np.full(3, -1)) == (1.0, 1.0, 1.0)
    assert metrics.score_pairwise(single, np.zeros(3, int)) == (0.0, 1.0, 0.0)
    empty = np.array([], dtype=np.int64)
    assert metrics.score_pairwise(empty, empty) == (1.0, 1.0, 1.0)
    assert metrics.score_bcubed(empty, empty) == (1.0, 1.0, 1.0)
    assert metrics.score_nmi(empty, empty) == 1.0


def test_a_million_images_are_scored_without_listing_pairs():
    truth = np.arange(1_000_000) // 1000
    precision, recall, _ = metrics.score_pairwise(truth, truth // 2)
    assert recall == 1.0
    assert precision == pytest.approx(999 / 1999)


def test_bad_partitions_are_refused():
    with pytest.raises(DataError, match="one shape"):
        metrics.score_pairwise(np.zeros(3, int), np.zeros(4, int))
    with pytest.raises(DataError, match="known"):
        metrics.score_bcubed(np.array([0, -1]), np.array([0, 0]))
    with pytest.raises(DataError, match="integers"):
        metrics.score_nmi(np.array([0.5, 1.0]), np.array([0, 0]))
    with pytest.raises(DataError, match="labels"):
        metrics.score_pairwise(np.array([0, 1]), np.array([0, -2]))


# --- probabilities


def test_calibration_by_hand():
    probability = np.array([0.1, 0.1, 0.9, 0.9, 1.0, 0.5])
    same = np.array([False, True, True, True, True, False])
    curve = metrics.measure_reliability(probability, same, bins=2)
    assert curve.weight.tolist() == [2, 4]
    assert curve.observed_rate == pytest.approx([0.5, 0.75])
    assert curve.mean_probability == pytest.approx([0.1, 0.825])
    assert curve.expected_calibration_error == pytest.approx((2 * 0.4 + 4 * 0.075) / 6)


def test_a_weight_counts_as_so_many_pairs():
    rng = np.random.default_rng(0)
    probability, same, weight = rng.random(300), rng.random(300) < 0.4, rng.integers(0, 4, 300)
    weighted = metrics.measure_reliability(probability, same, weight=weight)
    repeated = metrics.measure_reliability(np.repeat(probability, weight), np.repeat(same, weight))
    for name in ("lower", "mean_probability", "observed_rate", "weight"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name))


def test_calibrated_draws_have_a_small_error_and_shifted_ones_a_large_one():
    rng = np.random.default_rng(0)
    probability = rng.random(50_000)
    same = rng.random(50_000) < probability
    assert metrics.measure_reliability(probability, same).expected_calibration_error < 0.02
    assert metrics.measure_reliability(probability**3, same).expected_calibration_error > 0.1


def test_an_empty_bin_is_nan_and_harmless():
    curve = metrics.measure_reliability(np.array([0.0, 1.0]), np.array([False, True]), bins=4)
    assert curve.expected_calibration_error == 0.0
    assert np.isnan(curve.observed_rate[1:3]).all()
    assert curve.lower.tolist() == [0, 0.25, 0.5, 0.75]


def test_bad_probabilities_are_refused():
    for probability in ([1.5], [-0.1], [math.nan], []):
        with pytest.raises(DataError):
            metrics.measure_reliability(np.array(probability), np.ones(len(probability), bool))
    with pytest.raises(DataError, match="one weight a pair"):
        metrics.measure_reliability(np.ones(2), np.ones(2, bool), weight=np.ones(3))


# --- verification


def test_verification_learns_the_threshold_from_the_other_folds():
    similarity = np.array([0.9, 0.1, 0.8, 0.2, 0.95, 0.6])
    same = np.array([True, False, True, False, True, False])
    fold = np.array([0, 0, 1, 1, 2, 2])
    # Fold 2's impostor at .6 passes the threshold of folds 0 and 1 (midway from .2 to .8).
    mean, std = metrics.verification_accuracy(similarity, same, fold)
    assert mean == pytest.approx((1 + 1 + 0.5) / 3)
    assert std == pytest.approx(np.std([1, 1, 0.5]))


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 40))
def test_best_threshold_is_the_best_of_all(seed, count):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 6, count) / 5
    same = rng.random(count) < 0.5
    chosen = verification._best_threshold(similarity, same)
    candidates = np.concatenate([similarity, [-1.0]])
    best = max(np.mean((similarity > t) == same) for t in candidates)
    assert np.mean((similarity > chosen) == same) == best


def test_constant_similarity_is_no_better_than_chance():
    same = np.tile([True, False], 20)
    mean, _ = metrics.verification_accuracy(np.ones(40), same, np.arange(40) // 4)
    assert mean == 0.5


def test_verification_needs_two_folds_and_finite_values():
    with pytest.raises(DataError, match="two folds"):
        metrics.verification_accuracy(np.ones(4), np.ones(4, bool), np.zeros(4, int))
    with pytest.raises(DataError, match="finite"):
        metrics.verification_accuracy(np.full(4, np.nan), np.ones(4, bool), np.arange(4))


def test_tar_at_far_by_hand():
    impostor = np.arange(100) / 100
    genuine = np.array([0.85, 0.895, 0.9, 0.99])
    assert metrics.threshold_at_far(impostor, 0.1) == 0.89
    assert metrics.tar_at_far(genuine, impostor, 0.1) == 0.75
    assert metrics.tar_at_far(genuine, impostor, 0.0) == 0.0  # .99 ties with the best impostor


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 0.99))
def test_the_threshold_keeps_the_rate_and_is_the_lowest(seed, far):
    impostor = np.random.default_rng(seed).integers(0, 20, 60) / 20
    threshold = metrics.threshold_at_far(impostor, far)
    assert np.mean(impostor > threshold) <= far + 1e-9
    lower = impostor[impostor < threshold]
    if lower.size:
        assert np.mean(impostor > lower.max()) > far - 1e-9


def test_pairs_are_balanced_disjoint_and_repeatable():
    rng = np.random.default_rng(1)
    identity = np.concatenate([rng.integers(0, 80, 600), np.arange(80, 120)])
    pairs = metrics.sample_verification_pairs(identity, 25, 5, seed=3)
    assert len(pairs) == 2 * 25 * 5
    assert (np.bincount(pairs.fold[pairs.same]) == 25).all()
    assert (np.bincount(pairs.fold[~pairs.same]) == 25).all()
    assert ((identity[pairs.source] == identity[pairs.target]) == pairs.same).all()
    assert (pairs.source != pairs.target).all()
    listed = {tuple(sorted(pair)) for pair in zip(pairs.source, pairs.target, strict=True)}
    assert len(listed) == len(pairs)
    fold_of: dict[int, int] = {}
    for row, fold in zip(
        np.concatenate([pairs.source, pairs.target]), np.tile(pairs.fold, 2), strict=True
    ):
        assert fold_of.setdefault(int(identity[row]), int(fold)) == fold
    again = metrics.sample_verification_pairs(identity, 25, 5, seed=3)
    assert (again.source == pairs.source).all()
    assert (again.target == pairs.target).all()
    other = metrics.sample_verification_pairs(identity, 25, 5, seed=4)
    assert (other.source != pairs.source).any()


def test_an_identity_with_many_images_does_not_dominate():
    identity = np.concatenate([np.zeros(500, int), np.repeat(np.arange(1, 40), 2)])
    pairs = metrics.sample_verification_pairs(identity, 10, 2, seed=0)
    assert (identity[pairs.source[pairs.same]] == 0).sum() <= 1


def test_scarce_folds_hold_what_there_is():
    identity = np.repeat(np.arange(4), 2)
    pairs = metrics.sample_verification_pairs(identity, 50, 2, seed=0)
    assert np.bincount(pairs.fold).tolist() == [4, 4]
    assert pairs.same.sum() == 4


def test_too_few_identities_are_refused():
    with pytest.raises(DataError, match="identities"):
        metrics.sample_verification_pairs(np.repeat(np.arange(5), 4), 10, 10)
    with pytest.raises(DataError, match="two"):
        metrics.sample_verification_pairs(np.arange(100), 10, 10)


def test_unranking_reaches_every_pair_once():
    pair = verification._genuine_pairs(
        np.array([7]), np.array([30]), 10**6, np.random.default_rng(0)
    )
    assert {tuple(p) for p in (pair - 7).tolist()} == set(itertools.combinations(range(30), 2))


def test_compare_pairs_is_the_dot_product_whatever_the_block():
    rng = np.random.default_rng(0)
    vectors = unit(rng, 30)
    source, target = rng.integers(0, 30, (2, 100))
    expected = (vectors @ vectors.T)[source, target]
    for block in (1, 7, 1000):
        found = metrics.compare_pairs(vectors, source, target, block=block)
        np.testing.assert_allclose(found, expected, atol=1e-6)


# --- identification


def slow_rank(probe, probe_identity, gallery, gallery_identity):
    """Sort each probe's gallery, mates last on a tie, and look for the first mate."""
    ranks = []
    for vector, wanted in zip(probe, probe_identity, strict=True):
        listed = sorted(
            (-float(vector @ other), int(wanted == name))
            for other, name in zip(gallery, gallery_identity, strict=True)
        )
        ranks.append([mate for _, mate in listed].index(1) + 1)
    return np.array(ranks)


def test_rank_k_is_what_sorting_gives():
    rng = np.random.default_rng(5)
    name = np.arange(20)
    gallery, probe = unit(rng, 20), unit(rng, 50)
    probe_identity = rng.integers(0, 20, 50)
    distractor = unit(rng, 15)
    rank = slow_rank(
        probe,
        probe_identity,
        np.concatenate([gallery, distractor]),
        np.concatenate([name, np.full(15, -5)]),
    )
    for block in (1, 16, 4096):
        found = metrics.rank_k(
            probe, probe_identity, gallery, name, (1, 5, 35), distractor=distractor, block=block
        )
        assert found == {k: pytest.approx(np.mean(rank <= k)) for k in (1, 5, 35)}
    assert found[35] == 1.0


def test_a_tie_is_held_against_the_system():
    same = np.array([[1.0, 0.0]], np.float32)
    assert metrics.rank_k(same, [0], np.repeat(same, 2, axis=0), [0, 1], (1, 2)) == {1: 0.0, 2: 1.0}


def test_distractors_never_help():
    rng = np.random.default_rng(2)
    gallery, probe = unit(rng, 10), unit(rng, 30)
    identity = rng.integers(0, 10, 30)
    without = metrics.rank_k(probe, identity, gallery, np.arange(10), (1, 3))
    distracted = metrics.rank_k(
        probe, identity, gallery, np.arange(10), (1, 3), distractor=unit(rng, 40)
    )
    assert all(distracted[k] <= without[k] for k in (1, 3))


def test_probes_without_a_mate_are_refused_in_the_closed_set():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="mate"):
        metrics.rank_k(unit(rng, 2), [0, 9], unit(rng, 3), [0, 1, 2])
    with pytest.raises(DataError, match="width"):
        metrics.rank_k(unit(rng, 2), [0, 1], unit(rng, 3, width=5), [0, 1, 2])


def test_open_set_by_hand():
    gallery = np.eye(3, dtype=np.float32)
    angle = np.array([0.9, 0.6, 0.7, 0.1, 0.95], np.float32)
    rest = np.sqrt(1 - angle**2)
    zero = np.zeros(5, np.float32)
    # All lean towards gallery image 0 by `angle`, the rest of their length lies on image 2's axis.
    probe = np.stack([angle, zero, -rest], axis=1)
    identity = [0, 0, 8, 9, 1]  # two mated with image 0, two unmated, one mated with image 1
    at_half = metrics.tpir_at_fpir(probe, identity, gallery, [0, 1, 2], 0.5, rank=1)
    assert at_half == pytest.approx(2 / 3)  # threshold .1; the last one's mate is at 0
    at_zero = metrics.tpir_at_fpir(probe, identity, gallery, [0, 1, 2], 0.0)
    assert at_zero == pytest.approx(1 / 3)  # threshold .7
    with pytest.raises(DataError, match="unmated"):
        metrics.tpir_at_fpir(probe[:2], [0, 0], gallery, [0, 1, 2], 0.1)


def test_a_looser_rank_or_rate_never_lowers_tpir():
    rng = np.random.default_rng(9)
    gallery, probe = unit(rng, 30), unit(rng, 200)
    identity = rng.integers(0, 60, 200)
    score = np.array(
        [
            [
                metrics.tpir_at_fpir(probe, identity, gallery, np.arange(30), fpir, rank=rank)
                for fpir in (0.01, 0.1, 0.3)
            ]
            for rank in (1, 5, 20)
        ]
    )
    assert (np.diff(score, axis=0) >= 0).all()
    assert (np.diff(score, axis=1) >= 0).all()


def test_gallery_has_one_image_an_identity():
    identity = np.random.default_rng(0).integers(0, 30, 100)
    probe, gallery = metrics.sample_probe_gallery(identity, seed=1)
    assert sorted(identity[gallery]) == sorted(set(identity))
    assert sorted(np.concatenate([probe, gallery])) == list(range(100))


# --- summaries


def test_bootstrap_by_identity_is_wider_than_by_image():
    rng = np.random.default_rng(0)
    identity = np.repeat(np.arange(40), 25)
    value = (rng.random(40)[identity] > rng.random(1000)).astype(float)
    low, high = metrics.bootstrap_interval(value, identity)
    naive_low, naive_high = metrics.bootstrap_interval(value, np.arange(1000))
    assert low < value.mean() < high
    assert high - low > 1.5 * (naive_high - naive_low)
    assert (low, high) == metrics.bootstrap_interval(value, identity)


def test_bootstrap_of_one_identity_or_one_value():
    assert metrics.bootstrap_interval(np.array([0.0, 1.0]), np.array([4, 4])) == (0.5, 0.5)
    assert metrics.bootstrap_interval(np.ones(10), np.arange(10)) == (1.0, 1.0)
    with pytest.raises(DataError):
        metrics.bootstrap_interval(np.ones(3), np.zeros(4, int))


def test_gap_closed_of_the_paper():
    assert metrics.gap_closed(61.78, 78.18, 78.52) == pytest.approx(0.98, abs=0.001)
    assert metrics.gap_closed(0.5, 0.4, 0.6) == pytest.approx(-1.0)
    assert math.isnan(metrics.gap_closed(0.7, 0.8, 0.7))
