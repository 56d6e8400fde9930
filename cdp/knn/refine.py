"""Candidate neighbours to exact nearest ones: candidates are exchanged and compared in full."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import dot_rows, insert_neighbour
from cdp.arrays.threads import list_blocks


def exchange_candidates(
    unit: np.ndarray,
    candidate: np.ndarray,
    other: np.ndarray,
    rows: np.ndarray,
    places: np.ndarray,
    pool: ThreadPoolExecutor,
) -> None:
    """Exchange the candidates of `rows`, at `places`, for nearer ones among `other`, in place."""

    def unite(part: slice) -> None:
        _unite(unit, other, rows[part], places[part], candidate)

    list(pool.map(unite, list_blocks(0, len(rows))))


@njit(cache=True, nogil=True)
def transpose_candidates(candidate: Any) -> Any:
    count, width = candidate.shape
    start_of = np.zeros(count + 1, np.int64)
    for row in range(count):
        for position in range(width):
            if candidate[row, position] >= 0:
                start_of[candidate[row, position] + 1] += 1
    for row in range(count):
        start_of[row + 1] += start_of[row]
    fill = start_of[:-1].copy()
    member = np.empty(start_of[count], np.int32)
    for row in range(count):
        for position in range(width):
            other = candidate[row, position]
            if other >= 0:
                member[fill[other]] = row
                fill[other] += 1
    return start_of, member


@njit(cache=True, nogil=True)
def _unite(vectors: Any, other: Any, rows: Any, places: Any, candidate: Any) -> None:
    """Keep the nearest of each row's candidates and `other` ones, each once."""
    width = candidate.shape[1]
    nearest = np.empty(width, np.int32)
    best = np.empty(width, np.float32)
    for i in range(len(rows)):
        place = places[i]
        nearest[:] = -1
        best[:] = -np.inf
        for position in range(2 * width):
            if position < width:
                row = candidate[place, position]
            else:
                row = other[rows[i], position - width]
            if row < 0:
                continue
            known = False
            for earlier in range(width):
                known |= nearest[earlier] == row
            if not known:
                insert_neighbour(nearest, best, row, dot_rows(vectors, rows[i], row))
        candidate[place] = nearest


@njit(cache=True, nogil=True)
def refine_candidates(
    vectors: Any,
    candidate: Any,
    start_of: Any,
    member: Any,
    rows: Any,
    start: int,
    nearest: Any,
    best: Any,
) -> None:
    """Compare each row with its candidates, theirs, and the rows that propose it."""
    count, proposed = candidate.shape
    seen = np.full(count, -1, np.int32)
    listed = np.empty(count, np.int32)
    for row in rows:
        at = row - start
        best[at] = -np.inf
        seen[row] = row
        found = 0
        for position in range(-1, proposed):
            via = row if position < 0 else candidate[row, position]
            if via < 0:
                continue
            for inner in range(proposed):
                other = candidate[via, inner]
                if other >= 0 and seen[other] != row:
                    seen[other] = row
                    listed[found] = other
                    found += 1
        for position in range(start_of[row], start_of[row + 1]):
            other = member[position]
            if seen[other] != row:
                seen[other] = row
                listed[found] = other
                found += 1
        if found < best.shape[1]:
            for other in range(count):
                if seen[other] != row:
                    listed[found] = other
                    found += 1
        for position in range(found):
            other = listed[position]
            insert_neighbour(nearest[at], best[at], other, dot_rows(vectors, row, other))
