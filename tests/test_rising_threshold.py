"""Propagation against the published level-by-level algorithm, written with networkx."""

from __future__ import annotations

from collections import deque

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.errors import ConfigError, DataError
from cdp.propagation.rising_threshold import (
    build_forest,
    cut_forest,
    merge_forests,
    propagate_labels,
    to_networkx,
)
from cdp.types import PairTable


def split_level_by_level(pairs, scores, count, threshold, max_size, step):
    """The published algorithm: a queue of components, each with its own threshold."""
    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    for (one, other), score in zip(pairs.tolist(), scores.astype(np.float64).tolist(), strict=True):
        if one != other and score > threshold:
            best = max(score, graph.edges[one, other]["s"] if graph.has_edge(one, other) else -2)
            graph.add_edge(one, other, s=best)
    queue = deque((threshold, part) for part in nx.connected_components(graph))
    clusters, cut = [], np.full(count, np.nan)
    while queue:
        level, part = queue.popleft()
        if len(part) <= max_size:
            cut[list(part)] = level
            if len(part) > 1:
                clusters.append(sorted(part))
            continue
        if level >= 1.0:
            cut[list(part)] = 1.0
            continue
        raised = level + (1.0 - level) * step
        if raised <= level:
            raised = np.nextafter(level, 2.0)
        raised = min(raised, 1.0)
        inside = nx.Graph(graph.subgraph(part))
        inside.remove_edges_from([e for e in inside.edges if inside.edges[e]["s"] < raised])
        queue.extend((raised, smaller) for smaller in nx.connected_components(inside))
    label = np.full(count, -1)
    for number, rows in enumerate(sorted(clusters)):
        label[rows] = number
    return label, cut


