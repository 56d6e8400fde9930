"""The sample of pairs: bounded, and unbiased by its weights."""

import numpy as np
import pytest

from cdp.mediator.pair_sample import sample_pairs

pytestmark = pytest.mark.torch


def draw(count: int = 40_000, rate: float = 0.1):
    random = np.random.default_rng(0)
    same = random.random(count) < rate
    return same, random.uniform(0.2, 1, count).astype(np.float32), random.random(count) ** 3


@pytest.mark.parametrize("budget", [None, 40_000, 50_000])
def test_few_pairs_are_all_taken(budget):
    same, weight, difficulty = draw()
    chosen, found = sample_pairs(same, weight, budget, 0, difficulty)
    np.testing.assert_array_equal(chosen, np.arange(len(same)))
    np.testing.assert_allclose(found, weight / weight.mean(), rtol=1e-5)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.9])
def test_the_budget_is_kept_and_at_most_half_is_positive(rate):
    same, weight, difficulty = draw(rate=rate)
    chosen, _ = sample_pairs(same, weight, 8000, 0, difficulty)
    assert len(chosen) == pytest.approx(8000, abs=300)
    if rate < 0.2:
        assert same[chosen].sum() == pytest.approx(min(4000, same.sum()), abs=200)
    assert (np.diff(chosen) > 0).all()


def test_weighted_means_are_those_of_all_pairs():
    same, weight, difficulty = draw()
    value = difficulty + 2 * same
    found = []
    for seed in range(30):
        chosen, counted = sample_pairs(same, weight, 6000, seed, difficulty)
        found.append(np.average(value[chosen], weights=counted))
    error = np.std(found) / np.sqrt(len(found))
    assert np.mean(found) == pytest.approx(np.average(value, weights=weight), abs=4 * error)
    assert error < 0.002


def test_difficult_pairs_are_drawn_more_often():
    same, weight, difficulty = draw()
    chosen, _ = sample_pairs(same, weight, 6000, 1, difficulty)
    assert difficulty[chosen].mean() > 1.5 * difficulty.mean()


def test_the_seed_decides():
    same, weight, difficulty = draw()
    one, again, other = (sample_pairs(same, weight, 5000, s, difficulty)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
