"""Clustering metrics: pairwise and BCubed precision, recall and F, and NMI, computed exactly.

The contract:
- Scores come from the sparse contingency table of identities and clusters, in O(n log n) time and
  O(n) memory; pairs are never listed.
- An image without a pseudo-label (`UNLABELLED`) is a cluster of its own: discarding images costs
  recall and is never rewarded.
- A share of nothing is 1 where no error was possible, as stated at each function.
"""

from __future__ import annotations

import numpy as np

from cdp.errors import DataError
from cdp.types import UNLABELLED


def score_pairwise(truth: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    """Pairwise precision, recall and F of a clustering.

    Over all n(n-1)/2 unordered pairs of images: precision is the share of positive pairs (of one
    identity) among those of one cluster, recall the share of positive pairs that share a cluster.

    Parameters
    ----------
    truth : (n,) integer, the true identity of each image, all >= 0.
    label : (n,) integer, the cluster of each image; `UNLABELLED` is a cluster of its own.

    Returns
    -------
    (precision, recall, f) : floats in [0, 1]; f is their harmonic mean, 0 when both are 0.
        With no pair in one cluster precision is 1; with no positive pair recall is 1 (no error was
        possible). No image at all scores (1, 1, 1).

    Raises
    ------
    DataError : the shapes differ, are not (n,), or an identity is unknown.

    Source: Zhan et al. 2018, section 4.2 (pairwise recall and precision).
    """
    count, row, column = _contingency(truth, label)
    both = _pair_count(count)
    true = _pair_count(np.bincount(row, weights=count))
    predicted = _pair_count(np.bincount(column, weights=count))
    precision = both / predicted if predicted else 1.0
    recall = both / true if true else 1.0
    return precision, recall, _harmonic_mean(precision, recall)


def score_bcubed(truth: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    """BCubed precision, recall and F of a clustering.

    Each image's precision is the share of its cluster that has its identity, itself included;
    its recall the share of its identity found in its cluster. The scores are the means over
    images, so a large identity weighs by its images and not by their square.

    Parameters, raises and ties as in `score_pairwise`. No image at all scores (1, 1, 1).

    Source: Amigo et al., *A comparison of extrinsic clustering evaluation metrics*, 2009.
    """
    count, row, column = _contingency(truth, label)
    if not count.size:
        return 1.0, 1.0, 1.0
    squared = count.astype(np.float64) ** 2
    total = float(count.sum())
    precision = float((squared / np.bincount(column, weights=count)[column]).sum() / total)
    recall = float((squared / np.bincount(row, weights=count)[row]).sum() / total)
    return precision, recall, _harmonic_mean(precision, recall)


def score_with_distractors(truth: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    """BCubed precision, recall and F of known identities clustered together with distractors.

    As `score_bcubed`, the mean over the images of known identity: a distractor matches none of
    them, and how distractors are clustered among themselves does not count.

    Parameters
    ----------
    truth : (n,) integer, the identity of each image; below 0 a distractor.
    label : (n,) integer, the cluster of each image; `UNLABELLED` is a cluster of its own.

    Returns
    -------
    (precision, recall, F) : floats in [0, 1]; 1 without a known image.
    """
    truth, label = np.asarray(truth), np.asarray(label)
    known = truth >= 0
    count, row, column = _contingency(truth[known], label[known])
    if not count.size:
        return 1.0, 1.0, 1.0
    # Columns number the clusters of known images; distractors in them enlarge these clusters.
    own = label[known]
    alone = own == UNLABELLED
    cluster = np.unique(own[~alone])
    mixed = label[~known]
    mixed = mixed[np.isin(mixed, cluster)]
    distractors = np.bincount(np.searchsorted(cluster, mixed), minlength=len(cluster))
    distractors = np.append(distractors, np.zeros(int(alone.sum()), np.int64))
    inside, size = np.bincount(column, weights=count), np.bincount(row, weights=count)
    squared = count.astype(np.float64) ** 2
    precision = float((squared / (inside + distractors)[column]).sum() / count.sum())
    recall = float((squared / size[row]).sum() / count.sum())
    return precision, recall, _harmonic_mean(precision, recall)


def score_nmi(truth: np.ndarray, label: np.ndarray) -> float:
    """Normalised mutual information of a clustering, arithmetic normalisation.

    I(truth; label) / mean(H(truth), H(label)), in [0, 1]; 1 when both entropies are 0 (one
    identity in one cluster). Not adjusted for chance: many singletons score high, so read it
    together with `score_pairwise`.

    Parameters and raises as in `score_pairwise`.
    """
    count, row, column = _contingency(truth, label)
    if not count.size:
        return 1.0
    share = count / count.sum()
    by_identity = np.bincount(row, weights=share)
    by_cluster = np.bincount(column, weights=share)
    entropy = -(by_identity @ np.log(by_identity)) - (by_cluster @ np.log(by_cluster))
    if entropy <= 0.0:
        return 1.0
    information = share @ (np.log(share) - np.log(by_identity[row]) - np.log(by_cluster[column]))
    return float(np.clip(2.0 * information / entropy, 0.0, 1.0))


def _contingency(truth: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The non-empty cells of identity x cluster: (count, identity row, cluster column)."""
    truth, label = np.asarray(truth), np.asarray(label)
    if truth.ndim != 1 or truth.shape != label.shape:
        raise DataError(
            f"expected truth and label of one shape (n,), got {truth.shape} and {label.shape}; "
            "pass one identity and one cluster an image"
        )
    for name, value in (("truth", truth), ("label", label)):
        if value.size and not np.issubdtype(value.dtype, np.integer):
            raise DataError(f"expected integers in {name}, got dtype {value.dtype}; encode them")
    if truth.size and truth.min() < 0:
        raise DataError(
            f"expected every identity known (>= 0), got {truth.min()} at row {truth.argmin()}; "
            "leave images of unknown identity out of the score"
        )
    if label.size and label.min() < UNLABELLED:
        raise DataError(
            f"expected labels >= {UNLABELLED}, got {label.min()} at row {label.argmin()}"
        )
    row = np.unique(truth, return_inverse=True)[1].astype(np.int64)
    column = np.unique(label, return_inverse=True)[1].astype(np.int64)
    alone = label == UNLABELLED
    column[alone] = column.max(initial=0) + 1 + np.arange(alone.sum())
    column = np.unique(column, return_inverse=True)[1].astype(np.int64)
    width = int(column.max(initial=0)) + 1
    cell, count = np.unique(row * width + column, return_counts=True)
    return count, cell // width, cell % width


def _pair_count(size: np.ndarray) -> int:
    """Number of unordered pairs inside groups of these sizes, as an exact integer."""
    whole = np.rint(size).astype(np.int64)
    return int((whole * (whole - 1) // 2).sum())


def _harmonic_mean(precision: float, recall: float) -> float:
    total = precision + recall
    return 2.0 * precision * recall / total if total else 0.0
