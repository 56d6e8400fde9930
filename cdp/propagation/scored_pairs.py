"""Scored pairs, checked: sorted by rows, each pair once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cdp.errors import DataError
from cdp.types import PairTable

_SCORE_SLACK = 1e-5


def check_pairs(
    pairs: PairTable | np.ndarray, scores: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check pairs and scores and bring them into (source, target) order, self pairs left out."""
    if isinstance(pairs, PairTable):
        first, second = np.asarray(pairs.source), np.asarray(pairs.target)
    else:
        table = np.asarray(pairs)
        if table.size == 0:
            table = table.reshape(0, 2).astype(np.int64)
        if table.ndim != 2 or table.shape[1] != 2 or table.dtype.kind not in "iu":
            raise DataError(
                f"pairs must be a PairTable or an (m, 2) integer array, got shape {table.shape} "
                f"of {table.dtype}"
            )
        first, second = table[:, 0], table[:, 1]
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
        return source, target, score
    if source.min() < 0 or target.max() >= count:
        wrong = int(np.flatnonzero((source < 0) | (target >= count))[0])
        raise DataError(
            f"pair {wrong} is ({first[wrong]}, {second[wrong]}), but rows go from 0 to {count - 1}"
        )
    if not np.isfinite(score).all() or score.max() > 1 + _SCORE_SLACK:
        wrong = int(np.flatnonzero(~np.isfinite(score) | (score > 1 + _SCORE_SLACK))[0])
        raise DataError(
            f"scores must be finite and at most 1, got {score[wrong]} for pair {wrong}; "
            "give probabilities or cosines, not distances or logits"
        )
    if score.max() > 1:
        score = np.minimum(score, score.dtype.type(1))
    own = source == target
    if own.any():
        source, target, score = source[~own], target[~own], score[~own]
    return sort_by_rows(source, target, score)


def sort_by_rows(
    source: np.ndarray, target: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if _is_sorted(source, target):
        return source, target, score
    order = np.lexsort((target, source))
    return source[order], target[order], score[order]


@njit(cache=True)
def _is_sorted(source: Any, target: Any) -> bool:
    for i in range(1, len(source)):
        if source[i] < source[i - 1] or (source[i] == source[i - 1] and target[i] < target[i - 1]):
            return False
    return True
