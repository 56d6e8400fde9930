"""Prior-shift correction: the positive rate of an unlabelled set."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.mediator.prior_shift import (
    correct_evenly,
    correct_prior,
    keep_prior,
    leave_prior,
    weigh_images,
)
from cdp.metrics.calibration import measure_reliability
from cdp.types import PairTable

pytestmark = pytest.mark.torch


def draw_scores(same: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """Probabilities at `rate` of pairs with one feature: 1 or -1 plus noise."""
    feature = np.random.default_rng(seed).normal(np.where(same, 1.0, -1.0), 1.0)
    return 1 / (1 + (1 - rate) / rate * np.exp(-2 * feature))


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.28, 0.4, 0.7])
def test_a_known_shift_is_recovered(rate):
    same = np.random.default_rng(1).random(60_000) < rate
    probability = draw_scores(same, 0.4, 2)
    known = draw_scores(same, rate, 2)
    corrected = correct_prior(probability, 0.4)
    assert corrected.rate == pytest.approx(rate, abs=0.01)
    assert corrected.probability.dtype == np.float32
    assert np.abs(corrected.probability - known).mean() < 0.01
    assert measure_reliability(corrected.probability, same).expected_calibration_error < 0.01


def test_it_finds_the_fixed_point_of_em():
    """The fixed point of the EM steps of Saerens et al. (2002), iterated plainly."""
    random = np.random.default_rng(3)
    probability = draw_scores(random.random(5000) < 0.2, 0.3, 4)
    pair_weight = random.random(5000)
    for weight in (None, pair_weight):
        rate = 0.3
        for _ in range(3000):
            true = rate / 0.3 * probability
            false = (1 - rate) / 0.7 * (1 - probability)
            rate = np.average(true / (true + false), weights=weight)
        assert correct_prior(probability, 0.3, pair_weight=weight).rate == pytest.approx(
            rate, abs=1e-6
        )


def draw_set(sizes: list[int], seed: int) -> tuple[PairTable, np.ndarray, np.ndarray]:
    """All positive pairs and ten negative ones an image; the number of images of each pair's
    identity, 0 for a negative pair; and of the identity of each image."""
    identity = np.repeat(np.arange(len(sizes)), sizes)
    count = len(identity)
    low, high = np.nonzero(np.triu(identity[:, None] == identity, 1))
    random = np.random.default_rng(seed)
    one, other = np.arange(count).repeat(10), random.integers(0, count, 10 * count)
    negative = identity[one] != identity[other]
    ends = np.unique(np.sort(np.stack([one[negative], other[negative]], 1), 1), axis=0)
    size = np.array(sizes)[identity]
    pairs = PairTable(np.r_[low, ends[:, 0]], np.r_[high, ends[:, 1]])
    return pairs, np.r_[size[low], np.zeros(len(ends), np.int64)], size


def score_set(pair_size: np.ndarray, rate: float, share: float, seed: int) -> np.ndarray:
    """Probabilities at `rate`; identities of twenty have `share` of the positive pairs, and easy
    ones."""
    centre = {0: -1.5, 3: 1.5, 20: 4.0}
    feature = np.random.default_rng(seed).normal([centre[size] for size in pair_size])
    negative, few, many = (np.exp(-((feature - middle) ** 2) / 2) for middle in centre.values())
    positive = rate * ((1 - share) * few + share * many)
    return positive / (positive + (1 - rate) * negative)


def weigh(pairs: PairTable, probability: np.ndarray, count: int) -> float:
    return float(np.average(probability, weights=weigh_images(pairs, probability, count)))


def test_identities_with_many_easy_pairs_do_not_dominate_the_rate():
    """Identities of twenty are easy; the unlabelled set has more of them, and singletons."""
    labelled, pair_size, size = draw_set([3] * 300 + [20] * 4, 5)
    positive, easy = pair_size > 0, pair_size == 20
    rate, share = positive.mean(), easy.sum() / positive.sum()
    probability = score_set(pair_size, rate, share, 7)
    even_rate = weigh(labelled, probability, len(size))
    pairs, pair_size, size = draw_set([3] * 100 + [20] * 40 + [1] * 900, 6)
    same = pair_size > 0
    probability = score_set(pair_size, rate, share, 8)
    plain = correct_prior(probability, rate)
    weighted = correct_evenly(probability, rate, even_rate, pairs, len(size))
    rest = pair_size != 20
    excess = [abs(found.probability[rest].sum() - same[rest].sum()) for found in (plain, weighted)]
    assert excess[1] < 0.9 * excess[0]
    assert weighted.rate == pytest.approx(weighted.probability.mean(), abs=1e-6)


def test_pairs_of_images_with_many_positives_weigh_less():
    pairs = PairTable(np.array([0, 0, 1, 3]), np.array([1, 2, 2, 4]))
    pair_weight = weigh_images(pairs, np.array([1.0, 1.0, 1.0, 0.0]), 5)
    np.testing.assert_allclose(pair_weight, [9**-0.2, 9**-0.2, 9**-0.2, 1])


def test_a_set_like_the_labelled_one_is_unchanged():
    pairs, pair_size, size = draw_set([3] * 300 + [20] * 4 + [1] * 200, 8)
    same = pair_size > 0
    probability = draw_scores(same, same.mean(), 9)
    even_rate = weigh(pairs, probability, len(size))
    found = correct_evenly(probability, same.mean(), even_rate, pairs, len(size))
    np.testing.assert_allclose(found.probability, probability, atol=1e-3)
    assert found.rate == pytest.approx(probability.mean(), abs=1e-3)


def test_at_the_edges():
    nothing = PairTable(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert correct_prior(np.zeros(0), 0.3).rate == 0.3
    assert correct_evenly(np.zeros(0), 0.3, 0.2, nothing, 4).rate == 0.3
    none = correct_prior(np.full(100, 0.01), 0.3)
    assert none.rate < 0.01
    assert (none.probability > 0).all()
    for bad in (np.array([0.5, np.nan]), np.array([1.2])):
        with pytest.raises(DataError, match="probabilities"):
            correct_prior(bad, 0.3)
    with pytest.raises(DataError, match="training_rate"):
        correct_prior(np.array([0.5]), 1.0)


def draw_kinds(random, positive, negative, count, rate):
    """Calibrated scores of two overlapping kinds of pairs at a rate of one half, and the truth."""
    same = random.random(count) < rate
    logit = np.where(same, random.normal(positive, 1.5, count), random.normal(negative, 1.5, count))
    return 1 / (1 + np.exp(-logit)), same


def test_a_rate_that_explains_the_scores_is_believed_however_far_it_lies():
    random = np.random.default_rng(0)
    labelled, same = draw_kinds(random, 1.125, -1.125, 40000, 0.5)
    held_out = measure_reliability(labelled, same)
    probability, truth = draw_kinds(random, 1.125, -1.125, 40000, 0.05)
    found = correct_prior(probability, 0.5)
    assert found.rate < probability.mean() / 2
    assert not keep_prior(probability, found, held_out)
    assert found.rate == pytest.approx(truth.mean(), abs=0.01)


def test_a_rate_that_does_not_explain_the_scores_is_refused():
    random = np.random.default_rng(0)
    labelled, same = draw_kinds(random, 1.125, -1.125, 40000, 0.5)
    held_out = measure_reliability(labelled, same)
    # both kinds score lower than the labelled ones did, as faces of a poorer camera do
    probability, truth = draw_kinds(random, 0.3, -2.0, 40000, 0.2)
    found = correct_prior(probability, 0.5)
    assert found.rate < truth.mean() / 2
    assert keep_prior(probability, found, held_out)
    kept = leave_prior(probability)
    assert kept.refused
    assert not found.refused
    np.testing.assert_allclose(kept.probability, probability, atol=1e-6)
    assert kept.rate == pytest.approx(probability.mean(), abs=1e-6)
    assert abs(kept.rate - truth.mean()) < abs(found.rate - truth.mean())
