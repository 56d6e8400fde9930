"""Pair scorers: one chain however it is called, and the rule of the votes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sklearn.metrics import average_precision_score

from cdp.committee.features import count_features, measure_affinity
from cdp.committee.pairs import make_pairs, vote_pairs
from cdp.errors import ConfigError, DataError
from cdp.knn.graph import build_knn_graphs
from cdp.mediator import JointSet, MediatorSettings, PairScorer, PairVoter
from tests.benchmarks.embeddings import draw_views

pytestmark = [pytest.mark.torch, pytest.mark.trains]

K = 8
QUICK = MediatorSettings(epochs=5, ensemble_size=2, folds=2)


@pytest.fixture(scope="module")
def faces():
    """Labelled and unlabelled views, and the identities of both; no identity is in both."""
    views, identity = draw_views(900, (24, 16), seed=5, noise=0.6)
    labelled = identity % 2 == 0
    return (
        [view[labelled] for view in views],
        identity[labelled],
        [view[~labelled] for view in views],
        identity[~labelled],
    )


@pytest.fixture(scope="module")
def trained(faces):
    labelled, identity, views, _ = faces
    both = [np.concatenate(pair) for pair in zip(labelled, views, strict=True)]
    unlabelled = np.full(len(views[0]), -1)
    return PairScorer.fit(
        labelled,
        build_knn_graphs(labelled, K, backend="exact"),
        identity,
        settings=QUICK,
        joint=JointSet(
            both,
            build_knn_graphs(both, K, backend="exact"),
            np.concatenate([identity, unlabelled]),
        ),
    )


@pytest.fixture(scope="module")
def candidates(faces):
    views = faces[2]
    graphs = build_knn_graphs(views, K, backend="exact")
    return views, graphs, make_pairs(graphs, candidates="all")


def measure_all(views, pairs):
    return np.stack([measure_affinity(view, pairs) for view in views], axis=1)


def test_scores_rank_pairs_better_than_any_view(trained, faces, candidates):
    views, graphs, pairs = candidates
    scores = trained.score(views, graphs, pairs)
    same = faces[3][pairs.source] == faces[3][pairs.target]
    assert scores.probability.dtype == np.float32
    assert scores.rate == pytest.approx(same.mean(), abs=0.15)
    best = max(average_precision_score(same, column) for column in measure_all(views, pairs).T)
    assert average_precision_score(same, scores.probability) > best
    assert trained.candidates == "all"
    assert trained.mediator.feature_count == count_features(1, "extended")
    assert trained.threshold == trained.second_stage.threshold


@given(st.lists(st.integers(0, 450), max_size=4), st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_blocks_in_any_partition_and_finish_give_the_bits_of_score(
    trained, candidates, cuts, threads
):
    views, graphs, pairs = candidates
    whitened = trained.whiten(views, threads=threads)
    count, parts, affinity = len(views[0]), [], measure_all(views, pairs)
    for low, high in zip([0, *sorted(cuts)], [*sorted(cuts), count], strict=True):
        rows = (pairs.source >= low) & (pairs.source < high)
        block = pairs.take(rows)
        parts.append(trained.score_block(graphs, block, affinity[rows], whitened, threads=threads))
    found = trained.finish(views, pairs, np.concatenate(parts), count, threads=threads)
    whole = trained.score(views, graphs, pairs, threads=1)
    np.testing.assert_array_equal(found.probability, whole.probability)
    assert found.rate == whole.rate


def test_state_survives_a_safetensors_file(trained, candidates, tmp_path):
    views, graphs, pairs = candidates
    save_file(trained.state(), tmp_path / "pair_scorer.safetensors")
    state = load_file(tmp_path / "pair_scorer.safetensors")
    assert {name.partition(".")[0] for name in state} == {
        "candidates", "mediator", "wccn", "second_stage",
    }  # fmt: skip
    again = PairScorer.from_state(state)
    assert (again.candidates, again.threshold) == (trained.candidates, trained.threshold)
    np.testing.assert_array_equal(
        again.score(views, graphs, pairs).probability,
        trained.score(views, graphs, pairs).probability,
    )
    for missing in ("candidates", "mediator.weight_1", "wccn.offset", "second_stage.threshold"):
        with pytest.raises(DataError, match=missing.partition(".")[2] or missing):
            PairScorer.from_state({k: v for k, v in state.items() if k != missing})


def test_a_scorer_cannot_be_changed(trained):
    with pytest.raises(FrozenInstanceError):
        trained.wccn = None


@pytest.mark.parametrize("variant", ["paper", "released", "extended"])
def test_every_variant_has_a_first_stage(faces, candidates, variant):
    labelled, identity, *_ = faces
    scorer = PairScorer.fit(
        labelled,
        build_knn_graphs(labelled, K, backend="exact"),
        identity,
        settings=replace(QUICK, variant=variant),
        second_stage=False,
    )
    views, graphs, _ = candidates
    extended = variant == "extended"
    assert (scorer.wccn is not None) == extended
    assert scorer.candidates == ("all" if extended else "base")
    assert (scorer.second_stage, scorer.threshold, scorer.precision_curve) == (None, 0.5, None)
    pairs = make_pairs(graphs, candidates=scorer.candidates)
    again = PairScorer.from_state(scorer.state())
    np.testing.assert_array_equal(
        again.score(views, graphs, pairs).probability,
        scorer.score(views, graphs, pairs).probability,
    )


def test_no_pair_gives_no_score(trained, candidates):
    views, graphs, pairs = candidates
    none = trained.score(views, graphs, pairs.take(slice(0, 0)))
    assert none.probability.shape == (0,)
    assert none.rate == trained.mediator.training_rate


@pytest.mark.parametrize("min_votes", [0, 1])
def test_votes_follow_their_rule(candidates, min_votes):
    views, graphs, pairs = candidates
    voter = PairVoter(min_similarity=0.6, min_votes=min_votes, candidates="all")
    scores = voter.score(views, graphs, pairs)
    cosine, votes = measure_affinity(views[0], pairs), vote_pairs(graphs, pairs)
    expected = np.where((cosine > 0.6) & (votes >= min_votes), cosine, 0)
    np.testing.assert_array_equal(scores.probability, expected)
    assert 0 < np.count_nonzero(expected) < len(pairs)
    assert scores.rate is None
    raw = voter.score_block(graphs, pairs, measure_all(views, pairs), voter.whiten(views))
    np.testing.assert_array_equal(
        voter.finish(views, pairs, raw, len(views[0])).probability, expected
    )


def test_without_members_the_cosine_alone_decides(candidates):
    views, graphs, pairs = candidates
    scores = PairVoter(min_similarity=0.6).score(views[:1], graphs[:1], pairs)
    cosine = measure_affinity(views[0], pairs)
    np.testing.assert_array_equal(scores.probability, np.where(cosine > 0.6, cosine, 0))


def test_what_cannot_be_is_refused(faces, candidates):
    views, graphs, pairs = candidates
    with pytest.raises(ConfigError, match=r"min_votes must be in 0 \.\. 1"):
        PairVoter(min_votes=2).score(views, graphs, pairs)
    with pytest.raises(ConfigError, match="min_votes must be 0 or more"):
        PairVoter(min_votes=-1)
    with pytest.raises(ConfigError, match="candidates must be one of"):
        PairVoter(candidates="some")
    labelled, identity, *_ = faces
    graphs = build_knn_graphs(labelled, K, backend="exact")
    with pytest.raises(ConfigError, match="an ensemble_size equal to folds, got 1 and 2"):
        PairScorer.fit(labelled, graphs, identity, settings=replace(QUICK, ensemble_size=1))
    with pytest.raises(ConfigError, match="candidates must be one of"):
        PairScorer.fit(labelled, graphs, identity, settings=QUICK, candidates="some")
