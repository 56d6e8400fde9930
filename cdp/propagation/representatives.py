"""Pairs and labels of near-equal rows: one row stands for a group, and its label goes to all.

The contract:
- `link_rows` adds to the pairs of the representatives one pair a represented row, with its
  representative, at probability 1. Propagation over all rows then gives every row the cluster of
  its representative, and counts rows where it counts sizes.
- `RowGroups` is the way back: the rows of a group that share a label become one row again, with the
  number of rows it stands for. What near-equal rows repeat is counted once there (evidence,
  diffusion, medoids), what is a number of images is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from cdp.propagation.scored_pairs import is_sorted, take_pairs
from cdp.types import PairTable


def link_rows(
    pairs: PairTable, score: np.ndarray, representative: np.ndarray, *, listings: int
) -> tuple[PairTable, np.ndarray]:
    """The pairs of all rows, from those of the representatives.

    Parameters
    ----------
    pairs : of the representatives, numbered 0 and up in ascending order.
    score : (m,) float32.
    representative : (n,) int64, see `cdp.knn.near_equal`.
    listings : of each added pair: the number of lists that would hold it.

    Returns
    -------
    pairs : PairTable over all rows. score : (p,) float32, 1 for an added pair.
    """
    rows = np.arange(len(representative))
    kept = np.flatnonzero(representative == rows)
    moved = np.flatnonzero(representative != rows)
    source = np.concatenate([kept[pairs.source], np.minimum(moved, representative[moved])])
    target = np.concatenate([kept[pairs.target], np.maximum(moved, representative[moved])])
    weight = np.concatenate([pairs.weight, np.full(len(moved), listings)]).astype(np.int32)
    every = np.concatenate([score, np.ones(len(moved), score.dtype)])
    order = np.lexsort((target, source))
    return PairTable(source[order], target[order], weight[order]), every[order]


@dataclass(frozen=True)
class RowGroups:
    """Rows in groups of near-equal rows with one label.

    rows : (g,) int64, the row that stands for each group, ascending.
    group : (n,) int64, the group of each row. size : (g,) int64, its number of rows.
    """

    rows: np.ndarray
    group: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, representative: np.ndarray, label: np.ndarray) -> RowGroups:
        """The groups of a labelling: a row whose label is not its representative's is alone."""
        alone = label != label[representative]
        stands = np.where(alone, np.arange(len(label)), representative)
        rows, group, size = np.unique(stands, return_inverse=True, return_counts=True)
        return cls(rows, group.astype(np.int64), size)

    def reduce_pairs(self, pairs: PairTable, score: np.ndarray) -> tuple[PairTable, np.ndarray]:
        """The pairs between groups, numbered by group, and their scores; pairs inside are left out.

        Of several pairs between two groups all are kept. They lie on disk where they are large;
        where no row stands for another they are the pairs given.
        """
        if len(self.rows) == len(self.group):
            return pairs, score
        few, value = take_pairs(pairs, score, _mark_across(self.group, pairs.source, pairs.target))
        _number_groups(self.group, few.source, few.target)
        if is_sorted(few.source, few.target):
            return few, value
        order = np.lexsort((few.target, few.source))
        return few.take(order), value[order]


@njit(cache=True, nogil=True)
def _mark_across(group: Any, source: Any, target: Any) -> Any:
    """(m,) bool, whether the rows of each pair are in two groups."""
    across = np.empty(len(source), np.bool_)
    for e in range(len(source)):
        across[e] = group[source[e]] != group[target[e]]
    return across


@njit(cache=True, nogil=True)
def _number_groups(group: Any, source: Any, target: Any) -> None:
    """Replace the rows of pairs by their groups, the lower one first."""
    for e in range(len(source)):
        one, other = group[source[e]], group[target[e]]
        source[e], target[e] = min(one, other), max(one, other)
