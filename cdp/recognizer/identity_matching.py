"""Match pseudo-label clusters to labelled identities by mean-embedding cosine.

The contract:
- Clusters and identities are compared by the cosine of their mean vectors, in one view.
- The threshold is fitted on the labelled identities: a given share of them exceeds it with another
  labelled identity. No truth about unlabelled images is used.
- A match is a proposal: in the paper's setting the two sets are disjoint and nothing should match.
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
    """The labelled identity of each cluster.

    identity : (c,) int64, a label of the labelled set for cluster 0 .. c-1, or `UNLABELLED`.
    similarity : (c,) float32, cosine of the cluster's mean to its nearest identity's; -1 for a
        cluster without images.
    threshold : float, cosine above which a cluster matches that identity.
    """

    identity: np.ndarray
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
    """Find the labelled identity of each cluster, where there is one.

    Parameters
    ----------
    vectors, label : (n, d) float32, unit length, and (n,) int64, 0 or above
        One view of the labelled images.
    pseudo_vectors, pseudo_label : (u, d) float32, unit length, and (u,) int64
        The same view of the unlabelled images; -1 is left out.
    far : float
        Share of the labelled identities whose cosine to another one may exceed the threshold, in
        [0, 1).
    unseen : (n,) bool or None
        Images of identities that the view's model was not trained on. The threshold is fitted on
        them, because a model separates its training identities better than new ones. None: on all.

    Raises
    ------
    DataError
        Fewer than two labelled identities, none of them unseen, or arrays that do not match.
    """
    if len(vectors) != len(label) or len(pseudo_vectors) != len(pseudo_label):
        raise DataError(
            f"one label a vector expected, got {len(label)} for {len(vectors)} and "
            f"{len(pseudo_label)} for {len(pseudo_vectors)}"
        )
    identities, group = np.unique(label, return_inverse=True)
    if len(identities) < 2:
        raise DataError(
            f"two labelled identities or more expected to match with, got {len(identities)}"
        )
    mean = _mean_vectors(vectors, group, len(identities))
    chosen = np.ones(len(identities), bool)
    if unseen is not None:
        chosen = np.bincount(group, weights=unseen, minlength=len(identities)) > 0
    if not chosen.any():
        raise DataError("no identity is unseen, so no threshold can be fitted; pass unseen=None")
    rows = np.flatnonzero(chosen)
    nearest = _find_nearest(mean[rows], mean, without=rows)[0]
    threshold = threshold_at_far(nearest, far)
    count = int(pseudo_label.max(initial=UNLABELLED)) + 1
    kept = pseudo_label != UNLABELLED
    filled = np.bincount(pseudo_label[kept], minlength=count) > 0
    cluster = _mean_vectors(pseudo_vectors[kept], pseudo_label[kept], count)
    similarity, place = _find_nearest(cluster, mean)
    similarity[~filled] = -1
    found = np.where(similarity > threshold, identities[place], UNLABELLED)
    return IdentityMatch(found.astype(np.int64), similarity, threshold)


def _mean_vectors(vectors: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """Unit mean of each group, (count, d); 0 for an empty one."""
    total = np.zeros((count, vectors.shape[1]))
    np.add.at(total, group, vectors)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return (total / np.maximum(length, 1e-12)).astype(np.float32)


def _find_nearest(
    queries: np.ndarray, means: np.ndarray, without: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and row of each query's nearest mean; query i leaves out the mean `without[i]`."""
    similarity = np.empty(len(queries), np.float32)
    place = np.empty(len(queries), np.int64)
    for low in range(0, len(queries), _BLOCK):
        part = slice(low, low + _BLOCK)
        cosine = queries[part] @ means.T
        if without is not None:
            cosine[np.arange(len(cosine)), without[part]] = -np.inf
        place[part] = cosine.argmax(1)
        similarity[part] = cosine.max(1)
    return similarity, place
