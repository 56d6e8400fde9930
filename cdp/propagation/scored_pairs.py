"""Checked pairs: scores and probabilities in range, sorted by rows, each pair once.

The contract:
- Pairs come as a `PairTable` or an (m, 2) integer array, in any order and orientation.
- A self pair is left out. Of a repeated pair the highest score counts, with its `listings`.
- A wrong row, score or length is a `DataError` that names the pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.scratch import allocate, copy_as
from cdp.errors import DataError
from cdp.types import UNLABELLED, PairTable

_SCORE_SLACK = 1e-5
"""A cosine may exceed 1 by rounding: up to this much it counts as 1."""


def check_pairs(
    pairs: PairTable | np.ndarray, scores: np.ndarray, count: int
) -> tuple[PairTable, np.ndarray]:
    """Check scored pairs and bring them into (source, target) order, each pair once.

    Parameters
    ----------
    pairs : PairTable, or (m, 2) integer array of rows in 0 .. count - 1.
    scores : (m,) float, finite, at most 1; other dtypes than float32 and float64 become float64.
    count : number of rows.

    Returns
    -------
    (PairTable, (p,) score) : p <= m; listings are kept where they were given.

    Raises
    ------
    DataError
        A row out of range, a score that is not finite or above 1, listings below 1, or lengths
        that differ.
    """
    first, second, listings = _list_ends(pairs)
    score = np.asarray(scores)
    if score.dtype not in (np.float32, np.float64):
        score = score.astype(np.float64)
    if score.shape != (len(first),) or len(second) != len(first):
        raise DataError(f"expected one score a pair, got {len(first)} pairs, scores {score.shape}")
    if count < 0:
        raise DataError(f"count must be the number of rows, got {count}")
    source = np.minimum(first, second).astype(np.int64, copy=False)
    target = np.maximum(first, second).astype(np.int64, copy=False)
    if len(source) == 0:
        return PairTable(source, target, listings), score
    if source.min() < 0 or target.max() >= count:
        wrong = int(np.flatnonzero((source < 0) | (target >= count))[0])
        raise DataError(
            f"pair {wrong} is ({first[wrong]}, {second[wrong]}), but rows go from 0 to {count - 1}"
        )
    if listings is not None and listings.min() < 1:
        raise DataError(f"pairs must be listed once or more, got listings of {listings.min()}")
    if not np.isfinite(score).all() or score.max() > 1 + _SCORE_SLACK:
        wrong = int(np.flatnonzero(~np.isfinite(score) | (score > 1 + _SCORE_SLACK))[0])
        raise DataError(
            f"scores must be finite and at most 1, got {score[wrong]} for pair {wrong}; "
            "give probabilities or cosines, not distances or logits"
        )
    if score.max() > 1:
        score = np.minimum(score, score.dtype.type(1))
    table = PairTable(source, target, listings)
    is_self = source == target
    if is_self.any():
        table, score = take_pairs(table, score, ~is_self)
    if not is_sorted(table.source, table.target):
        order = np.lexsort((table.target, table.source))
        table, score = table.take(order), score[order]
    return _keep_highest(table, score)


def check_probability(probability: np.ndarray, pair_count: int) -> np.ndarray:
    """The probabilities of pairs as (m,) float64; DataError outside [0, 1] or of another length."""
    given = np.asarray(probability)
    if given.shape != (pair_count,):
        raise DataError(f"expected one probability a pair, got {pair_count} pairs, {given.shape}")
    value = copy_as(given, np.float64)
    if len(value) and not (value.min() >= 0 and value.max() <= 1):
        raise DataError(
            f"probabilities must lie in [0, 1], got [{value.min()}, {value.max()}] (NaN counts "
            "as outside); give the mediator's probabilities, not cosines or distances"
        )
    return value


def sort_by_rows(
    source: np.ndarray, target: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring checked pairs into (source, target) order; repeated ones stay."""
    if is_sorted(source, target):
        return source, target, score
    order = np.lexsort((target, source))
    return source[order], target[order], score[order]


def _list_ends(
    pairs: PairTable | np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The two rows of each pair as given, and the listings where there are any."""
    if isinstance(pairs, PairTable):
        return np.asarray(pairs.source), np.asarray(pairs.target), pairs.listings
    table = np.asarray(pairs)
    if table.size == 0:
        table = table.reshape(0, 2).astype(np.int64)
    if table.ndim != 2 or table.shape[1] != 2 or table.dtype.kind not in "iu":
        raise DataError(
            f"pairs must be a PairTable or an (m, 2) integer array, got shape {table.shape} "
            f"of {table.dtype}"
        )
    return table[:, 0], table[:, 1], None


def _keep_highest(table: PairTable, score: np.ndarray) -> tuple[PairTable, np.ndarray]:
    """Of each repeated pair the one with the highest score (then the first one given)."""
    first = np.ones(len(table), bool)
    first[1:] = table.source[1:] != table.source[:-1]
    first[1:] |= table.target[1:] != table.target[:-1]
    if first.all():
        return table, score
    order = np.lexsort((-score, table.target, table.source))
    # `first` marks places, and sorting within a repeated pair moves none of them.
    return table.take(order[first]), score[order][first]


def take_inside(
    label: np.ndarray, pairs: PairTable, score: np.ndarray
) -> tuple[PairTable, np.ndarray]:
    """The pairs whose two rows share a label, and their scores; they lie on disk where large."""
    inside = mark_inside(label, pairs.source, pairs.target)
    return take_pairs(pairs, score, inside)


def take_pairs(
    pairs: PairTable, score: np.ndarray, kept: np.ndarray
) -> tuple[PairTable, np.ndarray]:
    """The pairs of a bool mask and their scores, as `PairTable.take`; on disk where large."""
    count = int(np.count_nonzero(kept))

    def take(column: np.ndarray) -> np.ndarray:
        out = allocate((count,), column.dtype.type)
        _compress(column, kept, out)
        return out

    listings = None if pairs.listings is None else take(pairs.listings)
    table = PairTable(take(pairs.source), take(pairs.target), listings)
    return table, take(np.asarray(score))


@njit(cache=True, nogil=True)
def mark_inside(label: Any, source: Any, target: Any) -> Any:
    """(m,) bool, whether the two rows of each pair share a label."""
    inside = np.empty(len(source), np.bool_)
    for e in range(len(source)):
        own = label[source[e]]
        inside[e] = own != UNLABELLED and own == label[target[e]]
    return inside


@njit(cache=True, nogil=True)
def _compress(column: Any, kept: Any, out: Any) -> None:
    at = 0
    for e in range(len(column)):
        if kept[e]:
            out[at] = column[e]
            at += 1


@njit(cache=True)
def is_sorted(source: Any, target: Any) -> bool:
    """Whether pairs are in (source, target) order."""
    for i in range(1, len(source)):
        if source[i] < source[i - 1] or (source[i] == source[i - 1] and target[i] < target[i - 1]):
            return False
    return True
