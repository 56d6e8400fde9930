"""Precision and recall of pseudo-labels, estimated from pair probabilities without ground truth.

The contract:
- Enters: labels, the scored candidate pairs and their calibrated probabilities. No truth.
- A row belongs to its cluster with the probability that its pairs inside give together. Pairs of
  one row are correlated (`PAIR_CORRELATION`), so many of them weigh as much as two; two rows of a
  cluster that were never candidates are a positive pair when both belong.
- Each pair is weighted by `listings`, as in the consensus split.
- Two clusters are one identity with the mean probability of the pairs between them: these are the
  positives that the clustering may have missed. One identity would have about as many candidate
  pairs between the two as within them: where only a share of those appears, the odds are
  multiplied by its square root. True pairs that no k-NN graph proposes cannot be counted as missed,
  so recall is overestimated by them.
- Near-equal rows (`representative`) are evidence once, and counted as the images that they are.
- Estimates are as good as the calibration: give probabilities after the second stage
  (`cdp.mediator.second_stage`) and the prior correction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cdp.arrays.log_odds import to_log_odds, to_probability
from cdp.propagation.representatives import RowGroups
from cdp.propagation.scored_pairs import check_probability
from cdp.types import UNLABELLED, PairTable

PAIR_CORRELATION = 0.5
"""Correlation r between the pairs of one row: n of them weigh as much as n / (1 + (n - 1) r)
independent ones (the design effect of Kish 1965). With .5 a row of confidence .75 belonged to its
cluster in .75 of the cases on LFW at 24 and 16 px, twelve draws; the square root was measured there
too (a logistic fit gives the exponent .53)."""

_MARGIN = 1e-6
"""Probabilities count as at least this and at most 1 - this: log-odds of at most 14."""


@dataclass(frozen=True)
class QualityEstimate:
    """Estimated quality of a clustering, all values in [0, 1].

    precision, recall, f : pairwise; rows without label counted as clusters of one.
    expected_precision : (clusters,) float32, share of the cluster's pairs that are positive.
    confidence : (n,) float32, probability that the row belongs to its cluster; 0 without label.
    """

    precision: float
    recall: float
    f: float
    expected_precision: np.ndarray
    confidence: np.ndarray


def estimate_quality(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    representative: np.ndarray | None = None,
) -> QualityEstimate:
    """Estimate pairwise precision, recall and F, and the confidence of each cluster and row.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none.
    pairs : all candidate pairs.
    probability : (m,) float in [0, 1], calibrated.
    representative : (n,) int64, the row that stands for each row, see `cdp.knn.near_equal`; None:
        every row for itself.

    Returns
    -------
    QualityEstimate
        With no pair together precision is 1; with no positive pair expected recall is 1.

    Raises
    ------
    DataError
        Lengths that differ, or a probability outside [0, 1].

    Source: ours.
    """
    label = np.asarray(label)
    value = check_probability(probability, len(pairs))
    if representative is None:
        return _estimate(label, pairs, value, np.ones(len(label)))
    rows = RowGroups.of(representative, label)
    found = _estimate(label[rows.rows], *rows.reduce_pairs(pairs, value), rows.size.astype(float))
    return replace(found, confidence=found.confidence[rows.group])


def _estimate(
    label: np.ndarray, pairs: PairTable, value: np.ndarray, images: np.ndarray
) -> QualityEstimate:
    """The estimate, where row i stands for `images[i]` images."""
    clusters = int(label.max(initial=UNLABELLED)) + 1
    alone = label == UNLABELLED
    group = label.astype(np.int64)
    group[alone] = clusters + np.arange(int(alone.sum()))
    size = np.bincount(group, images, clusters + int(alone.sum()))

    belongs = _estimate_membership(group, pairs, value)
    belongs[alone | ((np.bincount(group)[group] == 1) & (images > 1))] = 1
    together = size * (size - 1) / 2
    expected = _count_positives(group, len(size), pairs, value, belongs, images)
    positive = np.clip(expected, 0, together)
    apart = compare_groups(group, pairs, value)
    missed = float((apart.chance * size[apart.first] * size[apart.second]).sum())
    correct, predicted = float(positive.sum()), float(together.sum())
    precision = correct / predicted if predicted else 1.0
    recall = correct / (correct + missed) if correct + missed else 1.0
    harmonic = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return QualityEstimate(
        precision=precision,
        recall=recall,
        f=harmonic,
        expected_precision=(positive[:clusters] / np.maximum(together[:clusters], 1)).astype(
            np.float32
        ),
        confidence=np.where(alone, 0, belongs).astype(np.float32),
    )


def _estimate_membership(group: np.ndarray, pairs: PairTable, value: np.ndarray) -> np.ndarray:
    """(n,) float64, probability that each row belongs to its group, from its pairs inside."""
    count = len(group)
    pair_weight = pairs.weight
    evidence = to_log_odds(value, margin=_MARGIN) * pair_weight
    inside = group[pairs.source] == group[pairs.target]
    total, weight, number = np.zeros(count), np.zeros(count), np.zeros(count)
    for end in (pairs.source[inside], pairs.target[inside]):
        total += np.bincount(end, evidence[inside], count)
        weight += np.bincount(end, pair_weight[inside], count)
        number += np.bincount(end, minlength=count)
    independent = number / (1 + np.maximum(number - 1, 0) * PAIR_CORRELATION)
    return to_probability(total / np.maximum(weight, 1) * independent)


def _count_positives(
    group: np.ndarray,
    groups: int,
    pairs: PairTable,
    value: np.ndarray,
    belongs: np.ndarray,
    images: np.ndarray,
) -> np.ndarray:
    """(groups,) float64, expected positive pairs of images inside each group.

    A candidate pair is positive with its probability, any other pair when both rows belong; the
    images of one row are positive pairs.
    """
    summed = np.bincount(group, images * belongs, groups)
    squares = np.bincount(group, (images * belongs) ** 2, groups)
    inside = group[pairs.source] == group[pairs.target]
    known = value - belongs[pairs.source] * belongs[pairs.target]
    known *= images[pairs.source] * images[pairs.target]
    among = np.bincount(group, images * (images - 1) / 2, groups)
    return np.asarray(
        (summed**2 - squares) / 2
        + np.bincount(group[pairs.source][inside], known[inside], groups)
        + among
    )


@dataclass(frozen=True)
class GroupPairs:
    """Pairs of groups with candidate pairs between them.

    first, second : (q,) int64, groups, first < second; rising.
    chance : (q,) float64, probability that the two are one identity.
    """

    first: np.ndarray
    second: np.ndarray
    chance: np.ndarray


def compare_groups(group: np.ndarray, pairs: PairTable, probability: np.ndarray) -> GroupPairs:
    """Probability that two groups are one identity, for all with candidate pairs between them.

    Parameters
    ----------
    group : (n,) int64, 0 and up; every row has one.
    pairs : all candidate pairs.
    probability : (m,) float in [0, 1], calibrated.
    """
    groups = int(group.max(initial=-1)) + 1
    size = np.bincount(group, minlength=groups).astype(np.float64)
    one, other = group[pairs.source], group[pairs.target]
    across = one != other
    low, high = np.minimum(one, other)[across], np.maximum(one, other)[across]
    key, place, listed = np.unique(low * groups + high, return_inverse=True, return_counts=True)
    first, second = key // max(groups, 1), key % max(groups, 1)
    within = np.bincount(one[~across], minlength=groups)
    density = np.where(size > 1, within / np.maximum(size * (size - 1) / 2, 1), 1)
    expected = size[first] * size[second] * np.minimum(density[first], density[second])
    pair_weight = pairs.weight[across]
    evidence = to_log_odds(probability, margin=_MARGIN)[across]
    total = np.bincount(place, evidence * pair_weight, len(key))
    mean = total / np.bincount(place, pair_weight, len(key))
    return GroupPairs(
        first,
        second,
        to_probability(mean + 0.5 * np.log(listed / np.maximum(expected, listed))),
    )