@st.composite
def scored_graphs(draw):
    count = draw(st.integers(0, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m = draw(st.integers(0, 3 * count))
    pairs = generator.integers(0, max(count, 1), (m, 2)) if count else np.empty((0, 2), np.int64)
    m = len(pairs)
    kind = draw(st.sampled_from(["uniform", "ties", "levels", "saturated", "ones"]))
    if kind == "uniform":
        scores = generator.random(m)
    elif kind == "ties":
        scores = generator.integers(0, 6, m) / 5
    elif kind == "levels":  # scores exactly on the levels of step .1
        levels = [0.0]
        while len(levels) < 20:
            levels.append(levels[-1] + (1 - levels[-1]) * 0.1)
        scores = np.array(levels)[generator.integers(0, 20, m)]
    elif kind == "saturated":
        scores = 1 - generator.integers(0, 4, m) * np.finfo(float).eps / 2
    else:
        scores = np.ones(m)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return pairs, scores.astype(dtype), count


@settings(max_examples=300, deadline=None)
@given(
    scored_graphs(),
    st.sampled_from([0.0, 0.25, 0.96, -1.0, 1.0]),
    st.integers(1, 12),
    st.sampled_from([0.05, 0.1, 0.5, 1.0]),
)
def test_forest_equals_level_by_level(graph, threshold, max_size, step):
    pairs, scores, count = graph
    expected, cut = split_level_by_level(pairs, scores, count, threshold, max_size, step)
    found = propagate_labels(
        pairs, scores, count, threshold=threshold, max_size=max_size, step=step
    )
    np.testing.assert_array_equal(found.label, expected)
    np.testing.assert_allclose(found.cut_threshold, cut, rtol=2e-7)
    assert (found.cut_threshold >= cut).all()
    sizes = np.bincount(found.label[found.label >= 0])
    assert (sizes >= 2).all()
    assert (sizes <= max_size).all()


@settings(max_examples=100, deadline=None)
@given(scored_graphs(), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_partial_forests_merge_exactly(graph, parts, seed):
    pairs, scores, count = graph
    whole = build_forest(pairs, scores, count)
    order = np.random.default_rng(seed).permutation(len(pairs))
    merged = merge_forests(
        [
            build_forest(pairs[part][:, ::-1], scores[part], count)
            for part in np.array_split(order, parts)
        ]
    )
    for name in ("source", "target", "score"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(merged, name))
    assert (np.diff(whole.score) <= 0).all()
    direct = propagate_labels(pairs, scores, count, threshold=0.3, max_size=5)
    cut = cut_forest(merged, threshold=0.3, max_size=5)
    np.testing.assert_array_equal(direct.label, cut.label)
    np.testing.assert_array_equal(direct.cut_threshold, cut.cut_threshold)


def test_one_larger_graph_with_a_giant_component():
    generator = np.random.default_rng(3)
    count = 3000
    pairs = generator.integers(0, count, (6000, 2))
    scores = generator.random(6000).astype(np.float32)
    expected, cut = split_level_by_level(pairs, scores, count, 0.0, 40, 0.05)
    found = propagate_labels(pairs, scores, count, max_size=40, step=0.05)
    np.testing.assert_array_equal(found.label, expected)
    np.testing.assert_allclose(found.cut_threshold, cut, rtol=2e-7)


def test_a_batch_of_equal_scores_is_not_joined_halfway():
    # 0-1 and 1-2 enter at one level: the three are too many, so none joins, not two of them.
    pairs = np.array([[0, 1], [1, 2]])
    found = propagate_labels(pairs, np.array([0.5, 0.5]), 3, max_size=2)
    assert found.label.tolist() == [-1, -1, -1]


def test_pairs_scored_one_cannot_be_split_and_stay_unlabelled():
    chain = np.column_stack([np.arange(9), np.arange(1, 10)])
    found = propagate_labels(chain, np.ones(9, np.float32), 12, max_size=5)
    assert found.label.tolist() == [-1] * 12
    assert found.unsplittable_count == 10
    weaker = np.ones(9, np.float32)
    weaker[4] = np.nextafter(np.float32(1), np.float32(0))
    found = propagate_labels(chain, weaker, 12, max_size=5)
    assert found.label.tolist() == [0] * 5 + [1] * 5 + [-1, -1]
    assert found.unsplittable_count == 0


def test_every_pair_below_the_threshold_and_no_pairs():
    found = propagate_labels(np.array([[0, 1]]), np.array([0.5]), 3, threshold=0.5)
    assert found.label.tolist() == [-1, -1, -1]
    empty = np.empty(0, np.int64)
    for pairs in ([], np.empty((0, 2), np.int64), PairTable(empty, empty)):
        assert propagate_labels(pairs, np.empty(0), 2).label.tolist() == [-1, -1]
        assert propagate_labels(pairs, np.empty(0), 0).label.tolist() == []


def test_cut_threshold_separates_float32_scores_exactly():
    levels = [0.0]
    for _ in range(30):
        levels.append(levels[-1] + (1 - levels[-1]) * 0.1)
    for level in levels[1:]:
        below = np.float32(level)
        if float(below) >= level:
            below = np.nextafter(below, np.float32(0))
        above = np.nextafter(below, np.float32(1))
        found = propagate_labels(
            np.array([[0, 1], [1, 2]]), np.array([above, below]), 3, max_size=2
        )
        assert found.label.tolist() == [0, 0, -1]
        assert below < found.cut_threshold[0] <= above


@pytest.mark.parametrize(
    ("pairs", "scores", "message"),
    [
        (np.array([[0, 3]]), np.array([0.5]), "pair 0 is \\(0, 3\\)"),
        (np.array([[0, 1], [-1, 1]]), np.array([0.5, 0.5]), "pair 1"),
        (np.array([[0, 1]]), np.array([np.nan]), "nan for pair 0"),
        (np.array([[0, 1]]), np.array([97.0]), "97.0 for pair 0"),
        (np.array([[0, 1]]), np.array([0.5, 0.5]), "one score a pair"),
        (np.array([[0.0, 1.0]]), np.array([0.5]), "integer"),
    ],
)
def test_bad_pairs_are_refused(pairs, scores, message):
    with pytest.raises(DataError, match=message):
        propagate_labels(pairs, scores, 3)


@pytest.mark.parametrize(
    "setting", [{"threshold": 1.5}, {"max_size": 0}, {"step": 0.0}, {"step": 1.1}]
)
def test_bad_settings_are_refused(setting):
    with pytest.raises(ConfigError):
        propagate_labels(np.array([[0, 1]]), np.array([0.5]), 3, **setting)


def test_forests_over_different_rows_do_not_merge():
    pairs, scores = np.array([[0, 1]]), np.array([0.5])
    with pytest.raises(DataError, match="same rows"):
        merge_forests([build_forest(pairs, scores, 2), build_forest(pairs, scores, 3)])
    with pytest.raises(DataError):
        merge_forests([])


def test_networkx_view_names_the_bridge():
    triangles = [[0, 1], [1, 2], [0, 2], [3, 4], [4, 5], [3, 5], [2, 3], [6, 7]]
    scores = np.array([0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.4, 0.99], np.float32)
    pairs = np.array(triangles)
    found = propagate_labels(pairs, scores, 9, threshold=0.2)
    graph = to_networkx(pairs, scores, found, 0)
    assert sorted(graph.nodes) == [0, 1, 2, 3, 4, 5]
    assert graph.number_of_edges() == 7
    assert graph.graph["bridges"] == [(2, 3, pytest.approx(0.4))]
    assert graph.edges[2, 3]["bridge"]
    assert not graph.edges[0, 1]["bridge"]
    assert to_networkx(pairs, scores, found, 1).graph["bridges"] == [(6, 7, pytest.approx(0.99))]
    with pytest.raises(DataError, match=r"0 \.\. 1"):
        to_networkx(pairs, scores, found, 2)


@settings(max_examples=50, deadline=None)
@given(scored_graphs(), st.integers(2, 6))
def test_each_cluster_is_connected_at_its_own_level(graph, max_size):
    pairs, scores, count = graph
    scores = scores.astype(np.float32)
    found = propagate_labels(pairs, scores, count, max_size=max_size)
    for label in range(found.cluster_count):
        cluster = to_networkx(pairs, scores, found, label)
        assert set(cluster.nodes) == set(np.flatnonzero(found.label == label).tolist())
        assert nx.is_connected(cluster)
