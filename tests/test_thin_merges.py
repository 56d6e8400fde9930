"""Thin merges: two identities that few pairs join count as two, parts of one person as one."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.arrays.log_odds import to_log_odds, to_probability
from cdp.propagation import quality
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.quality import estimate_cuts, estimate_quality
from cdp.propagation.thin_merges import find_sparse, find_thin_merges
from cdp.types import PairTable

pytestmark = pytest.mark.torch


def list_ring(start, rows, reach):
    """Pairs of `rows` rows of one identity, each with the next `reach` ones of a ring."""
    own = np.arange(rows)
    one = np.repeat(own, reach)
    other = (one + np.tile(np.arange(1, reach + 1), rows)) % rows
    return np.sort(np.column_stack([one, other]) + start, axis=1)


def join(sizes, reach, between):
    """Rings of some sizes, and `between` likely pairs from each to the next."""
    starts = np.cumsum([0, *sizes])
    listed = [list_ring(start, rows, reach) for start, rows in zip(starts[:-1], sizes, strict=True)]
    random = np.random.default_rng(0)
    across = []
    for one, other in zip(range(len(sizes) - 1), range(1, len(sizes)), strict=True):
        number = random.choice(sizes[one] * sizes[other], between, replace=False)
        left, right = number // sizes[other], number % sizes[other]
        across.append(np.column_stack([left + starts[one], right + starts[other]]))
    pairs = np.concatenate([*listed, *across])
    probability = np.full(len(pairs), 0.9995)
    probability[len(pairs) - between * len(across) :] = 0.97
    return PairTable(pairs[:, 0], pairs[:, 1]), probability


def count(label, pairs, probability, images):
    sparse = find_sparse(label, pairs)
    return find_thin_merges(label, sparse, pairs, probability, images).count(label)


def estimate(sizes, reach, between):
    pairs, probability = join(sizes, reach, between)
    label = np.zeros(sum(sizes), np.int64)
    return estimate_quality(label, pairs, probability).precision


def test_two_identities_that_few_pairs_join_are_counted():
    sizes = (80, 60)
    true = sum(size * (size - 1) for size in sizes) / (140 * 139)
    assert estimate(sizes, 12, 4) == pytest.approx(true, abs=0.08)


def test_parts_of_one_identity_are_not():
    """Parts with a third of the pairs between them that one identity has between its rows."""
    sizes = (80, 60)
    density = 12 / 39.5
    assert estimate(sizes, 12, round(0.35 * 80 * 60 * density)) > 0.9
    assert estimate((140,), 12, 0) > 0.99


def test_small_and_dense_clusters_are_left_alone():
    dense = join((30,), 14, 0)
    few = join((4, 30), 3, 2)
    for (pairs, probability), rows in ((dense, 30), (few, 34)):
        found = count(np.zeros(rows, np.int64), pairs, probability, np.ones(rows))
        assert found.shape == (1,)
        assert found[0] < 1


def test_images_that_rows_stand_for_are_counted():
    pairs, probability = join((80, 60), 12, 4)
    label, images = np.zeros(140, np.int64), np.ones(140)
    one = count(label, pairs, probability, images)
    three = count(label, pairs, probability, 3 * images)
    np.testing.assert_allclose(three, 9 * one)
    assert not len(count(np.full(140, -1), pairs, probability, images))


def test_cuts_are_estimated_as_each_alone(monkeypatch):
    """Stricter clusters are parts of the loosest ones, whose merges are looked at once."""
    random = np.random.default_rng(1)
    pairs, probability = join((80, 60, 25, 40), 9, 6)
    probability = to_probability(to_log_odds(probability) - random.exponential(5.0, len(pairs)))
    merged = agglomerate(pairs, probability, 205, threshold=0.02)
    cuts = [merged.cut(threshold) for threshold in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)]
    searches = []

    def search(*given):
        searches.append(given)
        return find_thin_merges(*given)

    monkeypatch.setattr(quality, "find_thin_merges", search)
    together = list(estimate_cuts(cuts, pairs, probability))
    assert len(searches) == 1
    for label, found in zip(cuts, together, strict=True):
        alone = estimate_quality(label, pairs, probability)
        assert found.precision == pytest.approx(alone.precision, abs=1e-12)
        assert found.recall == pytest.approx(alone.recall, abs=1e-12)
        np.testing.assert_allclose(found.expected_precision, alone.expected_precision, atol=1e-6)
    assert len({found.precision for found in together}) > 3
    assert len(searches) > len(cuts)
