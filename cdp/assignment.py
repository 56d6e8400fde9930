"""Assignment of new images to the clusters there are, by the directions of their centres.

The contract:
- A cluster's centre in a view is the direction of the sum of its unit vectors. A new image's
  similarity to a cluster is its mean cosine over the views.
- The threshold is the one that best separates, on images of the clustering, the similarity to the
  own cluster (without the image itself) from that to the nearest other one.
- No image is forced into a cluster: below the threshold it gets -1. No cluster is made or changed.
- Views are read one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.errors import DataError
from cdp.types import UNLABELLED, View, load_view

_NOTHING = 1e-5
"""Length below which a sum of unit vectors is the rounding of none."""
SAMPLE = 2000
"""Images on which the threshold is chosen, at most."""


@dataclass(frozen=True)
class ClusterCentres:
    """The centres of a clustering.

    centres : a (clusters, d_v) float32 array a view, unit rows.
    threshold : mean cosine that a new image must exceed, in [-1, 1]; inf without a cluster.
    """

    centres: tuple[np.ndarray, ...]
    threshold: float

    @classmethod
    def fit(cls, views: Sequence[View], label: np.ndarray, seed: int = 0) -> ClusterCentres:
        """The centres of a clustering and the threshold of its images.

        Source: ours.

        Parameters
        ----------
        views : (n, d_v) arrays or functions that load them.
        label : (n,) int64, 0 .. clusters - 1; -1 none.
        seed : of the sample for the threshold.
        """
        count = int(label.max(initial=UNLABELLED)) + 1
        rows = np.sort(np.random.default_rng(seed).permutation(len(label))[:SAMPLE])
        own = np.zeros(len(rows))
        every = np.zeros((len(rows), count), np.float32)
        centres = []
        for view in views:
            unit = make_unit(load_view(view))[0]
            total = _sum_clusters(unit, label, count)
            centres.append(_normalise(total))
            if count:
                every += unit[rows] @ centres[-1].T / len(views)
                own += _compare_own(unit[rows], label[rows], total) / len(views)
        return cls(tuple(centres), _choose_threshold(own, every, label[rows]))

    def assign(self, views: Sequence[View]) -> np.ndarray:
        """The cluster of each new image, (m,) int64; -1 where none is near enough.

        views : (m, d_v) arrays of the same models, in the same order.
        """
        if len(views) != len(self.centres):
            raise DataError(f"{len(self.centres)} views expected, as at fit; got {len(views)}")
        found: np.ndarray | None = None
        for number, (view, centre) in enumerate(zip(views, self.centres, strict=True)):
            vectors = np.asarray(load_view(view))
            if vectors.shape[1] != centre.shape[1]:
                raise DataError(
                    f"view {number}: {centre.shape[1]} numbers a row expected, as at fit; got "
                    f"{vectors.shape[1]}"
                )
            cosine = make_unit(vectors)[0] @ centre.T / len(views)
            found = cosine if found is None else found + cosine
        assert found is not None
        if not found.shape[1]:
            return np.full(len(found), UNLABELLED, np.int64)
        best = found.argmax(axis=1).astype(np.int64)
        best[found[np.arange(len(found)), best] <= self.threshold] = UNLABELLED
        return best


def _normalise(total: np.ndarray) -> np.ndarray:
    """Rows at unit length; a sum of zero stays, and is near to nothing."""
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


def _sum_clusters(unit: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    """(clusters, d) float32 sums of the unit vectors of each cluster."""
    order = np.argsort(label, kind="stable")
    order = order[label[order] != UNLABELLED]
    if not len(order):
        return np.zeros((count, unit.shape[1]), np.float32)
    starts = np.searchsorted(label[order], np.arange(count))
    return np.add.reduceat(unit[order].astype(np.float64), starts, axis=0).astype(np.float32)


def _compare_own(unit: np.ndarray, label: np.ndarray, total: np.ndarray) -> np.ndarray:
    """(m,) cosine of each image to its own cluster without it; 0 for images without one, NaN where
    the cluster holds no other."""
    rest = total[label] - unit
    length = np.linalg.norm(rest, axis=1)
    cosine = np.einsum("nd,nd->n", unit, rest) / np.maximum(length, 1e-12)
    cosine[length < _NOTHING] = np.nan
    return np.where(label == UNLABELLED, 0.0, cosine)


def _choose_threshold(own: np.ndarray, every: np.ndarray, label: np.ndarray) -> float:
    """The cut with the most own similarities above it and the fewest others, as shares."""
    inside = label != UNLABELLED
    if not inside.any():
        return float("inf")
    others = every.astype(np.float64)
    others[inside, label[inside]] = -1.0
    inside &= ~np.isnan(own)
    if not inside.any():
        return float(others.max())
    genuine, impostor = np.sort(own[inside]), np.sort(others.max(axis=1))
    cuts = np.concatenate([genuine, impostor])
    kept = 1 - np.searchsorted(genuine, cuts, side="right") / len(genuine)
    passed = 1 - np.searchsorted(impostor, cuts, side="right") / len(impostor)
    cut = cuts[int(np.argmax(kept - passed))]
    above = cuts[cuts > cut]
    # Halfway to the next value, so that rounding decides on no image.
    return float((cut + above.min()) / 2 if len(above) else cut)
