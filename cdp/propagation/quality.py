"""How good are pseudo-labels nobody knows the truth of: what calibrated pairs promise of them.

The contract:
- Enters: labels, the scored candidate pairs and their calibrated probabilities. No truth.
- A row belongs to its cluster with the probability its pairs inside give together. Pairs of one
  row repeat each other (`REPEAT`), so many of them weigh as much as two; two rows of a cluster that
  were never candidates are one person when both belong.
- As in the consensus split, a pair speaks as often as neighbour lists name it.
- Two clusters are one person with the probability their pairs give on average; that is what the
  clustering may have missed. Were they one, there would be about as many candidate pairs between
  them as within: where only a share of those appears, the odds fall by its square root. People
  split with no candidate pair between the parts go unseen.
- Estimates are as good as the calibration: give probabilities after the second reading
  (`cdp.mediator.second_stage`) and the prior correction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError
from cdp.types import UNLABELLED, PairTable

REPEAT = 0.5
"""Correlation of what two pairs of one row say: n of them weigh as much as n / (1 + (n - 1) REPEAT)
independent ones (the design effect of Kish 1965). With it a row of confidence .75 belonged to its
cluster in .75 of the cases on LFW at 24 and 16 px, twelve draws; the square root below was measured
there too (a logistic fit gives the exponent .53)."""


@dataclass(frozen=True)
class QualityEstimate:
    """What the probabilities promise of a clustering, all in [0, 1].

    precision, recall, f : of pairs, rows without label counted as clusters of one.
    expected_precision : (clusters,) float32, share of the cluster's pairs that are one person.
    confidence : (n,) float32, probability that the row belongs to its cluster; 0 without label.
    """

    precision: float
    recall: float
    f: float
    expected_precision: np.ndarray
    confidence: np.ndarray


def estimate_quality(
    label: np.ndarray, pairs: PairTable, probability: np.ndarray
) -> QualityEstimate:
    """Estimate pairwise precision, recall and F, and the trust in each cluster and row.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none.
    pairs : all candidate pairs.
    probability : (m,) float in [0, 1], calibrated.

    Returns
    -------
    QualityEstimate
        With no pair together precision is 1; with no true pair expected recall is 1.

    Raises
    ------
    DataError
        Lengths that differ, or a probability outside [0, 1].

    Source: ours.
    """
    label = np.asarray(label)
    value = np.asarray(probability, np.float64)
    if value.shape != (len(pairs),):
        raise DataError(f"expected one probability a pair, got {len(pairs)} pairs, {value.shape}")
    if len(value) and not (value.min() >= 0 and value.max() <= 1):
        raise DataError(f"probabilities must lie in [0, 1], got [{value.min()}, {value.max()}]")
    count, clusters = len(label), int(label.max(initial=UNLABELLED)) + 1
    lone = label == UNLABELLED
    group = label.astype(np.int64)
    group[lone] = clusters + np.arange(int(lone.sum()))
    groups = clusters + int(lone.sum())
    size = np.bincount(group, minlength=groups).astype(np.float64)
    pair_weight = pairs.weight
    evidence = _find_odds(value) * pair_weight
    one, other = group[pairs.source], group[pairs.target]
    inside = one == other

    total, heard, number = np.zeros(count), np.zeros(count), np.zeros(count)
    for end in (pairs.source[inside], pairs.target[inside]):
        total += np.bincount(end, evidence[inside], count)
        heard += np.bincount(end, pair_weight[inside], count)
        number += np.bincount(end, minlength=count)
    independent = number / (1 + np.maximum(number - 1, 0) * REPEAT)
    belongs = 1 / (1 + np.exp(-total / np.maximum(heard, 1) * independent))
    belongs[lone] = 1
    summed = np.bincount(group, belongs, groups)
    squares = np.bincount(group, belongs**2, groups)
    known = value - belongs[pairs.source] * belongs[pairs.target]
    true = (summed**2 - squares) / 2 + np.bincount(one[inside], known[inside], groups)
    together = size * (size - 1) / 2
    true = np.clip(true, 0, together)

    apart = compare_groups(group, pairs, value)
    missed = float((apart.chance * size[apart.first] * size[apart.second]).sum())
    correct, claimed = float(true.sum()), float(together.sum())
    precision = correct / claimed if claimed else 1.0
    recall = correct / (correct + missed) if correct + missed else 1.0
    harmonic = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return QualityEstimate(
        precision=precision,
        recall=recall,
        f=harmonic,
        expected_precision=(true[:clusters] / np.maximum(together[:clusters], 1)).astype(
            np.float32
        ),
        confidence=np.where(lone, 0, belongs).astype(np.float32),
    )


@dataclass(frozen=True)
class GroupPairs:
    """Pairs of groups with candidate pairs between them.

    first, second : (q,) int64, groups, first < second; rising. chance : (q,) float64, probability
    that the two are one person.
    """

    first: np.ndarray
    second: np.ndarray
    chance: np.ndarray


def compare_groups(group: np.ndarray, pairs: PairTable, probability: np.ndarray) -> GroupPairs:
    """How likely two groups are one person, for all with candidate pairs between them.

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
    said = np.bincount(place, _find_odds(probability)[across] * pair_weight, len(key))
    mean = said / np.bincount(place, pair_weight, len(key))
    odds = mean + 0.5 * np.log(listed / np.maximum(expected, listed))
    return GroupPairs(first, second, 1 / (1 + np.exp(-odds)))


def _find_odds(probability: np.ndarray) -> np.ndarray:
    """Log-odds, none beyond 14."""
    clipped = np.clip(np.asarray(probability, np.float64), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(clipped) - np.log1p(-clipped))
