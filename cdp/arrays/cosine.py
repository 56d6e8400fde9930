"""Unit vectors and their cosines: one order of additions for every neighbour search and feature.

The contract:
- `make_unit` refuses a zero vector, a NaN or an inf by row number; unit float32 C-ordered rows come
  back as they are, not copied.
- `dot_rows` adds in one fixed order, so a cosine has the same bits in a graph, in a feature and for
  any number of threads.
- `insert_neighbour` orders by descending similarity, ties by smaller row, whatever the order of its
  calls.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.threads import BLOCK, list_blocks
from cdp.errors import DataError

_UNIT_SLACK = 2e-6
"""A float32 row whose length is 1 to within this counts as a unit vector."""


def make_unit(vectors: np.ndarray) -> tuple[np.ndarray, bool]:
    """Check vectors and scale them to unit length.

    vectors : (n, d) numbers. Returns (n, d) float32 C-ordered unit rows, and whether the input was
    that already; then it is returned itself. Raises DataError for a row without a direction.
    """
    array, norm = _check_rows(vectors)
    is_unit = array.dtype == np.float32 and array.flags.c_contiguous
    if is_unit and (np.abs(norm - 1) <= _UNIT_SLACK).all():
        return array, True
    unit = np.empty(array.shape, np.float32)
    for start in range(0, len(array), BLOCK):
        stop = start + BLOCK
        unit[start:stop] = array[start:stop].astype(np.float64) / norm[start:stop, None]
    return unit, False


def take_unit(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows as unit vectors, (r, d) float32; all rows are checked, only these are copied.

    Raises DataError for any row without a direction, as `make_unit`.
    """
    array, _ = _check_rows(vectors)
    return make_unit(array[rows])[0]


def _check_rows(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The vectors as an array and the length of each, (n,) float64; DataError as `make_unit`."""
    array = np.asarray(vectors)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or (len(array) and not array.shape[1]):
        raise DataError(
            f"expected vectors as an (n, d) array of numbers, got shape {array.shape} of "
            f"{array.dtype}"
        )
    norm = _measure_lengths(array)
    bad = ~(np.isfinite(norm) & (norm > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        kind = "is all zeros" if norm[row] == 0 else "holds NaN, inf or overflows"
        raise DataError(
            f"vector {row} {kind} ({int(bad.sum())} such of {len(array)}); a cosine needs finite "
            "vectors that are not zero: embed these images again or leave them out"
        )
    return array, norm


def draw_pairs(count: int, number: int, seed: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of two different rows of `count`, 2 or more, with replacement: (number,) int64
    each."""
    random = np.random.default_rng(seed)
    one = random.integers(0, count, number)
    return one, (one + random.integers(1, count, number)) % count


def measure_pairs(
    rows: np.ndarray, source: np.ndarray, target: np.ndarray, out: np.ndarray, workers: int = 1
) -> np.ndarray:
    """Fill `out`, (m,) float32, with the product of each pair of rows, by `dot_rows`."""

    def work(part: slice) -> None:
        _multiply_pairs(rows, source[part], target[part], out[part])

    blocks = list_blocks(0, len(source), 64 * BLOCK)
    if workers <= 1 or len(blocks) <= 1:
        work(slice(0, len(source)))
        return out
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, blocks))
    return out


def _measure_lengths(array: np.ndarray) -> np.ndarray:
    """The length of each row, (n,) float64."""
    if array.dtype in (np.float32, np.float64) and array.flags.c_contiguous:
        return _add_squares(as_readonly(array))
    norm = np.empty(len(array))
    for start in range(0, len(array), BLOCK):
        part = array[start : start + BLOCK].astype(np.float64)
        norm[start : start + BLOCK] = np.sqrt(np.einsum("ij,ij->i", part, part))
    return norm


def as_readonly(array: np.ndarray) -> np.ndarray:
    """A read-only view of the array, so that code is compiled once for mapped and other arrays."""
    readonly = array.view()
    readonly.setflags(write=False)
    return readonly


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _add_squares(vectors: Any) -> Any:
    norm = np.empty(len(vectors))
    for row in range(len(vectors)):
        total = 0.0
        for axis in range(vectors.shape[1]):
            total += np.float64(vectors[row, axis]) * np.float64(vectors[row, axis])
        norm[row] = np.sqrt(total)
    return norm


@njit(cache=True, nogil=True)
def _multiply_pairs(vectors: Any, source: Any, target: Any, out: Any) -> None:
    for i in range(len(source)):
        out[i] = dot_rows(vectors, source[i], target[i])


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def dot_between(left: Any, one: int, right: Any, other: int) -> Any:
    """Cosine of a row of `left` and a row of `right`, unit float32 vectors; float32 in [-1, 1]."""
    total = np.float32(0)
    for axis in range(left.shape[1]):
        total += left[one, axis] * right[other, axis]
    return min(max(total, np.float32(-1)), np.float32(1))


@njit(cache=True, nogil=True)
def dot_rows(vectors: Any, one: int, other: int) -> Any:
    """Cosine of two rows of unit float32 vectors, float32 in [-1, 1]."""
    return dot_between(vectors, one, vectors, other)


@njit(cache=True, nogil=True)
def insert_neighbour(nearest: Any, best: Any, candidate: int, value: Any) -> None:
    """Insert a candidate of similarity `value` into a row's k nearest, in place.

    nearest, best : (k,) rows and their similarities, descending, ties by smaller row.
    """
    place = len(best) - 1
    if value < best[place] or (value == best[place] and candidate > nearest[place]):
        return
    while place > 0 and (
        best[place - 1] < value or (best[place - 1] == value and nearest[place - 1] > candidate)
    ):
        best[place] = best[place - 1]
        nearest[place] = nearest[place - 1]
        place -= 1
    best[place] = value
    nearest[place] = candidate
