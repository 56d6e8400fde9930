"""Near-equal rows, such as frames of one track and re-encoded copies: which row stands for which.

Thirty near-equal frames fill the k = 20 list of each of them: no list names another photo of the
person, and no candidate pair does. Such rows are therefore represented by one of them before the
graphs are made; its label goes to all.

The contract:
- Enters: the views of a set and the kNN graph of its base view. Leaves: for each row the row that
  represents it, and the radius. A representative represents itself.
- Two rows are near-equal only if all views agree: the largest of their distances (1 - cosine, in
  units of the view's distance between far rows) counts.
- The radius is where the distances of listed pairs leave a gap: few pairs lie between r and three
  times r, many below. Without such a gap only equal rows are joined. Two photos of one person, or
  of twins, differ by more than the gap's upper end, so that no radius reaches them.
- Every row lies within the radius of its representative: there are no chains.
- Without near-equal rows the cost is one pass over the similarities of the base graph.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cdp.arrays.cosine import make_unit, measure_pairs
from cdp.errors import DataError
from cdp.types import Graph, View, load_graph, load_view

WIDEST = 0.07
"""Largest distance of the pairs below the gap. Of 11,472 photos of LFW at 24 px nine pairs are as
near in all five views: photos that were saved twice, some under two names."""
EQUAL = 1e-5
"""Rows nearer than this are the same image, whatever the others look like."""
_GAP = 3.0
_MARGIN = 1.5
"""Rows up to so many times the last distance below the gap are joined: lists of 20 do not name the
farthest rows of a burst of 30."""
_DOUBT = 5
"""Pairs added to those in the gap, so that a few pairs are no mode of their own."""
_STEPS = 120
"""Distances tried from `EQUAL` to `WIDEST`, 7 % apart."""
_SAMPLE = 4096
"""Random pairs that a view's distance between far rows is measured on."""
_FAR = 0.75
"""Quantile of their distances: three quarters of them may be of one person."""
_ROUNDS = 64


@dataclass(frozen=True)
class NearEqual:
    """Which row stands for which.

    representative : (n,) int64, of each row; its own number where it stands for itself.
    radius : largest distance at which rows were joined; 0 where none were.
    """

    representative: np.ndarray
    radius: float

    @property
    def kept(self) -> np.ndarray:
        """(r,) int64, the rows that stand for themselves, ascending."""
        return np.flatnonzero(self.representative == np.arange(len(self.representative)))

    @property
    def collapsed(self) -> int:
        """The number of rows that another one stands for."""
        return len(self.representative) - len(self.kept)

    @property
    def groups(self) -> int:
        """The number of rows that stand for others."""
        moved = self.representative != np.arange(len(self.representative))
        return len(np.unique(self.representative[moved]))


def find_near_equal(views: Sequence[View], graph: Graph, *, seed: int = 0) -> NearEqual:
    """Find near-equal rows among the pairs that the base graph lists.

    Parameters
    ----------
    views : (n, d_v) arrays or functions that load them, the base first.
    graph : the base view's.
    seed : of the random pairs that measure each view's distance between far rows.

    Returns
    -------
    NearEqual
        Every row stands for itself where the representatives would be too few for lists of k.

    Raises
    ------
    DataError
        Views of different lengths.
    """
    listed = load_graph(graph)
    count = len(listed)
    none = NearEqual(np.arange(count), 0.0)
    if count < 2:
        return none
    rows = np.random.default_rng([seed, 0x6E656172]).integers(0, count, (2, _SAMPLE))
    scale = _measure_scale(views[0], *rows)
    near = np.asarray(listed.similarity) >= 1 - _GAP * WIDEST * scale
    near &= np.asarray(listed.neighbour) >= 0
    if not near.any():
        return none
    source, place = np.nonzero(near)
    target = np.asarray(listed.neighbour)[source, place]
    key = np.unique(np.minimum(source, target) * count + np.maximum(source, target))
    source, target = key // count, key % count
    scales = [_measure_scale(view, *rows) for view in views]
    distance = _measure_distance(views, source, target, scales)
    radius = choose_radius(distance)
    edge = distance <= radius
    if not edge.any():
        return none
    representative = _choose_representatives(
        views, source[edge], target[edge], count, radius, scales
    )
    found = NearEqual(representative, radius)
    return found if len(found.kept) > listed.k else none


