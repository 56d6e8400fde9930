"""Soft labels: against the dense definition, and what a user relies on."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.errors import ConfigError, DataError
from cdp.propagation.soft_labels import diffuse_labels
from cdp.types import PairTable


def draw_graph(seed, count=40, edges=120):
    random = np.random.default_rng(seed)
    table = np.unique(np.sort(random.integers(0, count, (edges, 2)), 1), axis=0)
    table = table[table[:, 0] != table[:, 1]]
    label = random.integers(-1, 6, count)
    return PairTable(table[:, 0], table[:, 1]), random.random(len(table)), label


def spread(pairs, probability, label, threshold, depth, decay):
    count, clusters = len(label), label.max() + 1
    graph = np.zeros((count, count))
    for a, b, p in zip(pairs.source, pairs.target, probability, strict=True):
        if p > threshold:
            graph[a, b] = graph[b, a] = p
    graph /= np.maximum(graph.sum(1, keepdims=True), 1e-12)
    one_hot = (label[:, None] == np.arange(clusters)).astype(float)
    total = sum(decay**t * np.linalg.matrix_power(graph, t) @ one_hot for t in range(depth + 1))
    return total / np.maximum(total.sum(1, keepdims=True), 1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("depth", [0, 1, 5])
def test_is_the_sum_over_walks(seed, depth):
    pairs, probability, label = draw_graph(seed)
    found = diffuse_labels(
        label, pairs, probability, threshold=0.4, depth=depth, decay=0.6, min_weight=0
    )
    dense = np.zeros((len(label), label.max() + 1))
    dense[found.row, found.label] = found.weight
    np.testing.assert_allclose(dense, spread(pairs, probability, label, 0.4, depth, 0.6), atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_sorted_sum_to_one_and_hold_few_labels(seed):
    pairs, probability, label = draw_graph(seed, edges=400)
    found = diffuse_labels(label, pairs, probability, min_weight=0.1)
    order = np.lexsort((found.label, -found.weight, found.row))
    np.testing.assert_array_equal(order, np.arange(len(order)))
    summed = np.bincount(found.row, found.weight, len(label))
    reached = np.unique(found.row)
    np.testing.assert_allclose(summed[reached], 1, atol=1e-5)
    assert np.bincount(found.row).max() <= 10
    assert found.weight.min() >= 0.1


def test_an_isolated_cluster_keeps_its_label_and_an_isolated_row_gets_none():
    pairs = PairTable(np.array([0, 1, 3]), np.array([1, 2, 4]))
    label = np.array([0, 0, 0, -1, -1, 1])
    found = diffuse_labels(label, pairs, np.array([0.9, 0.8, 0.9]))
    assert found.row.tolist() == [0, 1, 2, 5]
    assert found.label.tolist() == [0, 0, 0, 1]
    assert found.weight.tolist() == [1, 1, 1, 1]


def test_an_unlabelled_row_gets_the_labels_of_its_neighbours():
    pairs = PairTable(np.array([0, 1]), np.array([1, 2]))
    found = diffuse_labels(np.array([0, -1, 1]), pairs, np.array([0.9, 0.6]))
    middle = found.row == 1
    assert found.label[middle].tolist() == [0, 1]
    assert found.weight[middle][0] == pytest.approx(0.6, abs=0.05)


def test_nothing_and_nonsense():
    nothing = PairTable(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert len(diffuse_labels(np.full(3, -1), nothing, np.zeros(0)).row) == 0
    assert len(diffuse_labels(np.zeros(0, np.int64), nothing, np.zeros(0)).row) == 0
    for wrong in ({"depth": -1}, {"decay": 1.5}, {"min_weight": 1.0}):
        with pytest.raises(ConfigError, match="soft labels"):
            diffuse_labels(np.zeros(3, np.int64), nothing, np.zeros(0), **wrong)
    with pytest.raises(DataError, match="one probability a pair"):
        diffuse_labels(np.zeros(3, np.int64), nothing, np.zeros(2))
    one = PairTable(np.array([0]), np.array([1]))
    with pytest.raises(DataError, match="lie in"):
        diffuse_labels(np.zeros(3, np.int64), one, np.array([np.nan]))
