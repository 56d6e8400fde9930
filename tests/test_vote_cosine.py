"""The cosine that votes are cut at: right on piles of many people, of one, and of images alike."""

import networkx
import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.committee.features import measure_affinity
from cdp.committee.pairs import make_pairs
from cdp.knn.graph import build_knn_graphs
from cdp.mediator.pair_voter import PairVoter, choose_first_level
from cdp.mediator.vote_cosine import choose_cosine, measure_components, measure_floor
from cdp.metrics.clustering import score_pairwise
from cdp.propagation.clustering import cluster_pairs
from cdp.types import PairTable

pytestmark = pytest.mark.torch


def draw(sizes, noise, seed=0, d=64):
    generator = np.random.default_rng(seed)
    identity = np.repeat(np.arange(len(sizes)), sizes)
    rows = generator.normal(size=(len(sizes), d))[identity]
    return rows + noise * generator.normal(size=(len(identity), d)), identity


def vote(rows, k=20):
    graphs = build_knn_graphs([rows], k, backend="exact")
    pairs = make_pairs(graphs, candidates="base")
    scores = PairVoter().score([rows], graphs, pairs)
    label = cluster_pairs(pairs, scores.probability, len(rows), threshold=0, calibrated=False).label
    return label, scores


@pytest.mark.parametrize("noise", [0.2, 0.4, 0.8])
def test_people_of_a_dozen_images_are_found(noise):
    rows, identity = draw([12] * 20, noise)
    label, scores = vote(rows)
    assert score_pairwise(identity, label)[2] > 0.99
    assert 0.2 < scores.cosine < 0.6
    assert (scores.probability[scores.probability > 0] > scores.cosine).all()
    assert scores.rate is None


def test_many_people_of_one_image_and_one_of_half_the_pile():
    rows, identity = draw([150, *[6] * 10, *[1] * 90], 0.5)
    precision, recall, _ = score_pairwise(identity, vote(rows)[0])
    assert min(precision, recall) > 0.9


@pytest.mark.parametrize("seed", range(4))
def test_a_small_pile_is_not_chained(seed):
    """15 people of 6 images in few dimensions, where every list of 8 holds other people."""
    rows, identity = draw([6] * 15, 0.5, seed, 24)
    views = [rows, draw([6] * 15, 0.5, seed + 10, 16)[0], draw([6] * 15, 0.5, seed + 20, 32)[0]]
    graphs = build_knn_graphs(views, 8, backend="exact")
    pairs = make_pairs(graphs, candidates="base")
    for voting in (graphs[:1], graphs):
        scores = PairVoter().score(views[: len(voting)], voting, pairs)
        label = cluster_pairs(pairs, scores.probability, 90, threshold=0, calibrated=False).label
        assert score_pairwise(identity, label)[2] > 0.5
        assert np.bincount(label[label >= 0]).max() < 45


def test_the_floor_is_what_random_rows_hardly_exceed():
    generator = np.random.default_rng(0)
    many = generator.normal(size=(400, 64))
    assert measure_floor(many) == pytest.approx(2 / 8, abs=0.05)  # deviation 1 / sqrt(64)
    assert measure_floor(generator.normal(size=64) + 0.2 * many) == 0.4
    assert measure_floor(many[:1]) == 0


def test_rows_all_alike_have_no_cosine_to_cut_at():
    pairs = PairTable(np.repeat(np.arange(39), 1), np.arange(1, 40))
    assert choose_cosine(pairs, np.ones(39), 40) == 0
    none = PairTable(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert choose_cosine(none, np.zeros(0), 3) == 0


def test_a_cosine_that_is_given_is_used():
    rows, _ = draw([12] * 20, 0.4)
    graphs = build_knn_graphs([rows], 20, backend="exact")
    pairs = make_pairs(graphs, candidates="base")
    scores = PairVoter(min_similarity=0.9).score([rows], graphs, pairs)
    cosine = measure_affinity(rows, pairs)
    assert scores.cosine == 0.9
    np.testing.assert_array_equal(scores.probability > 0, cosine > 0.9)


def split_by_levels(pairs, score, count, first, max_size, step=0.1):
    """Labels by the published rule, level by level, with a graph library."""
    label, queue = np.full(count, -1), [(first, list(range(count)))]
    while queue:
        level, rows = queue.pop()
        inside = np.isin(pairs.source, rows) & np.isin(pairs.target, rows)
        kept = inside & ((score > level) if level == first else (score >= level))
        graph = networkx.Graph(np.stack([pairs.source, pairs.target], 1)[kept].tolist())
        for part in networkx.connected_components(graph):
            if len(part) <= max_size:
                label[list(part)] = min(part)
            else:
                queue.append((level + (1 - level) * step, list(part)))
    names = {first: number for number, first in enumerate(sorted({*label.tolist()} - {-1}))}
    return np.array([names.get(value, -1) for value in label.tolist()])


@pytest.mark.parametrize("given", ["auto", 0.45, -0.5])
def test_levels_start_at_the_cosine(given):
    """Joined people fall apart at a level that depends on the first one."""
    rows, _ = draw([40] * 6, 1.1)
    clusterer = ConsensusClusterer(k=12, backend="exact", min_similarity=given, max_size=30)
    clusterer.fit(rows)
    first = clusterer.threshold_
    assert first == max(clusterer.cosine_, 0)
    pairs, score = clusterer.pairs_, clusterer.pair_scores_.astype(np.float64)
    expected = split_by_levels(pairs, score, len(rows), first, 30)
    np.testing.assert_array_equal(clusterer.labels_, expected)
    from_zero = split_by_levels(pairs, score, len(rows), 0.0, 30)
    assert first == 0 or (expected != from_zero).any()  # the test would see another first level


def test_a_threshold_below_the_cosine_counts_as_the_cosine():
    assert choose_first_level(0.4, 0.2) == 0.4
    assert choose_first_level(0.4, 0.7) == 0.7
    assert choose_first_level(-0.3) == 0


def test_components_are_those_of_a_graph_library():
    generator = np.random.default_rng(3)
    ends = np.unique(np.sort(generator.integers(0, 60, (90, 2)), axis=1), axis=0)
    ends = ends[ends[:, 0] != ends[:, 1]]
    score = generator.random(len(ends))
    levels = np.array([0.0, 0.3, 0.55, 0.8, 1.0])
    largest, joined = measure_components(PairTable(*ends.T), score, 60, levels)
    for level, most, several in zip(levels, largest, joined, strict=True):
        graph = networkx.Graph(ends[score > level].tolist())
        sizes = [len(part) for part in networkx.connected_components(graph)]
        assert (most, several) == (max(sizes, default=0), sum(sizes))
