"""Groups that candidate pairs join: the probability that two of them are one identity.

The contract:
- Enters: a partition of the rows, the candidate pairs and their calibrated probabilities. Leaves:
  every two groups with candidate pairs between them, and the log-odds that they are one identity.
- These are the mean log-odds of the pairs between them, each weighted by its listings. One identity
  would have about as many candidate pairs between the two as within them: where only a share of
  those appears, the odds are multiplied by its square root.
- Memory: the pairs between groups are sorted by parts.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.log_odds import to_log_odds, to_probability
from cdp.types import PairTable

PART_PAIRS = 1 << 22
"""Pairs between groups that are sorted at once."""
MARGIN = 1e-6
"""Probabilities count as at least this and at most 1 - this: log-odds of at most 14."""


@dataclass(frozen=True)
class GroupPairs:
    """Pairs of groups with candidate pairs between them.

    first, second : (q,) int64, groups, first < second; rising.
    log_odds : (q,) float64, that the two are one identity; `chance` is the probability.
    """

    first: np.ndarray
    second: np.ndarray
    log_odds: np.ndarray

    @property
    def chance(self) -> np.ndarray:
        return to_probability(self.log_odds)


def compare_groups(group: np.ndarray, pairs: PairTable, probability: np.ndarray) -> GroupPairs:
    """Whether two groups are one identity, for all with candidate pairs between them.

    Parameters
    ----------
    group : (n,) int64, 0 and up; every row has one.
    pairs : all candidate pairs.
    probability : (m,) float in [0, 1], calibrated.
    """
    parts = list(compare_parts(group, pairs, np.asarray(probability)))
    return GroupPairs(
        np.concatenate([np.empty(0, np.int64), *(part.first for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(part.second for part in parts)]),
        np.concatenate([np.empty(0), *(part.log_odds for part in parts)]),
    )


def compare_parts(
    group: np.ndarray, pairs: PairTable, probability: np.ndarray
) -> Iterator[GroupPairs]:
    """`compare_groups` by parts of about `PART_PAIRS` pairs, each of a range of `first`."""
    groups = int(group.max(initial=-1)) + 1
    size = np.bincount(group, minlength=groups).astype(np.float64)
    within, across = _count_pairs(group, pairs.source, pairs.target, groups)
    density = np.where(size > 1, within / np.maximum(size * (size - 1) / 2, 1), 1)
    part_of = (np.cumsum(across) - across) // PART_PAIRS
    for number in range(int(part_of.max(initial=-1)) + 1):
        chosen = _find_across(group, pairs.source, pairs.target, part_of, number, across)
        if not len(chosen):
            continue
        few = pairs.take(chosen)
        one, other = group[few.source], group[few.target]
        low, high = np.minimum(one, other), np.maximum(one, other)
        key, place, listed = np.unique(low * groups + high, return_inverse=True, return_counts=True)
        first, second = key // groups, key % groups
        expected = size[first] * size[second] * np.minimum(density[first], density[second])
        evidence = to_log_odds(probability[chosen], margin=MARGIN)
        total = np.bincount(place, evidence * few.weight, len(key))
        mean = total / np.bincount(place, few.weight, len(key))
        share = listed / np.maximum(expected, listed)
        yield GroupPairs(first, second, mean + 0.5 * np.log(share))


@njit(cache=True, nogil=True)
def _count_pairs(group: Any, source: Any, target: Any, groups: int) -> Any:
    """The pairs inside each group, and those to groups of higher numbers, (groups,) int64 each."""
    within, across = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    for e in range(len(source)):
        one, other = group[source[e]], group[target[e]]
        if one == other:
            within[one] += 1
        else:
            across[min(one, other)] += 1
    return within, across


@njit(cache=True, nogil=True)
def _find_across(
    group: Any, source: Any, target: Any, part_of: Any, number: int, across: Any
) -> Any:
    """Positions of the pairs between groups whose lower one is in a part."""
    size = 0
    for low in range(len(part_of)):
        if part_of[low] == number:
            size += across[low]
    chosen = np.empty(size, np.int64)
    at = 0
    for e in range(len(source)):
        one, other = group[source[e]], group[target[e]]
        if one != other and part_of[min(one, other)] == number:
            chosen[at] = e
            at += 1
    return chosen
