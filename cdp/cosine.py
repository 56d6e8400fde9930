"""Unit rows and their cosines: the ground on which all neighbour searches stand.

The contract:
- `make_unit` refuses a zero vector, a NaN or an inf by row number; unit float32 C-ordered rows come
  back as they are, not copied.
- `dot_rows` adds in one fixed order whoever asks, so a cosine has the same bits in a graph, in a
  feature and for any number of threads. `insert` orders by descending similarity, ties by smaller
  row, whatever the order of its calls.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numba import njit
from threadpoolctl import ThreadpoolController

from cdp.errors import ConfigError, DataError

BLOCK = 1024
_UNIT_SLACK = 2e-6


def count_threads(threads: int | None) -> int:
    if threads is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else (os.cpu_count() or 1)
        )
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    return threads


_BLAS: dict[str, Any] = {"users": 0, "limits": None}
_BLAS_LOCK = threading.Lock()


@contextmanager
def limit_blas() -> Iterator[None]:
    """Keep BLAS to one thread: its sums then have one order, and the blocks have the cores.

    The limit is the process's, so the last of several concurrent searches lifts it, not the first.
    """
    with _BLAS_LOCK:
        if _BLAS["users"] == 0:
            found = ThreadpoolController()
            # a BLAS of OpenMP takes its host's threads along: those are put back as they were
            _BLAS["limits"] = [
                found.select(user_api=kind).limit(limits=limit)
                for kind, limit in (("openmp", None), ("blas", 1))
            ]
        _BLAS["users"] += 1
    try:
        yield
    finally:
        with _BLAS_LOCK:
            _BLAS["users"] -= 1
            if _BLAS["users"] == 0:
                for limits in reversed(_BLAS["limits"]):
                    limits.restore_original_limits()


def list_blocks(start: int, stop: int, size: int = BLOCK) -> list[slice]:
    return [slice(low, min(low + size, stop)) for low in range(start, stop, size)]


def make_unit(vectors: np.ndarray) -> tuple[np.ndarray, bool]:
    """Check the vectors; give them as unit float32 rows, and whether they were so already."""
    array = np.asarray(vectors)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or (len(array) and not array.shape[1]):
        raise DataError(
            f"expected vectors as an (n, d) array of numbers, got shape {array.shape} of "
            f"{array.dtype}"
        )
    is_unit = array.dtype == np.float32 and array.flags.c_contiguous
    norm = np.empty(len(array))
    for start in range(0, len(array), BLOCK):
        part = array[start : start + BLOCK].astype(np.float64)
        norm[start : start + BLOCK] = np.sqrt(np.einsum("ij,ij->i", part, part))
    bad = ~(np.isfinite(norm) & (norm > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        kind = "is all zeros" if norm[row] == 0 else "holds NaN, inf or overflows"
        raise DataError(
            f"vector {row} {kind} ({int(bad.sum())} such of {len(array)}); a cosine needs finite "
            "vectors that are not zero: embed these images again or leave them out"
        )
    if is_unit and (np.abs(norm - 1) <= _UNIT_SLACK).all():
        return array, True
    unit = np.empty(array.shape, np.float32)
    for start in range(0, len(array), BLOCK):
        stop = start + BLOCK
        unit[start:stop] = array[start:stop].astype(np.float64) / norm[start:stop, None]
    return unit, False


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def dot_rows(vectors: Any, one: int, other: int) -> Any:
    total = np.float32(0)
    for axis in range(vectors.shape[1]):
        total += vectors[one, axis] * vectors[other, axis]
    return min(max(total, np.float32(-1)), np.float32(1))


@njit(cache=True, nogil=True)
def insert(nearest: Any, best: Any, candidate: int, value: Any) -> None:
    """Insert by descending similarity, ties by smaller index; whatever the order of calls."""
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
