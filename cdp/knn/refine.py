"""Refinement: proposed candidates -> exact nearest among candidates, theirs, and reverse ones.

The contract:
- Enters: (n, c) int32 candidates of each row, -1 padding, from any source. Leaves: the most similar
  of them by cosine in full, ties by smaller row; the same bits for any number of threads.
- `exchange_candidates` merges two lists of candidates into one of the same width.
- `refine_candidates` compares each row with its candidates, with their candidates and with the rows
  whose candidate it is. A row for which these are fewer than k is compared with all rows.
"""

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
    """Replace the candidates of `rows`, at `places`, by more similar ones of `other`, in place.

    candidate : (p, c), changed. other : (n, c), a second list of candidates of every row.
    """

    def merge(part: slice) -> None:
        _merge_candidates(unit, other, rows[part], places[part], candidate)

    list(pool.map(merge, list_blocks(0, len(rows))))


@njit(cache=True, nogil=True)
def transpose_candidates(candidate: Any) -> Any:
    """The rows that have each row as a candidate: member[start_of[r] : start_of[r + 1]] for row r.

    Returns start_of, (n + 1,) int64, and member, int32, ascending within a row.
    """
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
def _merge_candidates(vectors: Any, other: Any, rows: Any, places: Any, candidate: Any) -> None:
    """Keep the most similar of each row's candidates and `other` ones, each once."""
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
    """Compare each row with its candidates, with theirs, and with the rows whose candidate it is.

    start_of, member : from `transpose_candidates`.
    nearest, best : (rows, k), filled; row r lies at r - start.
    """
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


@njit(cache=True, nogil=True)
def rank_candidates(vectors: Any, candidate: Any, start: int, nearest: Any, best: Any) -> None:
    """Compare each row with its candidates alone; row r lies at r - start."""
    for at in range(len(nearest)):
        row = start + at
        best[at] = -np.inf
        for other in candidate[row]:
            if other >= 0:
                insert_neighbour(nearest[at], best[at], other, dot_rows(vectors, row, other))