def choose_radius(distance: np.ndarray) -> float:
    """The radius of near-equal rows, from the distances of pairs below three times `WIDEST`.

    distance : (m,) float, each pair once. Returns `EQUAL` where there is no gap.
    """
    ordered = np.sort(distance)
    tried = np.geomspace(EQUAL, WIDEST, _STEPS)
    below = np.searchsorted(ordered, tried, side="right")
    inside = np.searchsorted(ordered, _GAP * tried, side="right") - below
    doubt = (inside + _DOUBT) / np.maximum(below, 1)
    best = int(np.argmin(doubt))
    return float(_MARGIN * tried[best]) if doubt[best] < 1 else EQUAL


def choose_distinct(near: NearEqual, identity: np.ndarray) -> np.ndarray:
    """The labelled rows to learn from: one of each near-equal group.

    A group with rows of two identities counts for neither. Where most identities would keep a
    single row, their rows are near-equal throughout; then all rows stay, since one row an identity
    shows no positive pair.

    identity : (n,) integers. Returns (r,) int64, ascending.
    """
    group = near.representative
    low, high = np.full(len(group), np.iinfo(np.int64).max), np.full(len(group), -1)
    np.minimum.at(low, group, identity)
    np.maximum.at(high, group, identity)
    agreed = low[group] == high[group]
    kept = near.kept[agreed[near.kept]]
    before = np.unique(identity[agreed], return_counts=True)[1]
    after = np.unique(identity[kept], return_counts=True)[1]
    if 2 * (after > 1).sum() < (before > 1).sum():
        return np.flatnonzero(agreed)
    return kept


def _measure_scale(view: View, one: np.ndarray, other: np.ndarray) -> float:
    """Distance between far rows of a view: a high quantile of that of random pairs."""
    distance = _compare_rows(load_view(view), one, other)[one != other]
    return float(max(np.quantile(distance, _FAR), 1e-3)) if len(distance) else 1.0


def _measure_distance(
    views: Sequence[View], source: np.ndarray, target: np.ndarray, scales: Sequence[float]
) -> np.ndarray:
    """(m,) float64, the largest distance of each pair over the views, in units of `scales`."""
    largest = np.zeros(len(source))
    for view, scale in zip(views, scales, strict=True):
        loaded = load_view(view)
        if len(source) and max(source.max(), target.max()) >= len(loaded):
            raise DataError(f"all views must show the same rows, got one of {len(loaded)} rows")
        np.maximum(largest, _compare_rows(loaded, source, target) / scale, out=largest)
    return largest


def _compare_rows(view: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(m,) float64, 1 - cosine of pairs of rows, in blocks."""
    distance = np.empty(len(one))
    for start in range(0, len(one), 1 << 16):
        part = slice(start, start + (1 << 16))
        rows, place = np.unique(np.concatenate([one[part], other[part]]), return_inverse=True)
        unit = make_unit(np.ascontiguousarray(view[rows]))[0]
        half = len(one[part])
        cosine = np.empty(half, np.float32)
        distance[part] = 1 - measure_pairs(unit, place[:half], place[half:], cosine)
    return distance


def _choose_representatives(
    views: Sequence[View],
    source: np.ndarray,
    target: np.ndarray,
    count: int,
    radius: float,
    scales: Sequence[float],
) -> np.ndarray:
    """(count,) int64: the row with most near rows represents those of its component it is near to;
    then the same among those that are left."""
    edges = coo_matrix((np.ones(len(source)), (source, target)), shape=(count, count))
    component = connected_components(edges, directed=False)[1]
    degree = np.bincount(source, minlength=count) + np.bincount(target, minlength=count)
    representative = np.arange(count)
    left = np.flatnonzero(degree > 0)
    for _ in range(_ROUNDS):
        if not len(left):
            break
        order = left[np.lexsort((left, -degree[left], component[left]))]
        first = np.ones(len(order), bool)
        first[1:] = component[order[1:]] != component[order[:-1]]
        hub = order[first][np.cumsum(first) - 1]
        near = _measure_distance(views, order, hub, scales) <= radius
        representative[order[near]] = hub[near]
        left = np.sort(order[~near & ~first])
    return representative
