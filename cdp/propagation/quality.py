"""Precision and recall of pseudo-labels, estimated from pair probabilities without ground truth.

The contract:
- Enters: labels, the scored candidate pairs and their calibrated probabilities. No truth.
- A row belongs to its cluster with the probability that its pairs inside give together. Pairs of
  one row are correlated (`PAIR_CORRELATION`), so many of them weigh as much as two; two rows of a
  cluster that were never candidates are a positive pair when both belong.
- Parts of a cluster that few pairs hold together may be two identities; their pairs are counted as
  wrong with that probability (`cdp.propagation.thin_merges`).
- Each pair is weighted by `listings`, as in the consensus split.
- Positives that the clustering may have missed: every two clusters with candidate pairs between
  them count with the probability that they are one identity (`cdp.propagation.group_pairs`), and
  pairs that no k-NN graph proposes at the share they had among held-out people. That share, and a
  correction of those probabilities, come from `cdp.propagation.missed_pairs`, where known.
- An estimate whose assumptions are seen to fail is withheld: it has reasons instead of figures.
- Near-equal rows (`representative`) are evidence once, and counted as the images that they are.
- Estimates are as good as the calibration: give probabilities after the second stage
  (`cdp.mediator.second_stage`) and the prior correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.log_odds import to_log_odds, to_probability
from cdp.arrays.scratch import BLOCK
from cdp.arrays.threads import list_blocks
from cdp.propagation.group_pairs import MARGIN, compare_parts
from cdp.propagation.missed_pairs import MissedPairs
from cdp.propagation.representatives import RowGroups
from cdp.propagation.scored_pairs import check_probability, mark_inside
from cdp.propagation.thin_merges import ThinMerges, find_sparse, find_thin_merges
from cdp.propagation.unlisted import average_unlisted
from cdp.types import UNLABELLED, PairTable

PAIR_CORRELATION = 0.5
"""Correlation r between the pairs of one row: n of them weigh as much as n / (1 + (n - 1) r)
independent ones (the design effect of Kish 1965). With .5 a row of confidence .75 belonged to its
cluster in .75 of the cases on LFW at 24 and 16 px, twelve draws; the square root was measured there
too (a logistic fit gives the exponent .53)."""

NO_PAIR = "no two images share a cluster, so there is no pair that could be right or wrong"
FULL_LISTS = (
    "most neighbour lists hold images of their own cluster alone, so that further images of a "
    "person cannot be seen: raise k beyond the images of a person, or leave near-equal ones out"
)
_FULL = 0.95
"""Share of a cluster's listings inside it, from which on its lists count as full."""
_FULL_SHARE = 0.5
"""Share of the clustered rows in clusters of full lists, from which on recall is withheld."""
_FULL_SIZE = 3
"""Multiples of k, at most, that a cluster of full lists has; a larger one grew across lists."""


@dataclass(frozen=True)
class QualityEstimate:
    """Estimated quality of a clustering, all values in [0, 1].

    precision, recall, f : pairwise; rows without label counted as clusters of one. None where
        withheld.
    expected_precision : (clusters,) float32, share of the cluster's pairs that are positive; NaN
        where withheld too.
    confidence : (n,) float32, probability that the row belongs to its cluster; 0 without label.
    reasons : why figures are withheld; empty where none is. `expected_precision` and `confidence`
        then still order clusters and rows, and are no probabilities.
    """

    precision: float | None
    recall: float | None
    f: float | None
    expected_precision: np.ndarray
    confidence: np.ndarray
    reasons: tuple[str, ...] = ()

    def withhold_clusters(self) -> QualityEstimate:
        """The estimate without any cluster's expected precision."""
        return replace(self, expected_precision=np.full_like(self.expected_precision, np.nan))

    def withhold(self, *reasons: str, recall_only: bool = False) -> QualityEstimate:
        """The estimate without its figures, or without recall and F; empty reasons do not count."""
        given = tuple(reason for reason in reasons if reason and reason not in self.reasons)
        if not given:
            return self
        precision = self.precision if recall_only else None
        together = self.reasons + given
        return replace(self, precision=precision, recall=None, f=None, reasons=together)


def estimate_quality(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    representative: np.ndarray | None = None,
    *,
    missed: MissedPairs | None = None,
) -> QualityEstimate:
    """Estimate pairwise precision, recall and F, and the confidence of each cluster and row.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none.
    pairs : all candidate pairs.
    probability : (m,) float in [0, 1], calibrated.
    representative : (n,) int64, the row that stands for each row, see `cdp.knn.near_equal`; None:
        every row for itself.
    missed : how many pairs of held-out people were missed (`measure_missed`); None: unknown.

    Returns
    -------
    QualityEstimate
        Withheld where no two rows share a cluster.

    Raises
    ------
    DataError
        Lengths that differ, or a probability outside [0, 1].

    Source: ours.
    """
    labels = [np.asarray(label)]
    return next(estimate_cuts(labels, pairs, probability, representative, missed=missed))


