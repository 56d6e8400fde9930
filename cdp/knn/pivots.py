"""Candidate neighbours by shared pivots, and an order of the rows that groups similar ones.

The contract:
- Enters: unit float32 rows, projected on their strongest principal axes. Leaves: for each row the
  most similar of the rows whose nearest pivot is among its own nearest ones, and an order of the
  rows in which neighbours mostly lie close together. The same bits for any number of threads.
- Pivots are 4 sqrt(n) of the rows themselves, evenly spaced: O(n sqrt(n)) comparisons.

A search along a graph stays within the groups it enters; rows that share a pivot are found whether
or not the graph connects them. The two methods therefore miss different neighbours. Queries in the
order of the pivots touch the same cache lines as the query before them and take half the time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import dot_rows, insert_neighbour
from cdp.arrays.scratch import allocate
from cdp.arrays.threads import list_blocks
from cdp.types import UNLABELLED

PIVOT_AXES = 64
"""Principal axes on which rows are compared with pivots and with each other here."""


@dataclass(frozen=True)
class PivotGroups:
    """The nearest pivots of each row, and the rows of each pivot.

    nearest_pivots : (n, m) int32, pivots by number, nearest first.
    order : (n,) int32, the rows by their nearest pivot, then by row number.
    start_of : (p + 1,) int64, where each pivot's rows start in `order`.
    """

    nearest_pivots: np.ndarray
    order: np.ndarray
    start_of: np.ndarray


def project_rows(unit: np.ndarray, axes: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    """The (n, p) coordinates of the rows on the (d, p) axes; on disk where they are many."""
    out = allocate((len(unit), axes.shape[1]))
    chosen = np.ascontiguousarray(axes)

    def work(part: slice) -> None:
        np.matmul(unit[part], chosen, out=out[part])

    list(pool.map(work, list_blocks(0, len(unit))))
    return out


def group_rows(projected: np.ndarray, per_row: int, pool: ThreadPoolExecutor) -> PivotGroups:
    """Find the `per_row` nearest pivots of each projected row."""
    count = len(projected)
    pivots = np.ascontiguousarray(projected[:: max(int(np.sqrt(count) / 4), 1)])
    pivots = pivots / np.maximum(np.linalg.norm(pivots, axis=1, keepdims=True), 1e-12)
    nearest = np.empty((count, min(per_row, len(pivots))), np.int32)

    def choose(part: slice) -> None:
        _pick_best(projected[part] @ pivots.T, nearest[part])

    list(pool.map(choose, list_blocks(0, count)))
    order = np.argsort(nearest[:, 0], kind="stable").astype(np.int32)
    start_of = np.searchsorted(nearest[order, 0], np.arange(len(pivots) + 1))
    return PivotGroups(nearest, order, start_of)


def propose_near_pivots(
    groups: PivotGroups, projected: np.ndarray, width: int, pool: ThreadPoolExecutor
) -> np.ndarray:
    """The `width` most similar rows among those of each row's nearest pivots, (n, width) int32.

    -1 pads a row whose pivots have fewer rows.
    """
    candidate = np.full((len(projected), width), UNLABELLED, np.int32)
    ordered = projected[groups.order]

    def search(part: slice) -> None:
        _search_pivots(
            ordered,
            groups.nearest_pivots,
            groups.order,
            groups.start_of,
            part.start,
            part.stop,
            candidate,
        )

    list(pool.map(search, list_blocks(0, len(projected))))
    return candidate


@njit(cache=True, nogil=True)
def _search_pivots(
    ordered: Any,
    nearest_pivots: Any,
    order: Any,
    start_of: Any,
    start: int,
    stop: int,
    candidate: Any,
) -> None:
    """Compare the rows at places start .. stop - 1 of the order with those of their pivots."""
    best = np.empty(candidate.shape[1], np.float32)
    for place in range(start, stop):
        row = order[place]
        best[:] = -np.inf
        for pivot in nearest_pivots[row]:
            for other in range(start_of[pivot], start_of[pivot + 1]):
                value = dot_rows(ordered, place, other)
                if value > best[-1] and other != place:
                    insert_neighbour(candidate[row], best, order[other], value)


@njit(cache=True, nogil=True)
def _pick_best(similarity: Any, out: Any) -> None:
    """Positions of the largest values of each row, descending."""
    best = np.empty(out.shape[1], np.float32)
    for i in range(len(similarity)):
        best[:] = -np.inf
        for j in range(similarity.shape[1]):
            if similarity[i, j] > best[-1]:
                insert_neighbour(out[i], best, j, similarity[i, j])
