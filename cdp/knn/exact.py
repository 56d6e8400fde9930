"""Exact k nearest neighbours: an upper bound rules out most pairs, the others are compared in full.

The contract:
- Enters: unit float32 rows. Leaves: each row's k nearest by cosine, exactly, ties by smaller row;
  the same bits for any number of threads and any partition of the rows.

cos(x, y) <= <x', y'> + |x - x'| |y - y'|, where x' is x projected on the strongest principal axes.
One matrix product over few axes, the residual lengths as one axis more, bounds all pairs; only
pairs whose bound reaches a row's k-th best are compared in full. Candidates of the same pivots give
a high k-th best to start from. (Ours; the bound is Cauchy-Schwarz. Where it would not pay, all axes
are taken and it is a plain blocked search.)
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import dot_rows, insert_neighbour
from cdp.arrays.principal_axes import find_axes
from cdp.arrays.threads import limit_blas, list_blocks
from cdp.knn.pivots import (
    PIVOT_AXES,
    group_rows,
    project_rows,
    propose_near_pivots,
)
from cdp.types import UNLABELLED

_PIVOTS_A_ROW = 8
"""Nearest pivots searched for first candidates: few, since all pairs are bounded afterwards."""
BOUND_SLACK = np.float32(1e-5)
"""Above the float32 rounding of the bound, so that it rules out no true neighbour."""
_PRODUCT_SECONDS = 2 / 70e9
_COMPARE_SECONDS = 0.3e-9
"""Time of a pair per axis in the matrix product, and per dimension when compared in full: the
speeds of one x86-64 core. They choose the number of axes, on which only the time depends."""
_AXIS_COUNTS = {16, 32, 48, 64, 96, 128, 192, 256, 384}
_LANE = 64
"""Bounds tested at once, in vector registers, before any pair among them is looked at."""
_SAMPLED_ROWS = 1024
"""Rows on which the share of pairs is measured that a number of axes does not rule out."""


def prepare_exact(unit: np.ndarray, width: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates that are mostly right, (n, width), and the (d, p) principal axes of the bound."""
    count = len(unit)
    with limit_blas(), ThreadPoolExecutor(workers) as pool:
        axes = find_axes(unit)
        projected = project_rows(unit, axes[:, :PIVOT_AXES], pool)
        groups = group_rows(projected, _PIVOTS_A_ROW, pool)
        candidate = propose_near_pivots(groups, projected, width, pool)
        floor = np.empty(count, np.float32)

        def begin(part: slice) -> None:
            _find_floor(unit, candidate, part.start, floor[part])

        list(pool.map(begin, list_blocks(0, count)))
    return candidate, np.ascontiguousarray(
        axes[:, : choose_axis_count(unit, unit, axes, floor, floor)]
    )


