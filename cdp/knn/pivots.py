"""Rows near the same pivots: candidates for neighbours, and an order that keeps like rows together.

The contract:
- Enters: unit float32 rows, projected on their strongest principal axes. Leaves: for each row the
  nearest of the rows whose nearest pivot is among its own nearest, and an order of the rows in
  which neighbours mostly lie near each other. The same bits for any number of threads.
- Pivots are 4 sqrt(n) of the rows themselves, evenly spaced: O(n sqrt(n)) comparisons.

A graph search stays within the groups it enters; rows that share a pivot are found whatever lies
between them, so that the two miss different neighbours. In that order of the rows, searches find
in the processor's cache what the row before them read: half of their time.
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


@dataclass(frozen=True)
class PivotGroups:
    """Which pivots each row is near.

    favourite : (n, m) int32, the pivots nearest to each row, nearest first.
    order : (n,) int32, the rows by their nearest pivot, then by row number.
    start_of : (p + 1,) int64, where each pivot's rows start in `order`.
    """

    favourite: np.ndarray
    order: np.ndarray
    start_of: np.ndarray


def find_axes(unit: np.ndarray) -> np.ndarray:
    """All (d, d) principal axes of a sample about the origin, strongest first."""
    sample = unit[:: max(len(unit) // 16384, 1)]
    moment = (sample.T @ sample).astype(np.float64)
    return np.ascontiguousarray(np.linalg.eigh(moment)[1][:, ::-1], np.float32)


def project_rows(unit: np.ndarray, axes: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    """The (n, p) coordinates of the rows on the (d, p) axes; on disk where they are many."""
    out = allocate((len(unit), axes.shape[1]))
    chosen = np.ascontiguousarray(axes)

    def work(part: slice) -> None:
        np.matmul(unit[part], chosen, out=out[part])

    list(pool.map(work, list_blocks(0, len(unit))))
    return out


def group_rows(short: np.ndarray, nearest_pivots: int, pool: ThreadPoolExecutor) -> PivotGroups:
    """Find each row's `nearest_pivots` nearest pivots."""
    count = len(short)
    pivots = np.ascontiguousarray(short[:: max(int(np.sqrt(count) / 4), 1)])
    pivots = pivots / np.maximum(np.linalg.norm(pivots, axis=1, keepdims=True), 1e-12)
    favourite = np.empty((count, min(nearest_pivots, len(pivots))), np.int32)

    def choose(part: slice) -> None:
        _pick_best(short[part] @ pivots.T, favourite[part])

    list(pool.map(choose, list_blocks(0, count)))
    order = np.argsort(favourite[:, 0], kind="stable").astype(np.int32)
    start_of = np.searchsorted(favourite[order, 0], np.arange(len(pivots) + 1))
    return PivotGroups(favourite, order, start_of)


def propose_near_pivots(
    groups: PivotGroups, short: np.ndarray, width: int, pool: ThreadPoolExecutor
) -> np.ndarray:
    """The nearest `width` of the rows that belong to each row's nearest_pivots; (n, width) int32.

    -1 pads a row whose nearest_pivots have fewer rows.
    """
    candidate = np.full((len(short), width), UNLABELLED, np.int32)
    beside = short[groups.order]

    def join(part: slice) -> None:
        _join(
            beside,
            groups.favourite,
            groups.order,
            groups.start_of,
            part.start,
            part.stop,
            candidate,
        )

    list(pool.map(join, list_blocks(0, len(short))))
    return candidate


@njit(cache=True, nogil=True)
def _join(
    beside: Any, favourite: Any, order: Any, start_of: Any, start: int, stop: int, candidate: Any
) -> None:
    best = np.empty(candidate.shape[1], np.float32)
    for place in range(start, stop):
        row = order[place]
        best[:] = -np.inf
        for pivot in favourite[row]:
            for other in range(start_of[pivot], start_of[pivot + 1]):
                value = dot_rows(beside, place, other)
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