def estimate_cuts(
    labels: Iterable[np.ndarray],
    pairs: PairTable,
    probability: np.ndarray,
    representative: np.ndarray | None = None,
    *,
    missed: MissedPairs | None = None,
) -> Iterator[QualityEstimate]:
    """`estimate_quality` of several labellings of the same rows, one after the other.

    labels : the loosest first: what the stricter ones have in common with it is computed once.
    """
    value = check_probability(probability, len(pairs))
    merges: ThinMerges | None = None
    stands = np.empty(0, np.int64)
    for label in labels:
        seen = _Evidence.of(label, pairs, value, representative)
        sparse = find_sparse(seen.label, seen.pairs)
        same_rows = np.array_equal(stands, seen.rows)
        if merges is None or not same_rows or not merges.make_up(seen.label, sparse):
            merges, stands = seen.find_merges(sparse), seen.rows
        yield seen.estimate(merges.count(seen.label), missed or MissedPairs())


def estimate_again(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    representative: np.ndarray | None,
    known: ThinMerges,
    new: np.ndarray,
    *,
    missed: MissedPairs | None = None,
) -> tuple[QualityEstimate, ThinMerges]:
    """`estimate_quality` of labels that have clusters in common with those estimated before.

    known : the merges inside the clusters before, as this returned them.
    new : (clusters,) bool, the clusters that are merged anew. Any other has the rows, and the
        probabilities inside, of a cluster before.
    missed : as for `estimate_quality`.

    Returns
    -------
    The estimate, equal to that of `estimate_quality`, and the merges inside these clusters.
    """
    label = np.asarray(label)
    value = check_probability(probability, len(pairs))
    seen = _Evidence.of(label, pairs, value, representative)
    found = seen.find_merges(find_sparse(seen.label, seen.pairs) & new)
    merges = known.keep(label, ~new).join(found, seen.rows)
    return seen.estimate(merges.count(label), missed or MissedPairs()), merges


@dataclass(frozen=True)
class _Evidence:
    """Labels and pairs in which the near-equal rows of a cluster are one row.

    label : (g,) int64. pairs, value : between these rows. images : (g,) float64, how many images
    each stands for. rows : (g,) int64, the row that each is. group : (n,) int64, the one that
    stands for each row.
    """

    label: np.ndarray
    pairs: PairTable
    value: np.ndarray
    images: np.ndarray
    rows: np.ndarray
    group: np.ndarray

    @classmethod
    def of(
        cls,
        label: np.ndarray,
        pairs: PairTable,
        value: np.ndarray,
        representative: np.ndarray | None,
    ) -> _Evidence:
        if representative is None:
            rows = np.arange(len(label))
            return cls(label, pairs, value, np.ones(len(label)), rows, rows)
        groups = RowGroups.of(representative, label)
        few, score = groups.reduce_pairs(pairs, value)
        images = groups.size.astype(float)
        return cls(label[groups.rows], few, score, images, groups.rows, groups.group)

    def find_merges(self, sparse: np.ndarray) -> ThinMerges:
        """The merges inside sparse clusters."""
        return find_thin_merges(self.label, sparse, self.pairs, self.value, self.images)

    def estimate(self, thin: np.ndarray, missed: MissedPairs) -> QualityEstimate:
        """The estimate of all rows; `thin` pairs of each cluster are wrong."""
        found = _estimate(self.label, self.pairs, self.value, self.images, thin, missed)
        return replace(found, confidence=found.confidence[self.group])


def _estimate(
    label: np.ndarray,
    pairs: PairTable,
    value: np.ndarray,
    images: np.ndarray,
    thin: np.ndarray,
    missed: MissedPairs,
) -> QualityEstimate:
    """The estimate, where row i stands for `images[i]` images, and `thin` pairs are wrong."""
    clusters = int(label.max(initial=UNLABELLED)) + 1
    alone = label == UNLABELLED
    group = label.astype(np.int64)
    group[alone] = clusters + np.arange(int(alone.sum()))
    size = np.bincount(group, images, clusters + int(alone.sum()))

    belongs = _estimate_membership(group, pairs, value)
    belongs[alone | ((np.bincount(group)[group] == 1) & (images > 1))] = 1
    together = size * (size - 1) / 2
    expected = _count_positives(group, len(size), pairs, value, belongs, images)
    expected[:clusters] -= thin
    positive = np.clip(expected, 0, together)
    apart = sum(
        float(to_probability(two.log_odds + missed.log_odds) @ (size[two.first] * size[two.second]))
        for two in compare_parts(group, pairs, value)
    )
    correct, predicted = float(positive.sum()), float(together.sum())
    precision = correct / max(predicted, 1)
    seen = 1 - average_unlisted(missed.unlisted, size[:clusters])
    recall = seen * correct / (correct + apart) if correct + apart else 1.0
    harmonic = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    estimate = QualityEstimate(
        precision=precision,
        recall=recall,
        f=harmonic,
        expected_precision=(positive[:clusters] / np.maximum(together[:clusters], 1)).astype(
            np.float32
        ),
        confidence=np.where(alone, 0, belongs).astype(np.float32),
    )
    if not predicted:
        return estimate.withhold(NO_PAIR)
    return estimate


