"""Pairs and features against the plain numpy versions, and against Python sets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.committee.features import (
    VARIANTS,
    count_features,
    describe_pairs,
    measure_affinity,
    name_features,
)
from cdp.committee.pairs import make_pairs, vote_pairs
from cdp.errors import ConfigError, DataError
from cdp.knn.graph import build_knn_graph
from cdp.propagation.rising_threshold import propagate_labels
from cdp.types import KnnGraph, PairTable
from tests.benchmarks import released
from tests.benchmarks.embeddings import draw_views

K = 7


@pytest.fixture(scope="module")
def committee():
    views, identity = draw_views(900, (24, 16, 40), seed=2)
    views[2] = views[2].astype(np.float16)
    graphs = [build_knn_graph(view, K, backend="exact") for view in views]
    return views, graphs, identity


def draw_cosines(pairs: PairTable, variant: str) -> dict[str, np.ndarray]:
    """The `wccn` argument of `describe_pairs` where the variant has that column."""
    if variant != "extended":
        return {}
    return {"wccn": np.random.default_rng(6).uniform(-1, 1, len(pairs)).astype(np.float32)}


def as_table(pairs: PairTable) -> np.ndarray:
    return np.column_stack([pairs.source, pairs.target])


def test_pairs_equal_the_plain_version(committee):
    _, graphs, _ = committee
    pairs = make_pairs(graphs)
    np.testing.assert_array_equal(as_table(pairs), released.list_pairs(graphs[0]))
    united = np.unique(np.vstack([released.list_pairs(graph) for graph in graphs]), axis=0)
    np.testing.assert_array_equal(as_table(make_pairs(graphs, candidates="all")), united)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_pairs_by_part_equal_the_whole(count, k, seed, parts):
    generator = np.random.default_rng(seed)
    graphs = []
    for _ in range(3):  # any table of rows, self and padding included
        neighbour = generator.integers(-1, max(count, 1), (count, k))
        graphs.append(KnnGraph(neighbour, np.zeros((count, k), np.float32)))
    for candidates in ("base", "all"):
        listed = [
            Counter(
                (min(row, other), max(row, other))
                for row, near in enumerate(graph.neighbour.tolist())
                for other in near
                if other not in (-1, row)
            )
            for graph in graphs
        ]
        expected = sorted(listed[0] if candidates == "base" else sum(listed, Counter()))
        whole = make_pairs(graphs, candidates=candidates)
        found = list(zip(whole.source.tolist(), whole.target.tolist(), strict=True))
        assert found == expected
        assert whole.listings.tolist() == [sum(one[pair] for one in listed) for pair in found]
        edges = np.linspace(0, count, parts + 1).astype(int)
        split = [
            make_pairs(graphs, candidates=candidates, rows=slice(a, b)) for a, b in pairwise(edges)
        ]
        np.testing.assert_array_equal(np.concatenate([p.source for p in split]), whole.source)
        np.testing.assert_array_equal(np.concatenate([p.target for p in split]), whole.target)
        listings = np.concatenate([p.listings for p in split])
        np.testing.assert_array_equal(listings, whole.listings)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("candidates", ["base", "all"])
def test_features_equal_the_plain_version(committee, variant, candidates):
    views, graphs, _ = committee
    pairs = make_pairs(graphs, candidates=candidates)
    found = describe_pairs(views, graphs, pairs, variant=variant)
    plain = [np.asarray(view, np.float64) for view in views]
    expected = released.describe(plain, graphs, as_table(pairs), variant)
    assert found.dtype == np.float32
    assert found.shape == (len(pairs), count_features(2, variant))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_extended_features_equal_python_sets(committee):
    views, graphs, _ = committee
    pairs = make_pairs(graphs, candidates="all")
    part = slice(100, 400)
    cosine = draw_cosines(pairs, "extended")
    found = describe_pairs(views, graphs, pairs, variant="extended", rows=part, **cosine)
    names = name_features(2, "extended")
    assert names[-1] == "wccn_cosine"
    np.testing.assert_array_equal(found[:, -1], cosine["wccn"][part])
    paper = describe_pairs(views, graphs, pairs, rows=part)
    np.testing.assert_array_equal(found[:, : paper.shape[1]], paper)
    assert names[: paper.shape[1]] == name_features(2, "paper")
    for row, (one, other) in zip(found, as_table(pairs)[part].tolist(), strict=True):
        value = dict(zip(names, row.tolist(), strict=True))
        for view, graph in enumerate(graphs):
            first, second = graph.neighbour[one].tolist(), graph.neighbour[other].tolist()
            common = set(first) & set(second)
            assert value[f"common_share_{view}"] == pytest.approx(len(common) / K)
            assert value[f"neighbour_overlap_{view}"] == pytest.approx(
                len(common) / len(set(first) | set(second)), abs=1e-6
            )
            rank = first.index(other) if other in first else K
            assert value[f"rank_share_in_source_{view}"] == pytest.approx(rank / K)
            rank = second.index(one) if one in second else K
            assert value[f"rank_share_in_target_{view}"] == pytest.approx(rank / K)


@pytest.mark.parametrize("members", [0, 1, 4, 8])
def test_feature_counts(members):
    assert count_features(members, "paper") == 6 * members + 5
    assert count_features(members, "released") == 3 * members + 2
    assert count_features(members, "extended") == 10 * members + 10
    for variant in VARIANTS:
        assert len(set(name_features(members, variant))) == count_features(members, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_by_part_by_thread_from_scratch_and_in_any_order(committee, variant, tmp_path):
    views, graphs, _ = committee
    pairs = make_pairs(graphs)
    cosine = draw_cosines(pairs, variant)
    whole = describe_pairs(views, graphs, pairs, variant=variant, threads=1, **cosine)
    affinity = np.lib.format.open_memmap(
        tmp_path / "affinity.npy", "w+", np.float32, (len(pairs), len(views))
    )
    for column, view in enumerate(views):
        measure_affinity(lambda view=view: view, pairs, out=affinity[:, column])
    loaders = [lambda graph=graph: graph for graph in graphs]
    parts = [
        describe_pairs(
            (), loaders, pairs, variant=variant, rows=slice(a, a + 999), affinity=affinity, **cosine
        )
        for a in range(0, len(pairs), 999)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(len(pairs))
    shuffled = PairTable(pairs.source[order], pairs.target[order])
    moved = {name: values[order] for name, values in cosine.items()}
    np.testing.assert_array_equal(
        describe_pairs(views, graphs, shuffled, variant=variant, threads=3, **moved), whole[order]
    )
    out = np.empty_like(whole)
    assert describe_pairs(views, graphs, pairs, variant=variant, out=out, **cosine) is out


def test_votes_count_members_without_the_base(committee):
    views, graphs, _ = committee
    pairs = make_pairs(graphs)
    votes = vote_pairs(graphs, pairs)
    related = describe_pairs(views, graphs, pairs)[:, :2]
    np.testing.assert_array_equal(votes, related.sum(axis=1))
    assert vote_pairs(graphs[:1], pairs).max() == 0


def test_degenerate_graphs():
    for count in (0, 1, 2):
        view = np.eye(3, 4)[:count]
        graph = build_knn_graph(view, 5, backend="exact")
        pairs = make_pairs([graph, graph])
        assert len(pairs) == (1 if count == 2 else 0)
        for variant in VARIANTS:
            features = describe_pairs(
                [view, view], [graph, graph], pairs, variant=variant, **draw_cosines(pairs, variant)
            )
            assert features.shape == (len(pairs), count_features(1, variant))
            assert np.isfinite(features).all()


def test_an_isolated_view_shares_no_edge():
    views, _ = draw_views(300, (16, 16), seed=1)
    graphs = [build_knn_graph(view, 5, backend="exact") for view in views]
    empty = KnnGraph(np.full((300, 5), -1), np.zeros((300, 5), np.float32))
    pairs = make_pairs(graphs)
    cosine = draw_cosines(pairs, "extended")
    features = describe_pairs(views, [graphs[0], empty], pairs, variant="extended", **cosine)
    value = dict(zip(name_features(1, "extended"), features.T, strict=True))
    for name in (
        "relationship",
        "mean_source",
        "variance_target",
        "common_share",
        "neighbour_overlap",
    ):
        assert (value[f"{name}_1"] == 0).all()
    assert (value["rank_share_in_source_1"] == 1).all()


def test_what_does_not_belong_together_is_refused(committee):
    views, graphs, _ = committee
    pairs = make_pairs(graphs)
    with pytest.raises(ConfigError, match="variant"):
        describe_pairs(views, graphs, pairs, variant="other")
    with pytest.raises(ConfigError, match="candidates"):
        make_pairs(graphs, candidates="some")
    with pytest.raises(DataError, match="give wccn of shape"):
        describe_pairs(views, graphs, pairs, variant="extended")
    with pytest.raises(DataError, match="no column for wccn"):
        describe_pairs(views, graphs, pairs, variant="paper", wccn=np.zeros(len(pairs)))
    with pytest.raises(DataError, match="at least the base"):
        make_pairs([])
    with pytest.raises(DataError, match="2 views, 3 graphs"):
        describe_pairs(views[:2], graphs, pairs)
    with pytest.raises(DataError, match="view 1 has 10 rows"):
        describe_pairs([views[0], views[1][:10], views[2]], graphs, pairs)
    small = build_knn_graph(views[0][:50], K, backend="exact")
    with pytest.raises(DataError, match="rows"):
        make_pairs([graphs[0], small], candidates="all")
    with pytest.raises(DataError, match="graph 1 has 50 rows"):
        describe_pairs(views, [graphs[0], small, graphs[2]], pairs)
    broken = views[1].copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="view 1: vector 3"):
        describe_pairs([views[0], broken, views[2]], graphs, pairs)


def test_the_plain_propagation_gives_the_same_clusters(committee):
    views, graphs, _ = committee
    pairs = make_pairs(graphs)
    score = np.clip(measure_affinity(views[0], pairs), 0, 1)
    for max_size in (5, 30, 300):
        expected = released.propagate(
            as_table(pairs), score, 900, threshold=0.4, max_size=max_size, step=0.05
        )
        found = propagate_labels(pairs, score, 900, threshold=0.4, max_size=max_size, step=0.05)
        np.testing.assert_array_equal(found.label, expected)
