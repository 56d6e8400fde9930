"""Thin merges: two identities that few pairs join count as two, parts of one person as one."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.propagation.quality import estimate_quality
from cdp.propagation.thin_merges import count_thin_pairs
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
        found = count_thin_pairs(np.zeros(rows, np.int64), pairs, probability, np.ones(rows))
        assert found.shape == (1,)
        assert found[0] < 1


def test_images_that_rows_stand_for_are_counted():
    pairs, probability = join((80, 60), 12, 4)
    label, images = np.zeros(140, np.int64), np.ones(140)
    one = count_thin_pairs(label, pairs, probability, images)
    three = count_thin_pairs(label, pairs, probability, 3 * images)
    np.testing.assert_allclose(three, 9 * one)
    assert not len(count_thin_pairs(np.full(140, -1), pairs, probability, images))