def are_lists_full(label: np.ndarray, pairs: PairTable, k: int) -> bool:
    """Whether most clustered rows list their own cluster alone, so that recall cannot be seen.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none.
    pairs : all candidate pairs, with `listings`.
    k : neighbours a row in each graph.
    """
    label = np.asarray(label)
    size = np.bincount(label[label != UNLABELLED], minlength=1)
    total, inside = np.zeros(len(size)), np.zeros(len(size))
    for part in list_blocks(0, len(pairs), BLOCK):
        few = pairs.take(part)
        _add_listings(label, few.source, few.target, few.weight, total, inside)
    full = (inside >= _FULL * total) & (total > 0) & (size > k) & (size <= _FULL_SIZE * k)
    return bool(size[full].sum() > _FULL_SHARE * max(size.sum(), 1))


def average_inside(
    label: np.ndarray, pairs: PairTable, scores: np.ndarray, threshold: float
) -> np.ndarray:
    """How well each row fits its cluster where scores are no probabilities.

    Returns
    -------
    (n,) float32 in [0, 1]
        Mean score of the row's pairs above the threshold within its cluster; 0 without label.
    """
    inside = mark_inside(label, pairs.source, pairs.target)
    inside &= scores > np.float64(threshold)
    weight = np.clip(scores[inside], 0, 1).astype(np.float64)
    total, number = np.zeros(len(label)), np.zeros(len(label))
    for end in (pairs.source[inside], pairs.target[inside]):
        total += np.bincount(end, weight, len(label))
        number += np.bincount(end, minlength=len(label))
    return (total / np.maximum(number, 1)).astype(np.float32)


def sum_inside(
    label: np.ndarray, pairs: PairTable, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The summed score of each row, (n,) float64, and the mean score of each cluster's pairs.

    pairs : those whose two rows share a label. A cluster without pairs has the mean 0.
    """
    count, clusters = len(label), int(label.max(initial=UNLABELLED)) + 1
    by_source, by_target, total = np.zeros(count), np.zeros(count), np.zeros(clusters)
    number = np.zeros(clusters, np.int64)
    _add_scores(label, pairs.source, pairs.target, scores, by_source, by_target, total, number)
    return by_source + by_target, total / np.maximum(number, 1)


def _estimate_membership(group: np.ndarray, pairs: PairTable, value: np.ndarray) -> np.ndarray:
    """(n,) float64, probability that each row belongs to its group, from its pairs inside."""
    count = len(group)
    total, weight, number = np.zeros(count), np.zeros(count), np.zeros(count)
    for part in list_blocks(0, len(pairs), BLOCK):
        few = pairs.take(part)
        evidence = to_log_odds(value[part], margin=MARGIN)
        _add_inside(group, few.source, few.target, evidence, few.weight, total, weight, number)
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
    known = np.zeros(groups)
    for part in list_blocks(0, len(pairs), BLOCK):
        few = pairs.take(part)
        _add_surprise(group, few.source, few.target, value[part], belongs, images, known)
    among = np.bincount(group, images * (images - 1) / 2, groups)
    return np.asarray((summed**2 - squares) / 2 + known + among)


@njit(cache=True, nogil=True)
def _add_scores(
    label: Any,
    source: Any,
    target: Any,
    score: Any,
    by_source: Any,
    by_target: Any,
    total: Any,
    number: Any,
) -> None:
    """Add the scores of pairs to both their rows and to their cluster."""
    for e in range(len(source)):
        value = np.float64(score[e])
        by_source[source[e]] += value
        by_target[target[e]] += value
        total[label[source[e]]] += value
        number[label[source[e]]] += 1


@njit(cache=True, nogil=True)
def _add_listings(
    label: Any, source: Any, target: Any, weight: Any, total: Any, inside: Any
) -> None:
    """Add the listings of the pairs to the clusters of both their rows, and of those inside."""
    for e in range(len(source)):
        one, other = label[source[e]], label[target[e]]
        for own in (one, other):
            if own != UNLABELLED:
                total[own] += weight[e]
                if one == other:
                    inside[own] += weight[e]


@njit(cache=True, nogil=True)
def _add_inside(
    group: Any,
    source: Any,
    target: Any,
    evidence: Any,
    pair_weight: Any,
    total: Any,
    weight: Any,
    number: Any,
) -> None:
    """Add the evidence, weight and number of the pairs inside groups to both their rows."""
    for e in range(len(source)):
        if group[source[e]] == group[target[e]]:
            for end in (source[e], target[e]):
                total[end] += evidence[e] * pair_weight[e]
                weight[end] += pair_weight[e]
                number[end] += 1


@njit(cache=True, nogil=True)
def _add_surprise(
    group: Any, source: Any, target: Any, value: Any, belongs: Any, images: Any, known: Any
) -> None:
    """Add to each group how much its pairs' probabilities exceed what their rows suggest."""
    for e in range(len(source)):
        one, other = source[e], target[e]
        own = group[one]
        if own == group[other]:
            surprise = value[e] - belongs[one] * belongs[other]
            known[own] += surprise * images[one] * images[other]
