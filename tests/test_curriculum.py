"""The training curriculum: every step is the graphs of the rows it keeps."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.committee.features import describe_pairs
from cdp.committee.pairs import make_pairs
from cdp.knn.graph import build_knn_graphs
from cdp.mediator.curriculum import (
    CURRICULUM,
    choose_labelled,
    make_curriculum,
    thin_identities,
)
from tests.benchmarks.embeddings import draw_views

pytestmark = [pytest.mark.torch, pytest.mark.trains]

K = 12


@pytest.fixture(scope="module")
def labelled():
    views, identity = draw_views(500, (24, 16), seed=3)
    return views, build_knn_graphs(views, K, backend="exact"), identity


def test_thinning_leaves_one_image_of_the_chosen_identities():
    identity = np.repeat([5, 9, 2, 7], [4, 1, 6, 3])
    kept = thin_identities(identity, 0.5, 3)
    sizes = np.unique(identity[kept], return_counts=True)[1]
    assert len(sizes) == 4
    assert (sizes == 1).sum() >= 2
    assert thin_identities(identity, 0.0, 3).all()
    np.testing.assert_array_equal(kept, thin_identities(identity, 0.5, 3))


def test_the_first_step_is_the_labelled_set_unchanged(labelled):
    _, graphs, identity = labelled
    first = make_curriculum(graphs, identity)[0]
    np.testing.assert_array_equal(first.rows, np.arange(500))
    np.testing.assert_array_equal(first.identity, identity)
    for one, other in zip(first.graphs, graphs, strict=True):
        np.testing.assert_array_equal(one.neighbour, other.neighbour)
        np.testing.assert_array_equal(one.similarity, other.similarity)


def test_every_step_keeps_the_nearest_of_the_rows_that_are_left(labelled):
    _, graphs, identity = labelled
    for (share, _), step in zip(CURRICULUM, make_curriculum(graphs, identity, seed=5), strict=True):
        k = round(share * K)
        np.testing.assert_array_equal(step.identity, identity[step.rows])
        for small, whole in zip(step.graphs, graphs, strict=True):
            for at, row in enumerate(step.rows):
                left = [
                    (int(np.searchsorted(step.rows, other)), value)
                    for other, value in zip(
                        whole.neighbour[row], whole.similarity[row], strict=True
                    )
                    if other in set(step.rows.tolist())
                ][:k]
                held = small.neighbour[at] >= 0
                assert held.sum() == len(left)
                assert [n for n, _ in left] == small.neighbour[at][: len(left)].tolist()
                assert [v for _, v in left] == small.similarity[at][: len(left)].tolist()
    assert len(step.rows) < 500


def test_steps_may_come_from_loaders_and_describe_pairs(labelled):
    views, graphs, identity = labelled
    loaders = [lambda graph=graph: graph for graph in graphs]
    for one, other in zip(make_curriculum(loaders, identity), make_curriculum(graphs, identity),
                          strict=True):  # fmt: skip
        np.testing.assert_array_equal(one.graphs[1].neighbour, other.graphs[1].neighbour)
        pairs = make_pairs(one.graphs, candidates="all")
        features = describe_pairs(
            [view[one.rows] for view in views], one.graphs, pairs, variant="paper"
        )
        assert np.isfinite(features).all()


def test_labelled_rows_are_whole_identities_up_to_the_limit():
    random = np.random.default_rng(3)
    identity = random.permutation(np.repeat(np.arange(400), random.integers(1, 12, 400)))
    rows = choose_labelled(identity, limit=600, seed=1)
    assert len(rows) == 600
    assert (np.diff(rows) > 0).all()
    size, chosen = np.bincount(identity), np.bincount(identity[rows], minlength=400)
    assert np.count_nonzero((chosen > 0) & (chosen < size)) <= 1
    np.testing.assert_array_equal(rows, choose_labelled(identity, limit=600, seed=1))
    assert not np.array_equal(rows, choose_labelled(identity, limit=600, seed=2))
    np.testing.assert_array_equal(choose_labelled(identity, limit=9999), np.arange(len(identity)))


def test_one_identity_takes_at_most_half_of_the_limit():
    identity = np.concatenate([np.zeros(5000, int), np.repeat(np.arange(1, 500), 4)])
    chosen = identity[choose_labelled(identity, limit=400, seed=0)]
    assert np.count_nonzero(chosen == 0) <= 200
    assert len(np.unique(chosen)) >= 50