def choose_axis_count(
    left: np.ndarray,
    right: np.ndarray,
    axes: np.ndarray,
    left_floor: np.ndarray,
    right_floor: np.ndarray,
) -> int:
    """The number of axes with the least expected time, by a sample of pairs of both sets.

    left, right : unit rows. left_floor, right_floor : similarity of the k-th neighbour of each.
    """
    dimension = left.shape[1]
    rows = np.arange(0, len(left), max(4 * len(left) // _SAMPLED_ROWS, 1))
    columns = np.arange(0, len(right), max(len(right) // _SAMPLED_ROWS, 1))
    least = np.minimum(left_floor[rows][:, None], right_floor[columns][None]) - BOUND_SLACK
    one, other = left[rows] @ axes, right[columns] @ axes
    lengths = np.cumsum(one**2, axis=1), np.cumsum(other**2, axis=1)
    product = np.zeros(least.shape, np.float32)
    best_cost, best, used = np.inf, dimension, 0
    for size in sorted({*_AXIS_COUNTS, dimension}):
        if size > dimension:
            break
        product += one[:, used:size] @ other[:, used:size].T
        used = size
        residuals = [_measure_residual(each[:, size - 1]) for each in lengths]
        share = float((product + np.outer(*residuals) >= least).mean())
        cost = size * _PRODUCT_SECONDS + share * dimension * _COMPARE_SECONDS
        if cost < best_cost:
            best_cost, best = cost, size
    return best


def search_exact(
    unit: np.ndarray,
    candidate: np.ndarray,
    axes: np.ndarray,
    rows: slice,
    width: int,
    neighbour: np.ndarray,
    similarity: np.ndarray,
    pool: ThreadPoolExecutor,
) -> None:
    """Write the exact neighbours of `rows`; of all rows, each pair of blocks is compared once.

    candidate, axes : from `prepare_exact`. neighbour, similarity : (rows, >= width), filled.
    """
    count = len(unit)
    bound = np.empty((count, axes.shape[1] + 1), np.float32)

    def project(part: slice) -> None:
        bound[part] = bound_rows(unit[part], axes)

    list(pool.map(project, list_blocks(0, count)))
    whole = rows.start == 0 and rows.stop == count
    near = np.full((rows.stop - rows.start, width), UNLABELLED, np.int64)
    best = np.full(near.shape, -np.inf, np.float32)
    floor = np.full(len(near), -np.inf, np.float32)
    starts = list_blocks(rows.start, rows.stop)

    def begin(part: slice) -> None:
        local = slice(part.start - rows.start, part.stop - rows.start)
        _find_floor(unit, candidate[:, :width], part.start, floor[local])

    list(pool.map(begin, starts))
    if whole:
        locks = [threading.Lock() for _ in starts]
        pairs = [
            (one, one + apart) for apart in range(len(starts)) for one in range(len(starts) - apart)
        ]

        def compare(pair: tuple[int, int]) -> None:
            one, other = pair
            left, right = starts[one], starts[other]
            ceiling = bound[left] @ bound[right].T
            with locks[one]:
                if one == other:
                    _compare(ceiling, unit, left.start, right.start, 0, near, best, floor, True)
                else:
                    with locks[other]:
                        _compare(ceiling, unit, left.start, right.start, 0, near, best, floor, True)

        list(pool.map(compare, pairs))
    else:

        def search(part: slice) -> None:
            for other in list_blocks(0, count):
                ceiling = bound[part] @ bound[other].T
                _compare(
                    ceiling, unit, part.start, other.start, rows.start, near, best, floor, False
                )

        list(pool.map(search, starts))
    neighbour[:, :width] = near
    similarity[:, :width] = best


def bound_rows(unit: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Project, and append each row's residual length: products of these bound the cosines."""
    near = unit @ axes
    length = np.einsum("ij,ij->i", near, near)
    return np.column_stack([near, _measure_residual(length)])


def _measure_residual(length: np.ndarray) -> np.ndarray:
    """Upper bound of the lengths beside the axes, from the squared lengths on them; float32."""
    return np.sqrt(np.maximum(1 - length, 0) + 1e-6).astype(np.float32)


@njit(cache=True, nogil=True)
def scan_all(vectors: Any, start: int, nearest: Any, best: Any) -> None:
    """Compare every pair in full: the plain search, for few rows; row r lies at r - start."""
    best[:] = -np.inf
    for i in range(len(nearest)):
        for other in range(len(vectors)):
            if other != start + i:
                insert_neighbour(nearest[i], best[i], other, dot_rows(vectors, start + i, other))


@njit(cache=True, nogil=True)
def scan_rows(vectors: Any, rows: Any, nearest: Any, best: Any) -> None:
    """Compare some rows with all others in full; row r lies at r."""
    for row in rows:
        best[row] = -np.inf
        for other in range(len(vectors)):
            if other != row:
                insert_neighbour(nearest[row], best[row], other, dot_rows(vectors, row, other))


@njit(cache=True, nogil=True)
def _find_floor(vectors: Any, candidate: Any, start: int, floor: Any) -> None:
    """Least similarity among each row's candidates: its k-th neighbour is no further."""
    for i in range(len(floor)):
        least = np.float32(np.inf)
        for other in candidate[start + i]:
            if other < 0:
                least = np.float32(-np.inf)
            else:
                least = min(least, dot_rows(vectors, start + i, other))
        floor[i] = least


@njit(cache=True, nogil=True, fastmath=True)
def reaches(ceiling: Any, level: Any, low: int, high: int, own: Any) -> Any:
    """Whether any bound of columns low .. high - 1 reaches the row's or the column's level."""
    reach = np.float32(-4)
    for j in range(low, high):
        reach = max(reach, ceiling[j] - min(level[j], own))
    return reach >= 0


@njit(cache=True, nogil=True)
def _compare(
    ceiling: Any,
    vectors: Any,
    first: int,
    second: int,
    offset: int,
    nearest: Any,
    best: Any,
    floor: Any,
    both: bool,
) -> None:
    """Compare in full the pairs of two blocks whose bound reaches either row's k-th best.

    Row numbers start at `first` and `second`; results of row r lie at r - offset. With `both`
    each pair serves its two rows, and the diagonal block is read above the diagonal.
    """
    height, span = ceiling.shape
    level = np.full(span, np.float32(4))
    if both:
        for j in range(span):
            at = second + j - offset
            level[j] = max(floor[at], best[at, -1]) - BOUND_SLACK
    for i in range(height):
        row = first + i
        at = row - offset
        own = max(floor[at], best[at, -1]) - BOUND_SLACK
        if own < -3:
            own = np.float32(-3)
        begin = i + 1 if both and first == second else 0
        for low in range(begin, span, _LANE):
            high = min(low + _LANE, span)
            if not reaches(ceiling[i], level, low, high, own):
                continue
            for j in range(low, high):
                if ceiling[i, j] < min(level[j], own) or second + j == row:
                    continue
                value = dot_rows(vectors, row, second + j)
                if value >= own:
                    insert_neighbour(nearest[at], best[at], second + j, value)
                    own = max(floor[at], best[at, -1]) - BOUND_SLACK
                if both and value >= level[j]:
                    other = second + j - offset
                    insert_neighbour(nearest[other], best[other], row, value)
                    level[j] = max(floor[other], best[other, -1]) - BOUND_SLACK
