"""Rising threshold, the paper's split: components of the consensus graph, the large ones split.

The published algorithm takes connected components, accepts those of at most `max_size` rows, raises
the threshold inside every larger one and repeats. Each of these components is a component of *one*
maximum spanning forest cut at some level. So the pairs are sorted once, merged once, and all levels
are read from the merges: O(E log E), whatever the number of levels.

The contract:
- Scores are similarities: higher means more likely one identity. They may not exceed 1.
- A pair counts at the first level when its score is *above* `threshold`, and at a later level `t`
  when its score is *not below* `t`. Levels follow t <- t + (1 - t) * step.
- A row that keeps no pair has no label; such rows never form a cluster together.
- Results do not depend on the order of the pairs, of their two ends, or on the number of workers.
  Equal scores are ordered by (source, target), so the spanning forest is unique and
  forest(A u B) = forest(forest(A) u forest(B)), edge for edge.

Source: Zhan et al., ECCV 2018, section 3.4 (label propagation). The released code, at its iteration
cap, makes one cluster of all remaining rows; this module never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit

from cdp.arrays.disjoint_set import find_root, join_sets, label_sets
from cdp.errors import ConfigError, DataError
from cdp.propagation.scored_pairs import check_pairs, sort_by_rows
from cdp.types import UNLABELLED, PairTable

if TYPE_CHECKING:
    import networkx

MAX_SIZE = 300
"""Default largest cluster, in rows. In the public training sets (CASIA-WebFace, VGGFace2, MS-Celeb)
an identity has some tens to a few hundred images and rarely more than 300-400; a larger component
is far more often two identities joined by a wrong pair than one."""

SMALLEST_STEP = 1e-5
"""A smaller step would need more than a million levels."""


@dataclass(frozen=True)
class SpanningForest:
    """The maximum spanning forest of scored pairs, which determines the labels of any threshold.

    source, target : (e,) int64, source < target, e < count.
    score : (e,) float32 or float64, as given, descending; ties by (source, target).
    count : number of rows (nodes), those without a pair included.
    """

    source: np.ndarray
    target: np.ndarray
    score: np.ndarray
    count: int

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Propagation:
    """Pseudo-labels and the levels at which they were accepted.

    label : (n,) int64, 0 .. cluster_count - 1 numbered by each cluster's smallest row; -1 none.
    cut_threshold : (n,) float32, the level at which the row's cluster was accepted; for a row
        without label the level at which it lost its last pair. Rounded up to float32, so that a
        float32 score s was kept at that level exactly when s >= cut_threshold (s > threshold).
    threshold : the first level.
    unsplittable_count : rows of components that no level could bring down to `max_size`, since
        their pairs score 1.0; they have no label.
    """

    label: np.ndarray
    cut_threshold: np.ndarray
    threshold: float
    unsplittable_count: int

    @property
    def cluster_count(self) -> int:
        return int(self.label.max(initial=UNLABELLED)) + 1


def propagate_labels(
    pairs: PairTable | np.ndarray,
    scores: np.ndarray,
    count: int,
    *,
    threshold: float = 0.0,
    max_size: int = MAX_SIZE,
    step: float = 0.1,
) -> Propagation:
    """Turn scored pairs into pseudo-labels.

    Parameters
    ----------
    pairs : PairTable, or (m, 2) integer array of rows in 0 .. count - 1. Order and orientation do
        not matter; of a repeated pair the highest score counts; a self pair is ignored.
    scores : (m,) float32 or float64, finite, at most 1 (probability or cosine).
    count : number of rows.
    threshold : pairs count when their score is above it; in [-1, 1].
    max_size : largest cluster accepted, in rows; at least 1 (then nothing is labelled).
    step : share of the distance to 1 by which the threshold rises inside a component that is too
        large; in [1e-5, 1].

    Returns
    -------
    Propagation

    Raises
    ------
    ConfigError
        A parameter is out of its range.
    DataError
        A row is out of range, a score is not finite or above 1, or the lengths differ.

    Notes
    -----
    The levels t <- t + (1 - t) * step are evaluated in float64; where the formula can no longer
    move t, the next float64 is taken, and 1.0 is the last level. A component larger than `max_size`
    at level 1.0 consists of pairs scored exactly 1.0, which no threshold separates: its rows
    get no label and are counted in `unsplittable_count`. No pairs, or none above the threshold:
    all -1.

    Source: paper section 3.4; computed from a spanning forest (ours), equal to the level-by-level
    algorithm node for node.

    Examples
    --------
    Two identities joined by one weak pair, and a fifth image without a pair:

    >>> import numpy as np
    >>> from cdp import propagate_labels
    >>> pairs = np.array([[0, 1], [1, 2], [2, 3]])
    >>> scores = np.array([0.99, 0.3, 0.98], dtype=np.float32)
    >>> propagate_labels(pairs, scores, count=5, max_size=10).label
    array([ 0,  0,  0,  0, -1])
    >>> propagate_labels(pairs, scores, count=5, max_size=2, step=0.1).label
    array([ 0,  0,  1,  1, -1])
    """
    _check_settings(threshold, max_size, step)
    table, score = check_pairs(pairs, scores, count)
    kept = score > np.float64(threshold)  # a Python float would be rounded to float32
    if not kept.all():
        table, score = table.take(kept), score[kept]
    forest = _span(table.source, table.target, score, count)
    return cut_forest(forest, threshold=threshold, max_size=max_size, step=step)


def build_forest(pairs: PairTable | np.ndarray, scores: np.ndarray, count: int) -> SpanningForest:
    """Reduce scored pairs to their maximum spanning forest.

    Parameters and errors are those of `propagate_labels`; no threshold is applied. A part of the
    pairs may be reduced anywhere and the parts merged with `merge_forests`.
    """
    table, score = check_pairs(pairs, scores, count)
    return _span(table.source, table.target, score, count)


def merge_forests(forests: Sequence[SpanningForest]) -> SpanningForest:
    """Merge forests of parts of the pairs into the forest of all of them, exactly.

    Raises
    ------
    DataError
        There is no forest, or their numbers of rows differ.
    """
    counts = {forest.count for forest in forests}
    if len(counts) != 1:
        raise DataError(
            f"merge_forests expects one or more forests over the same rows, got {len(forests)} "
            f"over {sorted(counts)} rows; build each with the count of the whole set"
        )
    (count,) = counts
    source = np.concatenate([forest.source for forest in forests])
    target = np.concatenate([forest.target for forest in forests])
    score = np.concatenate([forest.score for forest in forests])
    return _span(*sort_by_rows(source, target, score), count)


def cut_forest(
    forest: SpanningForest,
    *,
    threshold: float = 0.0,
    max_size: int = MAX_SIZE,
    step: float = 0.1,
) -> Propagation:
    """Read the pseudo-labels off a spanning forest; O(count), so that settings are cheap to try.

    Parameters, result and errors are those of `propagate_labels`.
    """
    _check_settings(threshold, max_size, step)
    score = forest.score.astype(np.float64)
    kept = int(np.count_nonzero(score > threshold))
    score = score[:kept]
    levels = _list_levels(float(threshold), float(step), float(score.max(initial=threshold)))
    # The level of a pair is the last one it survives; the first level is strict, the others not.
    level = np.maximum(np.searchsorted(levels, score, side="right") - 1, 0)
    label, cut_level = _cut(
        forest.source[:kept], forest.target[:kept], level, forest.count, int(max_size)
    )
    unsplittable = cut_level == len(levels)
    cut = levels[np.minimum(cut_level, len(levels) - 1)]
    rounded = cut.astype(np.float32)
    low = rounded < cut
    rounded[low] = np.nextafter(rounded[low], np.float32(2))
    return Propagation(label, rounded, float(threshold), int(np.count_nonzero(unsplittable)))


def to_networkx(
    pairs: PairTable | np.ndarray, scores: np.ndarray, propagation: Propagation, label: int
) -> networkx.Graph:
    """The consensus graph of one cluster, as it was when the cluster was accepted, for inspection.

    Parameters
    ----------
    pairs, scores : as given to `propagate_labels`.
    propagation : its result.
    label : the pseudo-label of the cluster.

    Returns
    -------
    networkx.Graph
        Nodes are row numbers; each edge has `score` (float) and `bridge` (bool: without it
        its two sides are not connected). `graph.graph["bridges"]` lists the bridges as
        (row, row, score), weakest first: where to look first when a cluster holds two identities.

    Raises
    ------
    DataError
        There is no such label.
    """
    import networkx

    if not 0 <= label < propagation.cluster_count:
        raise DataError(
            f"to_networkx expects a pseudo-label in 0 .. {propagation.cluster_count - 1}, got "
            f"{label}; rows without a label (-1) form no cluster"
        )
    count = len(propagation.label)
    table, score = check_pairs(pairs, scores, count)
    source, target = table.source, table.target
    member = propagation.label == label
    rows = np.flatnonzero(member)
    cut = propagation.cut_threshold[rows[0]]
    kept = member[source] & member[target]
    kept &= (score > np.float64(propagation.threshold)) & (score >= cut)
    graph = networkx.Graph(label=int(label), cut_threshold=float(cut))
    graph.add_nodes_from(rows.tolist())
    for one, other, value in zip(
        source[kept].tolist(), target[kept].tolist(), score[kept].tolist(), strict=True
    ):
        graph.add_edge(one, other, score=value, bridge=False)
    bridges: list[tuple[int, int, float]] = []
    for one, other in networkx.bridges(graph):
        graph.edges[one, other]["bridge"] = True
        low, high = min(one, other), max(one, other)
        bridges.append((low, high, graph.edges[one, other]["score"]))
    graph.graph["bridges"] = sorted(bridges, key=lambda bridge: (bridge[2], bridge[0], bridge[1]))
    return graph


def _check_settings(threshold: float, max_size: int, step: float) -> None:
    if not -1 <= threshold <= 1:
        raise ConfigError(f"propagation threshold must be in [-1, 1], got {threshold!r}")
    if max_size != int(max_size) or max_size < 1:
        raise ConfigError(f"propagation max_size must be an integer >= 1, got {max_size!r}")
    if not SMALLEST_STEP <= step <= 1:
        raise ConfigError(f"propagation step must be in [{SMALLEST_STEP}, 1], got {step!r}")


def _span(source: np.ndarray, target: np.ndarray, score: np.ndarray, count: int) -> SpanningForest:
    """Kruskal over pairs already in (source, target) order."""
    order = _order_by_score(score)
    chosen = _merge(source, target, order, count)
    return SpanningForest(source[chosen], target[chosen], score[chosen], int(count))


def _order_by_score(score: np.ndarray) -> np.ndarray:
    """Positions by descending score, ties by position."""
    if score.dtype != np.float32 or len(score) >= 2**32:
        return np.argsort(-score, kind="stable")
    # Bits of a float32, made monotone, above the position: one sort of unique integers is both
    # stable and several times faster than a stable argsort.
    bits = (np.float32(0) - score).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    bits = np.where(negative, ~bits, bits | np.uint32(1 << 31))
    key = bits.astype(np.uint64)
    key <<= np.uint64(32)
    key |= np.arange(len(score), dtype=np.uint64)
    key.sort()
    key &= np.uint64(0xFFFFFFFF)
    return key.view(np.int64)


def _list_levels(threshold: float, step: float, highest: float) -> np.ndarray:
    """All levels up to the first one above the highest score (at most 1.0), ascending."""
    levels = [threshold]
    level = threshold
    while level < 1.0 and level <= highest:
        raised = level + (1.0 - level) * step
        level = min(raised if raised > level else float(np.nextafter(level, 2.0)), 1.0)
        levels.append(level)
    return np.array(levels)


@njit(cache=True)
def _merge(source: Any, target: Any, order: Any, count: int) -> Any:
    """Positions of the pairs that join two components, in the given order."""
    parent = np.arange(count)
    size = np.ones(count, np.int64)
    chosen = np.empty(min(len(order), max(count - 1, 0)), np.int64)
    found = 0
    for position in order:
        one = find_root(parent, source[position])
        other = find_root(parent, target[position])
        if one != other:
            join_sets(parent, size, one, other)
            chosen[found] = position
            found += 1
            if found == len(chosen):
                break
    return chosen[:found]


@njit(cache=True)
def _cut(source: Any, target: Any, level: Any, count: int, max_size: int) -> Any:
    """Labels and accepted level of each row; `level` is that of each forest pair, descending.

    Pairs of one level join all at once. `whole` follows the components level by level; a pair is
    passed on to `accepted` only where the component it ended up in is small enough. A component
    that becomes too large at a level leaves its parts accepted one level above.
    """
    whole = np.arange(count)
    whole_size = np.ones(count, np.int64)
    accepted = np.arange(count)
    accepted_size = np.ones(count, np.int64)
    accepted_level = np.zeros(count, np.int64)
    start = 0
    while start < len(level):
        end = start
        while end < len(level) and level[end] == level[start]:
            join_sets(
                whole, whole_size, find_root(whole, source[end]), find_root(whole, target[end])
            )
            end += 1
        for i in range(start, end):
            one = find_root(accepted, source[i])
            other = find_root(accepted, target[i])
            if whole_size[find_root(whole, source[i])] <= max_size:
                join_sets(accepted, accepted_size, one, other)
            else:
                if accepted_level[one] == 0:
                    accepted_level[one] = level[i] + 1
                if accepted_level[other] == 0:
                    accepted_level[other] = level[i] + 1
        start = end
    cut_level = np.empty(count, np.int64)
    for row in range(count):
        cut_level[row] = accepted_level[find_root(accepted, row)]
    return label_sets(accepted, accepted_size), cut_level
