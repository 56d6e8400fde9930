"""Thin merges: parts of a cluster that hold together by far fewer pairs than their rows would list.

The contract:
- Enters: labels, the scored candidate pairs and their calibrated probabilities. Leaves: for each
  cluster the expected number of pairs that are wrong because two of its parts are two identities.
- Clusters of a stricter threshold are parts of these, so the merges found once count there too.
- Rows of one large identity list one another all over; two look-alikes of many images each are
  joined by the few pairs that reach across, and each row alone seems to belong. So each cluster is
  merged again, by its own pairs, and each merge is judged by the mean log-odds of the pairs between
  its two parts, and by how many they are of those that one identity would have: below a share of
  `THIN` the odds fall with its square.
- Only parts of `LEAST_ROWS` rows or more are judged: of smaller ones each row's own pairs decide.

Source: ours. On 30,000 drawn rows with look-alikes merges of two identities had .003 to .13 of the
pairs that one would have; on LFW merges of the parts of one person had .31 and more at 24 px (three
draws) and .27 and more at 16 px (one draw).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.log_odds import to_probability
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.scored_pairs import take_inside
from cdp.types import UNLABELLED, PairTable

LEAST_ROWS = 5
"""Rows of either part of a merge that is judged."""
THIN = 0.25
"""Share of the pairs of one identity, below which a merge is thin."""
DENSE = 0.5
"""Share of its pairs that are candidates, above which a cluster has no thin merge."""

_LOWEST = 1e-7
"""Threshold of the merges: below the probability of any pair that was scored."""


@dataclass(frozen=True)
class ThinMerges:
    """Merges inside clusters, and how many pairs each is expected to make wrong.

    first, second : (g,) int64, a row of either part. lost : (g,) float64, expected pairs of images
    of two identities; 0 where the merge is not thin.
    """

    first: np.ndarray
    second: np.ndarray
    lost: np.ndarray

    @classmethod
    def none(cls) -> ThinMerges:
        """No merge."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))

    def count(self, label: np.ndarray) -> np.ndarray:
        """(clusters,) float64, the expected wrong pairs of the merges inside each cluster."""
        own = self._find_inside(label)
        clusters = int(label.max(initial=UNLABELLED)) + 1
        return np.bincount(label[self.first[own]], self.lost[own], clusters)

    def keep(self, label: np.ndarray, kept: np.ndarray) -> ThinMerges:
        """The merges inside some clusters, `kept` (clusters,) bool."""
        own = self._find_inside(label)
        own = own[kept[label[self.first[own]]]]
        return ThinMerges(self.first[own], self.second[own], self.lost[own])

    def join(self, other: ThinMerges, rows: np.ndarray) -> ThinMerges:
        """These merges, and others whose rows are numbers of `rows`."""
        return ThinMerges(
            np.concatenate([self.first, rows[other.first]]),
            np.concatenate([self.second, rows[other.second]]),
            np.concatenate([self.lost, other.lost]),
        )

    def make_up(self, label: np.ndarray, sparse: np.ndarray) -> bool:
        """Whether these merges make up each of the `sparse` clusters, (clusters,) bool."""
        own = self.first[self._find_inside(label)]
        merges = np.bincount(label[own], minlength=len(sparse))
        size = np.bincount(label[label != UNLABELLED], minlength=len(sparse))
        return bool((merges[sparse] == size[sparse] - 1).all())

    def _find_inside(self, label: np.ndarray) -> np.ndarray:
        own = label[self.first]
        return np.flatnonzero((own == label[self.second]) & (own != UNLABELLED))


def find_sparse(label: np.ndarray, pairs: PairTable) -> np.ndarray:
    """(clusters,) bool, the clusters that may have a thin merge: large, with few of their pairs."""
    clusters = int(label.max(initial=UNLABELLED)) + 1
    size = np.bincount(label[label != UNLABELLED], minlength=clusters)
    listed = _count_listed(label, pairs.source, pairs.target, clusters)
    return np.asarray((size >= 2 * LEAST_ROWS) & (listed < DENSE * size * (size - 1) / 2))


def find_thin_merges(
    label: np.ndarray,
    sparse: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    images: np.ndarray,
) -> ThinMerges:
    """The merges inside the sparse clusters.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none. sparse : (clusters,) bool, of `find_sparse`.
    pairs : all candidate pairs. probability : (m,) float in [0, 1], calibrated.
    images : (n,) float64, the images that each row stands for.
    """
    if not sparse.any():
        return ThinMerges.none()
    kept = np.where((label != UNLABELLED) & sparse[label], label, UNLABELLED)
    few, value = take_inside(kept, pairs, probability)
    merged = agglomerate(few, value, len(label), threshold=_LOWEST)
    first, second = merged.merge[:, 0], merged.merge[:, 1]
    parts = _follow_merges(first, second, few.source, few.target, len(label), images)
    one, other, between, density, product = parts
    expected = one * other * density
    ratio = between / np.maximum(expected, np.maximum(between, 1))
    odds = 2 * np.log(np.maximum(ratio / THIN, 1e-12))
    chance = to_probability(merged.height + odds)
    judged = (np.minimum(one, other) >= LEAST_ROWS) & (ratio < THIN)
    return ThinMerges(first, second, np.where(judged, (1 - chance) * product, 0))


@njit(cache=True, nogil=True)
def _count_listed(label: Any, source: Any, target: Any, clusters: int) -> Any:
    """(clusters,) int64, the candidate pairs inside each cluster."""
    listed = np.zeros(clusters, np.int64)
    for e in range(len(source)):
        own = label[source[e]]
        if own != UNLABELLED and own == label[target[e]]:
            listed[own] += 1
    return listed


@njit(cache=True)
def _find_time(parent: Any, time: Any, one: int, other: int) -> int:
    """The merge that first put two rows into one group."""
    last = -1
    while one != other:
        if time[one] <= time[other]:
            last = time[one]
            one = parent[one]
        else:
            last = time[other]
            other = parent[other]
    return last


@njit(cache=True)
def _follow_merges(
    first: Any, second: Any, source: Any, target: Any, count: int, images: Any
) -> Any:
    """Of each merge: rows of either part, candidate pairs between, the lower density, image pairs.

    The density of a part is the share of its pairs that are candidates; of one row it is 1.
    """
    merges = len(first)
    parent = np.arange(count)
    time = np.full(count, merges + 1, np.int64)
    rows, shown = np.ones(count), images.copy()
    one, other = np.empty(merges), np.empty(merges)
    roots = np.empty((merges, 2), np.int64)
    product = np.empty(merges)
    for m in range(merges):
        a, b = first[m], second[m]
        while parent[a] != a:
            a = parent[a]
        while parent[b] != b:
            b = parent[b]
        if rows[a] < rows[b]:
            a, b = b, a
        one[m], other[m], product[m] = rows[a], rows[b], shown[a] * shown[b]
        roots[m, 0], roots[m, 1] = a, b
        parent[b], time[b] = a, m
        rows[a] += rows[b]
        shown[a] += shown[b]
    between = np.zeros(merges)
    for e in range(len(source)):
        between[_find_time(parent, time, source[e], target[e])] += 1
    within, held, density = np.zeros(count), np.ones(count), np.empty(merges)
    for m in range(merges):
        a, b = roots[m, 0], roots[m, 1]
        lowest = 1.0
        for each in (a, b):
            if held[each] > 1:
                lowest = min(lowest, within[each] / (held[each] * (held[each] - 1) / 2))
        density[m] = lowest
        within[a] += within[b] + between[m]
        held[a] += held[b]
    return one, other, between, density, product
