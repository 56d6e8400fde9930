"""What held-out people missed: log-odds that are too low are found, and shares without a pair."""

import json

import numpy as np
import pytest

from cdp.propagation.missed_pairs import MissedPairs, measure_missed
from cdp.propagation.quality import estimate_quality
from cdp.types import PairTable
from pipelines.missed_pairs import describe_missed, read_missed

IMAGES = 3


def draw_parts(too_low=0.0, listed=1.0, seed=0, couples=1500):
    """Couples of clusters that are one identity as often as their pairs say; half are labelled.

    too_low : by how much the log-odds of the pairs between them are lowered. listed : share of the
    couples that have any candidate pair.
    """
    random = np.random.default_rng(seed)
    odds = random.uniform(-4, 1, couples)
    same = random.random(couples) < 1 / (1 + np.exp(-odds))
    label = np.repeat(np.arange(2 * couples), IMAGES)
    couple = np.arange(2 * couples) // 2
    person = np.where(same[couple], 2 * couple, np.arange(2 * couples))[label]
    source, target = np.nonzero(np.ones((2 * IMAGES, 2 * IMAGES)))
    ascending = source < target
    start = 2 * IMAGES * np.arange(couples)[:, None]
    pairs = PairTable((start + source[ascending]).ravel(), (start + target[ascending]).ravel())
    inside = label[pairs.source] == label[pairs.target]
    probability = np.where(inside, 0.99, 1 / (1 + np.exp(too_low - odds[pairs.source // 6])))
    kept = inside | (random.random(couples) < listed)[pairs.source // 6]
    identity = np.where(couple[label] % 2, person, -1 - np.arange(len(label)))
    return label, pairs.take(kept), probability[kept], identity, person


def score_recall(label, person):
    together = np.bincount(label)
    people = np.bincount(person)
    return (together * (together - 1)).sum() / (people * (people - 1)).sum()


@pytest.mark.parametrize("too_low", [0.0, 1.0, 2.0])
def test_log_odds_that_are_too_low_are_found(too_low):
    """Not quite all of it: the people in two clusters are larger, and larger ones weigh less."""
    label, pairs, probability, identity, person = draw_parts(too_low)
    found = measure_missed(label, pairs, probability, identity)
    assert max(too_low - 0.9, 0) <= found.log_odds <= too_low + 0.2
    plain = estimate_quality(label, pairs, probability).recall
    adjusted = estimate_quality(label, pairs, probability, missed=found).recall
    truth = score_recall(label, person)
    assert abs(adjusted - truth) <= abs(plain - truth)
    assert abs(adjusted - truth) < 0.12


def test_recall_is_never_estimated_higher_than_the_pairs_say():
    label, pairs, probability, identity, _ = draw_parts(too_low=-2.0)
    assert measure_missed(label, pairs, probability, identity).log_odds == 0


def test_pairs_of_clusters_that_no_list_joins_are_counted_by_images_of_a_person():
    label, pairs, probability, identity, _ = draw_parts(listed=0.5)
    found = measure_missed(label, pairs, probability, identity)
    assert (np.diff(found.unlisted[:, 0]) > 0).all()
    # of a person's 15 pairs 9 lie in two clusters, and half of these have no candidate pair
    shares = {3: 0.0, 6: 0.3}
    for images, share in shares.items():
        nearest = np.abs(found.unlisted[:, 0] - images).argmin()
        assert found.unlisted[nearest, 1] == pytest.approx(share, abs=0.3)
    joined = measure_missed(*draw_parts()[:4])
    assert joined.unlisted[:, 1].max() == 0
    assert found.unlisted[:, 1].max() > 0.1


def test_the_same_seed_gives_the_same_figures():
    label, pairs, probability, identity, _ = draw_parts(1.0)
    one, other = (measure_missed(label, pairs, probability, identity, seed=3) for _ in range(2))
    assert one.log_odds == other.log_odds
    np.testing.assert_array_equal(one.unlisted, other.unlisted)


def test_without_held_out_people_nothing_is_known():
    label, pairs, probability, _, _ = draw_parts(1.0)
    found = measure_missed(label, pairs, probability, -1 - np.arange(len(label)))
    assert (found.log_odds, len(found.unlisted)) == (0, 0)
    assert MissedPairs().log_odds == 0
    nobody = PairTable(np.zeros(0, np.int64), np.zeros(0, np.int64))
    alone = measure_missed(np.full(4, -1), nobody, np.zeros(0), np.array([1, 1, 2, -1]))
    assert alone.log_odds == 0
    assert alone.unlisted.tolist() == [[2, 1]]


def test_a_run_keeps_every_bit_of_them():
    found = measure_missed(*draw_parts(too_low=1.0, listed=0.7)[:4])
    assert found.log_odds > 0
    again = read_missed(json.loads(json.dumps(describe_missed(found))))
    np.testing.assert_array_equal(again.unlisted, found.unlisted)
    assert again.log_odds == found.log_odds
    nothing = read_missed({"method": "vote"})
    assert (nothing.log_odds, nothing.unlisted.shape) == (0, (0, 2))
