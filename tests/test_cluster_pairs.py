"""cluster_pairs: either split as by its own function, and one threshold after another."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.errors import ConfigError
from cdp.propagation import agglomerate, cluster_pairs, propagate_labels, sweep_thresholds
from cdp.propagation.threshold import choose_cut
from cdp.types import PairTable

COUNT = 120


@pytest.fixture(scope="module")
def scored():
    """Pairs of 24 identities with five images, and probabilities that are mostly right."""
    random = np.random.default_rng(0)
    source, target = np.triu_indices(COUNT, 1)
    same = source // 5 == target // 5
    chosen = same | (random.random(len(same)) < 0.05)
    logit = np.where(same, 2.0, -2.0) + 2.0 * random.normal(size=len(same))
    probability = (1 / (1 + np.exp(-logit))).astype(np.float32)
    return PairTable(source[chosen], target[chosen]), probability[chosen]


@pytest.mark.parametrize("max_size", [None, 4])
def test_the_consensus_split_is_average_linkage(scored, max_size):
    found = cluster_pairs(*scored, COUNT, threshold=0.4, max_size=max_size)
    expected = agglomerate(*scored, COUNT, threshold=0.4, max_size=max_size)
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_array_equal(found.cut_threshold, np.full(COUNT, 0.4, np.float32))
    assert (found.threshold, found.split) == (0.4, "consensus")


@pytest.mark.parametrize("max_size", [None, 12])
def test_the_rising_threshold_is_that_of_the_paper(scored, max_size):
    options = {} if max_size is None else {"max_size": max_size}
    found = cluster_pairs(
        *scored, COUNT, split="raise_threshold", threshold=0.8, max_size=max_size, step=0.05
    )
    expected = propagate_labels(*scored, COUNT, threshold=0.8, step=0.05, **options)
    np.testing.assert_array_equal(found.label, expected.label)
    np.testing.assert_array_equal(found.cut_threshold, expected.cut_threshold)


def test_a_target_precision_raises_the_threshold(scored):
    pairs, probability = scored
    curve = np.array([[0.5, 0.6], [0.8, 0.97], [0.95, 1.0]])
    merged = agglomerate(pairs, probability, COUNT, threshold=0.3)
    for target in (0.5, 0.9, 0.99):
        options = {"target_precision": target, "precision_curve": curve}
        found = cluster_pairs(pairs, probability, COUNT, threshold=0.3, **options)
        assert found.threshold == choose_cut(merged.cut, pairs, probability, loosest=0.3, **options)
        np.testing.assert_array_equal(found.label, merged.cut(found.threshold))
    assert found.threshold >= 0.95
    # the curve was measured with the consensus split, so the other one does not use it
    rising = {"split": "raise_threshold", "threshold": 0.3, "target_precision": 0.5}
    with_curve = cluster_pairs(*scored, COUNT, **rising, precision_curve=curve[:, ::-1])
    assert with_curve.threshold == cluster_pairs(*scored, COUNT, **rising).threshold


@pytest.mark.parametrize("split", ["consensus", "raise_threshold"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_sweep_is_one_clustering_after_another(scored, split, calibrated):
    options = {"split": split, "step": 0.05, "calibrated": calibrated}
    thresholds = (0.2, 0.5, 0.9, 0.99)
    swept = sweep_thresholds(*scored, COUNT, thresholds, **options)
    for threshold, label in zip(thresholds, swept, strict=True):
        found = cluster_pairs(*scored, COUNT, threshold=threshold, **options)
        np.testing.assert_array_equal(label, found.label)
        assert found.split == (split if calibrated else "raise_threshold")


def test_what_cannot_be_is_refused(scored):
    with pytest.raises(ConfigError, match="split must be one of consensus, raise_threshold"):
        cluster_pairs(*scored, COUNT, split="by hand")
    with pytest.raises(ConfigError, match="votes are none"):
        cluster_pairs(*scored, COUNT, target_precision=0.9, calibrated=False)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        cluster_pairs(*scored, COUNT, target_precision=1.0)
