"""Protocols: every figure by its definition, every resample by copying identities."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cdp import metrics
from cdp.errors import DataError
from cdp.metrics import protocols
from cdp.metrics.identification import Identification, identify
from cdp.metrics.protocols import Resamples, Score, sample_sets, score_rejection


def draw_faces(identities: int, each: int, seed: int, spread: float = 0.8):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(identities, 6))
    size = rng.integers(1, each + 1, identities)
    size[:2] = each
    identity = rng.permutation(np.repeat(np.arange(identities), size)) * 7
    vectors = centres[identity // 7] + spread * rng.normal(size=(len(identity), 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), identity


def list_pairs(identity: np.ndarray, weight: np.ndarray):
    """Every pair of images as often as a resample holds it: by copying identities."""
    copies = [
        (p, copy, image)
        for p in range(len(weight))
        for copy in range(int(weight[p]))
        for image in np.flatnonzero(identity == p)
    ]
    genuine, impostor = [], []
    for i, (p, copy, a) in enumerate(copies):
        for q, other, b in copies[i + 1 :]:
            if p == q and copy == other:
                genuine.append((a, b))
            elif p != q:
                impostor.append((a, b))
    return genuine, impostor


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
@example(678)  # resamples of few identities, whose threshold lies beyond the share that is kept
@example(985)
def test_tar_at_far_over_all_pairs(seed: int) -> None:
    vectors, identity = draw_faces(7, 4, seed)
    resamples = Resamples(identity, draws=4, seed=seed)
    rates = (0.3, 0.1, 1e-4)
    rows = np.arange(len(identity))
    scores = protocols.score_all_pairs(vectors, rows, resamples, rates)
    assert [score.metric for score in scores] == [
        "tar@far=0.3", "tar@far=0.1", "threshold@far=0.3", "threshold@far=0.1",
    ]  # fmt: skip
    # The very products that were scored: a matrix product and a dot differ in the last bit.
    cosine = vectors @ vectors.T

    def measure(weight: np.ndarray, rate: float) -> float:
        genuine, impostor = list_pairs(resamples.identity, weight)
        if not genuine or not impostor:
            return float("nan")
        similar = [np.array([cosine[min(p), max(p)] for p in part]) for part in (genuine, impostor)]
        return metrics.tar_at_far(*similar, rate)

    for score, rate in zip(scores[:2], rates, strict=False):
        assert score.value == pytest.approx(measure(np.ones(7), rate))
        for draw, weight in zip(score.draws, resamples.weight, strict=True):
            assert draw == pytest.approx(measure(weight, rate), nan_ok=True)
    genuine, impostor = list_pairs(resamples.identity, np.ones(7))
    for score, rate in zip(scores[2:], rates, strict=False):
        # At most that share of the impostor pairs lies above it, and no lower cosine does it.
        similar = np.array([cosine[min(p), max(p)] for p in impostor])
        assert (similar > score.value).mean() <= rate
        assert (similar >= score.value).mean() > rate
        assert score.count == len(impostor)
        passed = [cosine[min(p), max(p)] > score.value for p in genuine]
        assert np.mean(passed) == pytest.approx(measure(np.ones(7), rate))


def test_blocks_and_the_top_share_change_nothing(monkeypatch) -> None:
    vectors, identity = draw_faces(20, 5, 3)
    resamples = Resamples(identity, draws=10)
    rows = np.arange(len(identity))
    rates = (0.1, 0.01)
    whole = protocols.score_all_pairs(vectors, rows, resamples, rates)
    monkeypatch.setattr(protocols, "_BLOCK", 7)
    parts = protocols.score_all_pairs(vectors, rows, resamples, rates)
    for one, other in zip(whole, parts, strict=True):
        assert one.value == other.value
        np.testing.assert_allclose(one.draws, other.draws)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_ranks_and_open_set(seed: int) -> None:
    vectors, identity = draw_faces(9, 4, seed)
    resamples = Resamples(identity, draws=5, seed=seed)
    chosen = protocols.sample_open_set(identity, 0.5, seed)
    probes = np.concatenate([chosen.mated, chosen.unmated])
    found = identify(
        vectors[probes], identity[probes], vectors[chosen.gallery], identity[chosen.gallery]
    )
    for rank in (1, 2):
        rates = (0.4, 0.2, 1e-3)
        scores = protocols.score_open_set(found, probes, resamples, rates, rank=rank)
        for score, rate in zip(scores, rates, strict=False):
            expected = metrics.tpir_at_fpir(
                vectors[probes],
                identity[probes],
                vectors[chosen.gallery],
                identity[chosen.gallery],
                rate,
                rank=rank,
            )
            assert score.value == pytest.approx(expected)
            assert score.count == len(chosen.mated)
            for draw, weight in zip(score.draws, resamples.weight, strict=True):
                times = weight[resamples.identity[probes]].astype(int)
                if not times[found.mated].any() or not times[~found.mated].any():
                    assert np.isnan(draw)
                    continue
                unmated = np.repeat(found.other[~found.mated], times[~found.mated])
                threshold = metrics.threshold_at_far(unmated, rate)
                hit = (found.best > threshold) & (found.rank <= rank)
                assert draw == pytest.approx(np.repeat(hit[found.mated], times[found.mated]).mean())
        assert not any("0.001" in score.metric for score in scores)
    distracted = identify(
        vectors[chosen.mated],
        identity[chosen.mated],
        vectors[chosen.gallery],
        identity[chosen.gallery],
        distractor=vectors[chosen.unmated],
    )
    scores = protocols.score_ranks(distracted, chosen.mated, resamples, (1, 3))
    for score, rank in zip(scores, (1, 3), strict=True):
        # By hand: how many gallery images and distractors are at least as close as the mate.
        hits = []
        for probe in chosen.mated:
            cosine = vectors @ vectors[probe]
            mate = cosine[[g for g in chosen.gallery if identity[g] == identity[probe]]].max()
            others = [g for g in chosen.gallery if identity[g] != identity[probe]]
            ahead = (cosine[others + list(chosen.unmated)] >= mate).sum()
            hits.append(ahead + 1 <= rank)
        assert score.value == pytest.approx(np.mean(hits))
        for draw, weight in zip(score.draws, resamples.weight, strict=True):
            times = weight[resamples.identity[chosen.mated]].astype(int)
            expected = np.repeat(hits, times).mean() if times.any() else np.nan
            assert draw == pytest.approx(expected, nan_ok=True)


def test_open_set_by_hand() -> None:
    """Three unmated probes at .9, .5 and .1; FPIR 1/3 accepts one of them: threshold .5."""
    found = metrics.Identification(
        rank=np.array([1, 1, 25, 1, 1, 1]),
        best=np.array([0.95, 0.5, 0.8, -np.inf, -np.inf, -np.inf]),
        other=np.array([0.1, 0.2, 0.85, 0.9, 0.5, 0.1]),
    )
    resamples = Resamples(np.arange(6), draws=3)
    (score,) = protocols.score_open_set(found, np.arange(6), resamples, (1 / 3,))
    # Found: the first alone. The second is not above the threshold, the third beyond rank 20.
    assert score.value == pytest.approx(1 / 3)
    (score,) = protocols.score_open_set(found, np.arange(6), resamples, (1 / 3,), rank=30)
    assert score.value == pytest.approx(2 / 3)


def test_folds_are_lfws_and_pairs_weigh_by_both_identities() -> None:
    vectors, identity = draw_faces(24, 5, 1, spread=1.2)
    pairs = metrics.sample_verification_pairs(identity, 15, 3, seed=0)
    similarity = metrics.compare_pairs(vectors, pairs.source, pairs.target)
    resamples = Resamples(identity, draws=6)
    accuracy, spread, _ = protocols.score_folds(similarity, pairs, resamples)
    expected = metrics.verification_accuracy(similarity, pairs.same, pairs.fold)
    assert (accuracy.value, spread.value) == pytest.approx(expected)
    right = metrics.decide_by_folds(similarity, pairs.same, pairs.fold)
    for draw, weight in zip(accuracy.draws, resamples.weight, strict=True):
        total = count = 0.0
        for s, t, same, ok in zip(pairs.source, pairs.target, pairs.same, right, strict=True):
            times = weight[resamples.identity[s]] * (1 if same else weight[resamples.identity[t]])
            total, count = total + times * ok, count + times
        assert draw == pytest.approx(total / count)


def test_intervals_cover_the_figure_and_narrow_with_identities() -> None:
    widths = []
    for count in (20, 320):
        rng = np.random.default_rng(0)
        identity = np.repeat(np.arange(count), 5)
        value = (rng.random(count)[identity] > rng.random(len(identity))).astype(float)
        resamples = Resamples(identity, draws=400)
        draws = resamples.average(value, np.arange(len(identity)))
        low, high = Score("share", value.mean(), len(value), draws).interval()
        assert low < value.mean() < high
        widths.append(high - low)
    assert 0.15 < widths[1] / widths[0] < 0.4  # one over the root of 16
    assert np.isnan(Score("std", 0.1, 3).interval()).all()


def test_no_identity_dominates_all_pairs() -> None:
    identity = np.array([4] * 50 + [1] * 3 + [9])
    rows = protocols.pick_images(identity, 5)
    assert np.bincount(identity[rows]).tolist() == [0, 3, 0, 0, 5, 0, 0, 0, 0, 1]
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, protocols.pick_images(identity, 5))


def test_identities_are_enrolled_whole() -> None:
    identity = np.repeat(np.arange(30), np.arange(30) % 4 + 1)
    chosen = protocols.sample_open_set(identity, 0.4, 0)
    assert len(chosen.gallery) == round(0.4 * (np.arange(30) % 4 > 0).sum())
    assert len(set(identity[chosen.gallery])) == len(chosen.gallery)
    assert set(identity[chosen.mated]) == set(identity[chosen.gallery])
    assert not set(identity[chosen.unmated]) & set(identity[chosen.gallery])
    everything = np.concatenate([chosen.gallery, chosen.mated, chosen.unmated])
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(identity)))


def test_errors() -> None:
    vectors, identity = draw_faces(5, 3, 0)
    resamples = Resamples(identity, draws=2)
    alone = np.flatnonzero(identity == identity[0])
    with pytest.raises(DataError, match="pairs of one identity and of two"):
        protocols.score_all_pairs(vectors, alone, resamples, (0.1,))
    with pytest.raises(DataError, match="identities with two images"):
        protocols.sample_open_set(np.arange(5))
    with pytest.raises(DataError, match="images and draws"):
        Resamples(identity, draws=0)
    found = metrics.Identification(np.ones(2, int), np.ones(2), np.zeros(2))
    with pytest.raises(DataError, match="mated and unmated"):
        protocols.score_open_set(found, np.arange(2), resamples, (0.1,))


def test_larger_sets_hold_smaller_ones() -> None:
    identity = np.array([3, 3, 3, 3, 8, 5, 5])
    sets = sample_sets(identity, 0)
    assert len(sets.gallery) == 3
    for size in (1, 2, 3, 9):
        rows = sets.take(size)
        assert not np.isin(rows, sets.gallery).any()
        assert sorted(identity[rows]) == [3] * min(size, 3) + [5]
        assert np.isin(rows, sets.take(size + 1)).all()
    with pytest.raises(DataError, match="identities with two images"):
        sample_sets(np.arange(4))


def test_rejection_by_hand() -> None:
    """Four probes of qualities 4, 1, 3, 2, of which those of 1 and 3 are wrong."""
    rank = np.array([1, 2, 7, 1])
    found = Identification(rank, np.zeros(4), np.zeros(4))
    resamples = Resamples(np.array([0, 0, 1, 1]), 50, 0)
    quality, rows = np.array([4.0, 1.0, 3.0, 2.0]), np.arange(4)
    scores = score_rejection(found, quality, rows, resamples, (0.25, 0.5, 0.99))
    assert [score.value for score in scores] == [pytest.approx(2 / 3), 0.5, 1.0]
    assert [score.count for score in scores] == [3, 2, 1]
    assert scores[0].metric == "rank-1, 25% rejected"
