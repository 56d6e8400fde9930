"""The second stage: features against their definition, and better scores than the first stage."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.committee.features import describe_pairs
from cdp.committee.pairs import make_pairs
from cdp.errors import DataError
from cdp.knn.graph import build_knn_graphs
from cdp.mediator.ensemble import Mediator
from cdp.mediator.neighbourhood import describe_neighbourhood, name_neighbourhood
from cdp.mediator.prior_shift import correct_prior
from cdp.mediator.second_stage import SecondStage, fit_second_stage
from cdp.mediator.settings import MediatorSettings
from cdp.metrics.clustering import score_bcubed, score_pairwise
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.threshold import choose_cut
from cdp.types import PairTable

pytestmark = [pytest.mark.torch, pytest.mark.trains]


def draw_views(seed, identities, noise=0.16, dimensions=(48, 32)):
    random = np.random.default_rng(seed)
    identity = np.repeat(np.arange(identities), random.integers(1, 14, identities))
    views = []
    for d in dimensions:
        centre = random.normal(size=(identities, d)) / np.sqrt(d)
        x = centre[identity] + noise * random.normal(size=(len(identity), d))
        views.append((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))
    return views, identity


@pytest.fixture(scope="module")
def graph():
    random = np.random.default_rng(0)
    views, _ = draw_views(0, 12)
    count = len(views[0])
    table = np.unique(np.sort(random.integers(0, count, (600, 2)), 1), axis=0)
    table = table[table[:, 0] != table[:, 1]]
    return views, PairTable(table[:, 0], table[:, 1]), random.random(len(table)), count


def slow(views, pairs, probability, count):
    p = np.zeros((count, count))
    z = np.full((count, count), np.nan)
    for a, b, q in zip(pairs.source, pairs.target, probability, strict=True):
        p[a, b] = p[b, a] = q
        z[a, b] = z[b, a] = np.clip(np.log(q / (1 - q)), -12, 12)
    best = np.nanmax(np.where(np.isnan(z), -12, z), axis=1)
    averaged = []
    for view in views:
        rows = []
        for i in range(count):
            candidates = sorted(
                (-np.float32(p[i, j]), j) for j in range(count) if not np.isnan(z[i, j])
            )
            row = view[i] + sum(-w * view[j] for w, j in candidates[:5])
            rows.append(row / np.linalg.norm(row))
        averaged.append(np.array(rows))
    out = []
    for a, b in zip(pairs.source, pairs.target, strict=True):
        c = np.flatnonzero(~np.isnan(z[a]) & ~np.isnan(z[b]))
        both, to_a, to_b = (p[a, c] * p[b, c]).sum(), p[a, c].sum(), p[b, c].sum()
        cross = [
            (p[b, c] * z[a, c]).sum() / (to_b + 0.5),
            (p[a, c] * z[b, c]).sum() / (to_a + 0.5),
        ]
        out.append(
            [
                z[a, b],
                z[a, b] - min(best[a], best[b]),
                z[a, b] - max(best[a], best[b]),
                both / (min(to_a, to_b) + 0.5),
                both / (max(to_a, to_b) + 0.5),
                both / (to_a + to_b - both + 0.5),
                *sorted(cross),
                max([-15.0, *np.minimum(z[a, c], z[b, c])]),
                *(view[a] @ view[b] for view in averaged),
            ]
        )
    return np.array(out)


def test_features_follow_their_definition(graph):
    views, pairs, probability, count = graph
    got = describe_neighbourhood(views, pairs, probability, count)
    assert got.shape == (len(pairs), len(name_neighbourhood(2)))
    np.testing.assert_allclose(got, slow(views, pairs, probability, count), atol=2e-5)


def test_threads_and_loaders_change_nothing(graph):
    views, pairs, probability, count = graph
    one = describe_neighbourhood(views, pairs, probability, count, threads=1)
    loaders = [lambda view=view: view for view in views]
    np.testing.assert_array_equal(
        one, describe_neighbourhood(loaders, pairs, probability, count, threads=3)
    )


@pytest.fixture(scope="module")
def stages():
    labelled, identity = draw_views(1, 60)
    views, truth = draw_views(2, 100)
    graphs = build_knn_graphs(labelled, 12, backend="exact")
    pairs = make_pairs(graphs, candidates="all")
    features = describe_pairs(labelled, graphs, pairs, variant="paper")
    source, target = identity[pairs.source], identity[pairs.target]
    quick = MediatorSettings(epochs=12, patience=3)
    first, held_out = Mediator.fit(features, source == target, source, target, settings=quick)
    second = fit_second_stage(labelled, pairs, held_out.probability, identity, settings=quick)
    graphs = build_knn_graphs(views, 12, backend="exact")
    pairs = make_pairs(graphs, candidates="all")
    score = first.score(describe_pairs(views, graphs, pairs, variant="paper"))
    return second, views, pairs, correct_prior(score, first.training_rate).probability, truth


def test_the_second_stage_scores_better(stages):
    second, views, pairs, before, truth = stages
    after = second.score(views, pairs, before, len(truth)).probability
    same = truth[pairs.source] == truth[pairs.target]
    loss = [-np.log(np.where(same, p, 1 - p)).mean() for p in (before, after)]
    assert loss[1] < loss[0]
    labels = [
        agglomerate(pairs, before, len(truth)).label,
        agglomerate(pairs, after, len(truth), threshold=second.threshold).label,
    ]
    scores = [score_bcubed(truth, label)[2] for label in labels]
    assert scores[1] > scores[0] - 0.005
    assert 0.1 < second.threshold < 0.9


def test_higher_target_precision_gives_a_stricter_threshold_and_is_reached(stages):
    second, views, pairs, before, truth = stages
    assert (np.diff(second.precision_curve, axis=0) >= 0).all()
    after = second.score(views, pairs, before, len(truth)).probability
    found = agglomerate(pairs, after, len(truth), threshold=second.threshold)
    options = {"loosest": second.threshold, "precision_curve": second.precision_curve}
    cuts = [
        choose_cut(found.cut, pairs, after, target_precision=target, **options)
        for target in (0.5, 0.95, 0.99, 1 - 1e-9)
    ]
    assert cuts == sorted(cuts)
    assert cuts[0] == second.threshold
    assert cuts[-1] == second.precision_curve[-1, 0]
    assert score_pairwise(truth, found.cut(cuts[2]))[0] >= 0.97


def test_state_survives(stages):
    second, views, pairs, before, truth = stages
    again = SecondStage.from_state(second.state())
    np.testing.assert_array_equal(again.precision_curve, second.precision_curve)
    assert again.threshold == second.threshold
    one, other = (each.score(views, pairs, before, len(truth)) for each in (second, again))
    np.testing.assert_array_equal(one.probability, other.probability)
    with pytest.raises(DataError, match="even_rate, threshold"):
        SecondStage.from_state(second.mediator.state())


def test_bad_input(graph):
    views, pairs, probability, count = graph
    with pytest.raises(DataError, match="one probability"):
        describe_neighbourhood(views, pairs, probability[:-1], count)
    with pytest.raises(DataError, match="lie in"):
        describe_neighbourhood(views, pairs, probability + 1, count)
    with pytest.raises(DataError, match="rows"):
        describe_neighbourhood([views[0][:-1]], pairs, probability, count)
