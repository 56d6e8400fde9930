"""Verification of claims, against a loop over all pairs."""

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.metrics import Resamples, score_claims

RATES = (0.2, 0.05, 1e-6)


def draw(seed, probes=90, people=12):
    generator = np.random.default_rng(seed)

    def scatter(centres):
        rows = centres + 0.8 * generator.normal(size=centres.shape)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    centres = generator.normal(size=(people + 5, 16))
    names = generator.integers(0, people, 40)
    wanted = generator.integers(0, people + 5, probes)  # five of them are not enrolled
    return scatter(centres[wanted]), wanted, scatter(centres[names]), names


def list_pairs(probe, wanted, gallery, names):
    """(similarity, genuine, probe) of every pair, one by one."""
    pairs = []
    for row, (vector, who) in enumerate(zip(probe, wanted, strict=True)):
        for name in sorted(set(names.tolist())):
            nearest = max(float(vector @ other) for other in gallery[names == name])
            pairs.append((nearest, who == name, row))
    return tuple(np.array(column) for column in zip(*pairs, strict=True))


def choose_cut(similarity, weight, rate):
    """The highest cosine that more than the share of impostors reach or exceed."""
    for value in np.sort(similarity)[::-1]:
        if weight[similarity >= value].sum() > rate * weight.sum() * (1 + 1e-12):
            return value
    raise AssertionError


@pytest.mark.parametrize("seed", range(3))
def test_figures_and_resamples_are_those_of_a_loop(seed):
    probe, wanted, gallery, names = draw(seed)
    resamples = Resamples(wanted, 20, seed)
    scores = score_claims(probe, wanted, np.arange(90), gallery, names, resamples, RATES)
    assert [score.metric for score in scores] == [
        "tar@far=0.2", "tar@far=0.05", "threshold@far=0.2", "threshold@far=0.05"
    ]  # fmt: skip
    similarity, genuine, row = list_pairs(probe, wanted, gallery, names)
    impostor = similarity[~genuine]
    for place, rate in enumerate(RATES[:2]):
        tar, cut = scores[place], scores[place + 2]
        assert (tar.count, cut.count) == (genuine.sum(), (~genuine).sum())
        found = [(tar.value, cut.value), *zip(tar.draws, cut.draws, strict=True)]
        weights = [np.ones(90), *resamples.weight[:, resamples.identity]]
        for weight, figures in zip(weights, found, strict=True):
            level = choose_cut(impostor, weight[row[~genuine]], rate)
            mine = weight[row[genuine]]
            accepted = mine[similarity[genuine] > level + 1e-6].sum() / mine.sum()
            np.testing.assert_allclose(figures, (accepted, level), atol=1e-6)


def test_blocks_do_not_matter(monkeypatch):
    probe, wanted, gallery, names = draw(5)
    given = (probe, wanted, np.arange(90), gallery, names, Resamples(wanted, 5), RATES)
    whole = score_claims(*given)
    monkeypatch.setattr("cdp.metrics.claims._BLOCK", 7)
    for one, other in zip(whole, score_claims(*given), strict=True):
        assert one.value == pytest.approx(other.value, abs=1e-6)
        np.testing.assert_allclose(one.draws, other.draws, atol=1e-6)


def test_without_pairs_of_both_kinds_there_is_no_score():
    probe, wanted, gallery, names = draw(0)
    resamples = Resamples(wanted)
    nobody = np.full(90, 99)
    assert score_claims(probe, nobody, np.arange(90), gallery, names, resamples, RATES) == []
    alone = np.zeros(90, np.int64)
    one = score_claims(probe, alone, np.arange(90), gallery, np.zeros(40, int), resamples, RATES)
    assert one == []
    with pytest.raises(DataError, match="a gallery, and an identity"):
        score_claims(probe, wanted[1:], np.arange(90), gallery, names, resamples, RATES)
