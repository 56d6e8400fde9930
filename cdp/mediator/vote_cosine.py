"""The cosine that votes are cut at, chosen from the pile's own neighbour graph.

The contract:
- Enters: candidate pairs and their base cosines. No label, no truth. Leaves: one cosine.
- Falling from 1, the cosine joins images of one identity first, then identities: the largest
  component, a few images until then, soon holds most of the pile. The cosine chosen is the lowest
  one above this collapse: there the largest component hardly shrinks as the cosine rises further.

Source: ours; the collapse is the percolation threshold of random graphs (Erdos and Renyi 1960).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import draw_pairs, make_unit
from cdp.arrays.disjoint_set import find_root, join_sets
from cdp.propagation.rising_threshold import build_forest
from cdp.types import PairTable

_STEPS = 100
"""Cosines tried between 0 and 1."""
_WINDOW = 0.08
"""Rise of the cosine over which the largest component must hardly shrink."""
_LONGER = 3
"""Times that rise, for a component of more than half of the pile."""
_SLACK = 0.01
"""Share of the pile that may break off from it over that rise."""
_SLACK_ROWS = 2
"""Or as many rows, in a small pile."""
_MARGIN = 0.02
"""Added to that cosine: what still chains two or three people falls apart just above. The BCubed F
was then within .02 of that of the best cosine on LFW at 24, 16 and 12 px and in a pile of synthetic
faces, and within .06 where every person has many images of 16 or 12 px."""
_SAMPLE = 5000
"""Pairs of random rows behind the floor."""
_HIGHEST_FLOOR = 0.4
"""Where one or two people fill a pile, random rows are alike, and say nothing of other people."""
_COLLAPSED = 0.95
"""Share of the rows with a pair below which the largest component has begun to fall apart."""


def choose_cosine(
    pairs: PairTable, similarity: np.ndarray, count: int, *, floor: float = 0.0
) -> float:
    """The lowest cosine at which no chain of pairs joins most of the pile.

    Parameters
    ----------
    pairs : candidate pairs that the committee keeps.
    similarity : (m,) float, their cosines; pairs at 0 and below never count.
    count : number of rows.
    floor : the lowest cosine to choose where the lists chain no pile, see `measure_floor`.

    Returns
    -------
    float
        In [0, 1). 0 where the largest component never falls apart: images that are all alike.

    Source: ours.
    """
    levels = np.arange(_STEPS) / _STEPS
    largest, joined = measure_components(pairs, similarity, count, levels)
    # A component of more than half must be steady for longer before it is taken for a person.
    window = round(_WINDOW * _STEPS) * np.where(largest > count / 2, _LONGER, 1)
    later = np.minimum(np.arange(_STEPS) + window, _STEPS - 1)
    # Images that fall off one by one end without a pair; what breaks off keeps pairs.
    broken = (largest - largest[later]) - (joined - joined[later])
    steady = broken <= max(_SLACK * count, _SLACK_ROWS)
    is_giant = largest[0] > count / 2
    fallen = largest < _COLLAPSED * joined if is_giant else np.ones(_STEPS, bool)
    chained = largest[0] >= _COLLAPSED * joined[0]  # at 0; else nothing collapses
    found = steady & fallen & (chained | (levels >= floor))
    if not joined[0] or not found.any():
        return 0.0
    return round(float(levels[np.argmax(found)]) + _MARGIN, 2)


def measure_floor(view: np.ndarray, *, seed: int = 0) -> float:
    """The cosine that few pairs of different random rows exceed, at most `_HIGHEST_FLOOR`.

    Parameters
    ----------
    view : (n, d) float.
    seed : of the sample.

    Returns
    -------
    float
        Two deviations above the median, the deviation taken from the lower half, where pairs of one
        identity are rare; 0 or more.
    """
    count = len(view)
    if count < 2:
        return 0.0
    one, other = draw_pairs(count, _SAMPLE, [seed, 0x666C6F6F])
    first, second = (make_unit(np.asarray(view[rows]))[0] for rows in (one, other))
    low, middle = np.quantile(np.einsum("nd,nd->n", first, second), [0.16, 0.5])
    return float(np.clip(middle + 2 * (middle - low), 0, _HIGHEST_FLOOR))


def measure_components(
    pairs: PairTable, similarity: np.ndarray, count: int, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the largest component among the pairs above each level, and rows with such a pair.

    Parameters
    ----------
    pairs, similarity, count : as for `choose_cosine`.
    levels : (levels,) float, any order.

    Returns
    -------
    largest, joined : (levels,) int64
    """
    forest = build_forest(pairs, similarity, count)
    largest, joined = _join(forest.source, forest.target, count)
    edges = np.searchsorted(-forest.score.astype(np.float64), -np.asarray(levels), side="left")
    return largest[edges], joined[edges]


@njit(cache=True)
def _join(source: Any, target: Any, count: int) -> Any:
    """(e + 1,) int64 each: rows of the largest set, and of all sets of several, after each join."""
    parent = np.arange(count)
    size = np.ones(count, np.int64)
    largest = np.zeros(len(source) + 1, np.int64)
    joined = np.zeros(len(source) + 1, np.int64)
    for edge in range(len(source)):
        one, other = find_root(parent, source[edge]), find_root(parent, target[edge])
        alone = (size[one] == 1) + (size[other] == 1)
        join_sets(parent, size, one, other)
        largest[edge + 1] = max(largest[edge], size[find_root(parent, one)])
        joined[edge + 1] = joined[edge] + alone
    return largest, joined
