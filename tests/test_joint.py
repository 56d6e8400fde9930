"""Joint graphs against an exact search of both sets together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.committee.pairs import make_pairs
from cdp.errors import DataError
from cdp.knn import build_knn_graphs
from cdp.knn.joint import join_graphs

K = 6


def draw_views(labelled: int, unlabelled: int, seed: int, repeated: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    centre = random.normal(size=(max((labelled + unlabelled) // 6, 1), 8))
    identity = random.integers(0, len(centre), labelled + unlabelled)
    views = [
        centre[identity] @ random.normal(size=(8, width))
        + 0.7 * random.normal(size=(len(identity), width))
        for width in (8, 5)
    ]
    for view in views:
        view[random.permutation(len(view))[:repeated]] = view[0]
    return [
        (view / np.linalg.norm(view, axis=1, keepdims=True)).astype(np.float32) for view in views
    ]


def join(views: list[np.ndarray], labelled: int, **options):
    parts = [view[:labelled] for view in views], [view[labelled:] for view in views]
    graphs = [build_knn_graphs(part, K, backend="exact") for part in parts]
    return join_graphs(parts[0], graphs[0], parts[1], graphs[1], **options)


@settings(max_examples=25, deadline=None)
@given(
    labelled=st.integers(1, 60),
    unlabelled=st.integers(1, 200),
    repeated=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_lists_are_those_of_one_search(labelled, unlabelled, repeated, seed):
    views = draw_views(labelled, unlabelled, seed, min(repeated, labelled + unlabelled))
    kept, graphs = join(views, labelled)
    whole = build_knn_graphs(views, K, backend="exact")
    rows = np.concatenate([np.arange(labelled), labelled + kept])
    number = len(rows) + np.arange(-labelled, unlabelled)
    number[rows] = np.arange(len(rows))
    near = np.zeros(labelled + unlabelled, bool)
    near[:labelled] = True
    for graph, full in zip(graphs, whole, strict=True):
        wanted = full.neighbour[rows]
        expected = np.where(wanted < 0, -1, number[wanted])
        np.testing.assert_array_equal(graph.neighbour, expected)
        np.testing.assert_array_equal(graph.similarity, full.similarity[rows])
        listed = (full.neighbour >= 0) & (full.neighbour < labelled)
        near |= listed.any(axis=1)
        near[full.neighbour[:labelled][full.neighbour[:labelled] >= 0]] = True
    np.testing.assert_array_equal(kept, np.flatnonzero(near[labelled:]))


def test_threads_change_nothing():
    views = draw_views(50, 3000, 1)
    one, many = join(views, 50, threads=1), join(views, 50, threads=3)
    np.testing.assert_array_equal(one[0], many[0])
    for left, right in zip(one[1], many[1], strict=True):
        np.testing.assert_array_equal(left.neighbour, right.neighbour)


def test_pairs_end_in_the_set():
    kept, graphs = join(draw_views(20, 400, 2), 20)
    assert max(graph.neighbour.max() for graph in graphs) >= 20 + len(kept)
    assert make_pairs(graphs, candidates="all").target.max() < 20 + len(kept)


def test_sets_must_belong_together():
    views = draw_views(20, 50, 3)
    parts = [view[:20] for view in views], [view[20:] for view in views]
    graphs = [build_knn_graphs(part, K, backend="exact") for part in parts]
    with pytest.raises(DataError, match="8 dimensions labelled and 5 unlabelled"):
        join_graphs(parts[0][:1], graphs[0][:1], parts[1][1:], graphs[1][1:])
    fewer = build_knn_graphs(parts[1], K - 1, backend="exact")
    with pytest.raises(DataError, match="one k, got 6 and 5"):
        join_graphs(parts[0], graphs[0], parts[1], fewer)
