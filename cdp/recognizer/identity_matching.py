"""Pseudo-clusters that are a labelled person after all.

The contract:
- Clusters and people are compared by the cosine of their mean vectors, in one view.
- The threshold is learned from the labelled people alone: so high that few of them would be taken
  for another of them. No truth about unlabelled images is used.
- Merging is a proposal; by the paper's setting the two sets are disjoint and nothing should match.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError
from cdp.metrics.verification import threshold_at_far
from cdp.types import UNLABELLED

_BLOCK = 4096


@dataclass(frozen=True)
class IdentityMatch:
    """Which cluster is whom.

    person : (c,) int64, a label of the labelled set for cluster 0 .. c-1, or `UNLABELLED`.
    similarity : (c,) float32, cosine of the cluster's mean to its nearest person's; -1 for a
        cluster without images.
    threshold : float, above which a cluster is taken for that person.
    """

    person: np.ndarray
    similarity: np.ndarray
    threshold: float


def match_identities(
    vectors: np.ndarray,
    label: np.ndarray,
    pseudo_vectors: np.ndarray,
    pseudo_label: np.ndarray,
    *,
    far: float = 0.01,
    unseen: np.ndarray | None = None,
) -> IdentityMatch:
    """Find the labelled person of each pseudo-cluster, where there is one.

    Parameters
    ----------
    vectors, label : (n, d) float32, unit length, and (n,) int64, 0 or above
        One view of the labelled images.
    pseudo_vectors, pseudo_label : (u, d) float32, unit length, and (u,) int64
        The same view of the unlabelled images; -1 is left out.
    far : float
        Share of labelled people that may look more like another one than the threshold, in [0, 1).
    unseen : (n,) bool or None
        Images of people the view's model was not trained on; the threshold comes from them, because
        a model tells those it was trained on further apart than strangers. None: from all.

    Raises
    ------
    DataError
        Fewer than two labelled people, nobody unseen, or arrays that do not match.
    """
    if len(vectors) != len(label) or len(pseudo_vectors) != len(pseudo_label):
        raise DataError(
            f"one label a vector expected, got {len(label)} for {len(vectors)} and "
            f"{len(pseudo_label)} for {len(pseudo_vectors)}"
        )
    people, person = np.unique(label, return_inverse=True)
    if len(people) < 2:
        raise DataError(f"two labelled people or more expected to match with, got {len(people)}")
    mean = _mean_vectors(vectors, person, len(people))
    strange = np.ones(len(people), bool)
    if unseen is not None:
        strange = np.bincount(person, weights=unseen, minlength=len(people)) > 0
    if not strange.any():
        raise DataError("nobody is unseen, so no threshold can be learned; pass unseen=None")
    rows = np.flatnonzero(strange)
    nearest = _find_nearest(mean[rows], mean, without=rows)[0]
    threshold = threshold_at_far(nearest, far)
    count = int(pseudo_label.max(initial=UNLABELLED)) + 1
    kept = pseudo_label != UNLABELLED
    filled = np.bincount(pseudo_label[kept], minlength=count) > 0
    cluster = _mean_vectors(pseudo_vectors[kept], pseudo_label[kept], count)
    similarity, place = _find_nearest(cluster, mean)
    similarity[~filled] = -1
    found = np.where(similarity > threshold, people[place], UNLABELLED)
    return IdentityMatch(found.astype(np.int64), similarity, threshold)


def _mean_vectors(vectors: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """Unit mean of each group, (count, d); 0 for an empty one."""
    total = np.zeros((count, vectors.shape[1]))
    np.add.at(total, group, vectors)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return (total / np.maximum(length, 1e-12)).astype(np.float32)


def _find_nearest(
    queries: np.ndarray, people: np.ndarray, without: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and row of each query's nearest person; query i may not find person `without[i]`."""
    similarity = np.empty(len(queries), np.float32)
    place = np.empty(len(queries), np.int64)
    for low in range(0, len(queries), _BLOCK):
        part = slice(low, low + _BLOCK)
        cosine = queries[part] @ people.T
        if without is not None:
            cosine[np.arange(len(cosine)), without[part]] = -np.inf
        place[part] = cosine.argmax(1)
        similarity[part] = cosine.max(1)
    return similarity, place
