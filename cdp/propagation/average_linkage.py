"""Consensus split: average linkage of pair log-odds on a sparse graph of candidate pairs.

Cutting components at one rising threshold decides by one pair at a time: one wrong pair joins two
identities, one high threshold halves one. Here two groups merge while the mean log-odds,
log(p / (1 - p)), of all pairs between them is positive: they are then more likely one identity than
two, and the boundary at zero needs no tuning. Each pair is weighted by `listings`, the number of
k-NN lists (over all views, both directions) that contain it. On the frequent identities of LFW at
16 px the weights raised pairwise F from 93.0 to 93.5.

The contract:
- Enters: pairs of rows with calibrated probabilities. Leaves: a label for each row, and the merges
  in the order they were made, so that a stricter cut is a prefix of them.
- Heights never rise from one merge to the next: the mean over a joined group is between the means
  over its parts.
- Groups without a scored pair between them are never joined; a row alone has no label.
- Log-odds are summed in fixed point (2^-30), so sums do not depend on their order. Of equal means
  the pair of groups with the smallest names goes first; of two merging groups the one with fewer
  rows gives up its name (then the larger name), names starting as row numbers.
- Groups of two components, of the graph of pairs above the threshold, never join: the mean between
  them is below it. So components are merged in batches of `BATCH_PAIRS`, whose groups stay in the
  cache, and the pairs between them are left out; labels and heights do not depend on either.
- O(m log^2 m) time in the number m of pairs; one thread. Some 24 bytes a pair that may lie on disk
  (`cdp.arrays.scratch`), and 90 of memory for each pair of a batch, or of the largest component.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from cdp.arrays.disjoint_set import find_root, join_sets, label_sets
from cdp.arrays.log_odds import convert_threshold, to_log_odds
from cdp.arrays.scratch import BLOCK, allocate
from cdp.errors import ConfigError
from cdp.propagation.scored_pairs import check_pairs, check_probability
from cdp.types import UNLABELLED, PairTable

SCALE = 2.0**30
LOG_ODDS_LIMIT = 15.0
"""Log-odds beyond this count as this: float32 probabilities carry no more."""
BATCH_PAIRS = 1 << 15
"""Pairs of whole components that are merged at once, unless one component has more. On 516,000
pairs 2^15 took .5 s, 2^17 .8 s, all at once 1.3 s."""


@dataclass(frozen=True)
class Agglomeration:
    """Groups of rows, and the merges that made them.

    label : (n,) int64, 0 .. cluster_count - 1 numbered by each cluster's smallest row; -1 for a
        row that merged with no other.
    merge : (g, 2) int64, a row of either group of each merge, in the order of merging.
    height : (g,) float64, mean log-odds over the pairs between the two groups, never rising.
    """

    label: np.ndarray
    merge: np.ndarray
    height: np.ndarray

    @property
    def cluster_count(self) -> int:
        return int(self.label.max(initial=UNLABELLED)) + 1

    def cut(self, threshold: float) -> np.ndarray:
        """The labels at a stricter threshold, (n,) int64, without agglomerating again.

        threshold : probability in (0, 1); merges stop where the mean log-odds no longer exceed its
            log-odds. One below that of the agglomeration changes nothing.
        """
        kept = int(np.count_nonzero(self.height > _read_threshold(threshold)))
        return _label_rows(self.merge[:kept], len(self.label))


def agglomerate(
    pairs: PairTable | np.ndarray,
    probability: np.ndarray,
    count: int,
    *,
    threshold: float = 0.5,
    max_size: int | None = None,
) -> Agglomeration:
    """Merge groups while the mean log-odds of all pairs between them exceed the threshold's.

    Average linkage on a sparse graph, best pair of groups first.

    Parameters
    ----------
    pairs : PairTable, or (m, 2) integer array of rows in 0 .. count - 1. Order and orientation do
        not matter; of a repeated pair the highest probability counts; a self pair is ignored. A
        pair weighs its `listings`, or 1.
    probability : (m,) float in [0, 1], that the pair shows one identity.
    count : number of rows.
    threshold : in (0, 1). At .5 merging stops where one identity is less likely than two.
    max_size : largest group allowed, in rows; a merge beyond it is passed over. None: any size.

    Raises
    ------
    ConfigError
        A threshold outside (0, 1), or a max_size below 1.
    DataError
        A row out of range, a probability outside [0, 1] or NaN, or lengths that differ.

    Source: ours. Kernighan-Lin style signed partitioning (Keuper et al. 2015, "greedy additive
    edge contraction") with the mean in place of the sum, since pairs of the same two groups are far
    from independent.

    Examples
    --------
    Two likely pairs, and a wrong one between them that two others outweigh:

    >>> import numpy as np
    >>> pairs = np.array([[0, 1], [2, 3], [1, 2], [0, 2], [1, 3]])
    >>> agglomerate(pairs, np.array([0.99, 0.99, 0.9, 0.1, 0.05]), 5).label
    array([ 0,  0,  1,  1, -1])
    """
    if max_size is not None and max_size < 1:
        raise ConfigError(f"agglomeration max_size: expected an integer >= 1, got {max_size}")
    stop = _read_threshold(threshold)
    table, value = check_pairs(pairs, check_probability(probability, len(pairs)), count)
    fixed = _round_log_odds(value)
    del value
    largest = count if max_size is None else max_size
    place = np.empty(count, np.int32)
    found = [
        _merge_batch(table, fixed, batch, rows, place, stop, largest)
        for batch, rows in _share_components(table, fixed, count, stop)
    ]
    merge = np.concatenate([np.empty((0, 2), np.int64), *(each[0] for each in found)])
    height = np.concatenate([np.empty(0), *(each[1] for each in found)])
    order = np.argsort(-height, kind="stable")
    merge, height = merge[order], height[order]
    return Agglomeration(_label_rows(merge, count), merge, height)


def _round_log_odds(value: np.ndarray) -> np.ndarray:
    """(m,) int64 log-odds in fixed point."""
    fixed = allocate(value.shape, np.int64)
    for start in range(0, len(value), BLOCK):
        part = slice(start, start + BLOCK)
        fixed[part] = np.rint(to_log_odds(value[part], LOG_ODDS_LIMIT) * SCALE)
    return fixed


def _share_components(
    pairs: PairTable, fixed: np.ndarray, count: int, stop: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The components of the pairs above `stop`, in batches of about `BATCH_PAIRS`.

    Yields, for each batch, the positions of the pairs within its components, ascending, and its
    rows, ascending.
    """
    component = _find_components(pairs.source, pairs.target, fixed, count, stop)
    inside = _count_inside(pairs.source, pairs.target, component)
    batch = (np.cumsum(inside) - inside) // BATCH_PAIRS
    size = np.bincount(batch, inside).astype(np.int64)
    chosen = allocate((int(inside.sum()),), np.int64)
    _list_inside(pairs.source, pairs.target, component, batch, np.cumsum(size) - size, chosen)
    rows = np.flatnonzero(component >= 0)
    of_row = batch[component[rows]]
    rows = rows[np.argsort(of_row, kind="stable")]
    ends, row_ends = np.cumsum(size), np.cumsum(np.bincount(of_row, minlength=len(size)))
    for some, own in zip(np.split(chosen, ends[:-1]), np.split(rows, row_ends[:-1]), strict=True):
        if len(own):
            yield some, own


def _merge_batch(
    pairs: PairTable,
    fixed: np.ndarray,
    chosen: np.ndarray,
    rows: np.ndarray,
    place: np.ndarray,
    stop: float,
    max_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Merges, by row, and heights among some `rows`, by the `chosen` pairs between them.

    place : (n,) int32, written to at the rows.
    """
    place[rows] = np.arange(len(rows), dtype=np.int32)
    part = pairs.take(chosen)
    few = PairTable(place[part.source], place[part.target], part.listings)
    merge, height = _agglomerate(_make_edges(few, fixed[chosen]), len(rows), stop, max_size)
    return rows[merge], height


def _read_threshold(threshold: float) -> float:
    if not 0 < threshold < 1:
        raise ConfigError(
            f"agglomeration threshold: expected a probability between 0 and 1, got {threshold}"
        )
    return convert_threshold(threshold)


@njit(cache=True)
def _find_components(source: Any, target: Any, fixed: Any, count: int, stop: float) -> Any:
    """(n,) int64, the component of each row by the pairs above `stop`; -1 for a row alone."""
    parent = np.arange(count)
    size = np.ones(count, np.int64)
    for e in range(len(source)):
        if fixed[e] / SCALE > stop:
            one, other = find_root(parent, source[e]), find_root(parent, target[e])
            if one != other:
                join_sets(parent, size, one, other)
    return label_sets(parent, size)


@njit(cache=True)
def _count_inside(source: Any, target: Any, component: Any) -> Any:
    """The number of pairs within each component."""
    found = np.zeros(component.max() + 1 if len(component) else 0, np.int64)
    for e in range(len(source)):
        own = component[source[e]]
        if own >= 0 and own == component[target[e]]:
            found[own] += 1
    return found


@njit(cache=True)
def _list_inside(
    source: Any, target: Any, component: Any, batch: Any, free: Any, chosen: Any
) -> None:
    """Write the positions of the pairs within components, a batch after the other, ascending.

    free : where each batch begins; it is written to.
    """
    for e in range(len(source)):
        own = component[source[e]]
        if own >= 0 and own == component[target[e]]:
            chosen[free[batch[own]]] = e
            free[batch[own]] += 1


@njit(cache=True)
def _label_rows(merge: Any, count: int) -> Any:
    """Labels of the groups that a list of merges makes."""
    parent = np.arange(count)
    size = np.ones(count, np.int64)
    for i in range(len(merge)):
        join_sets(parent, size, find_root(parent, merge[i, 0]), find_root(parent, merge[i, 1]))
    return label_sets(parent, size)


# The graph of groups. A group is named by one of its rows; an edge joins two groups.
#
#   edge[e]      low < high      the groups it joins; low is -1 once another edge absorbed it
#                total, weight   fixed-point log-odds and listings of the pairs behind it, summed
#   table        hash of (low, high) -> e, open addressing; the slots of renamed and of absorbed
#                edges stay filled until the table is rehashed
#   group[x]     first, last     ends of its list of cells, linked by next_cell
#                size            its rows
#   cell         2e and 2e + 1   edge e in the lists of the two groups it joins
#   heap         (mean, low, high), best first; an entry is stale once the edge between the two
#                groups is gone or has another mean

_EDGE = np.dtype([("low", "i8"), ("high", "i8"), ("total", "i8"), ("weight", "i8")])
_GROUP = np.dtype([("first", "i8"), ("last", "i8"), ("size", "i8")])
_ENTRY = np.dtype([("mean", "f8"), ("low", "i8"), ("high", "i8")])


class _Graph(NamedTuple):
    edge: np.ndarray
    group: np.ndarray
    table: np.ndarray
    next_cell: np.ndarray


def _make_edges(pairs: PairTable, fixed: np.ndarray) -> np.ndarray:
    """Each pair as the edge between two groups of one row; fixed : (m,) int64 log-odds."""
    edge = np.empty(len(pairs), _EDGE)
    edge["low"], edge["high"], edge["weight"] = pairs.source, pairs.target, pairs.weight
    edge["total"] = fixed * edge["weight"]
    return edge


@njit(cache=True)
def _build_graph(edge: Any, group: Any) -> Any:
    capacity = 16
    while capacity < 2 * len(edge):
        capacity *= 2
    graph = _Graph(edge, group, np.empty(capacity, np.int32), np.full(2 * len(edge), -1, np.int64))
    for x in range(len(group)):
        group[x].first = group[x].last = -1
        group[x].size = 1
    for e in range(len(edge)):
        _append_cell(graph, edge[e].low, 2 * e)
        _append_cell(graph, edge[e].high, 2 * e + 1)
    return graph


@njit(cache=True)
def _append_cell(graph: Any, x: int, cell: int) -> None:
    """Add an edge's cell to the end of group x's list."""
    group = graph.group[x]
    if group.first < 0:
        group.first = cell
    else:
        graph.next_cell[group.last] = cell
    group.last = cell


@njit(cache=True)
def _rehash(edge: Any, table: Any) -> int:
    """Fill the table with the edges that are not absorbed; returns the number of filled slots."""
    table[:] = -1
    filled = 0
    for e in range(len(edge)):
        if edge[e].low >= 0:
            table[_find_slot(edge, table, edge[e].low, edge[e].high)] = e
            filled += 1
    return filled


@njit(cache=True)
def _find_slot(edge: Any, table: Any, low: int, high: int) -> Any:
    """The slot of the edge between groups low < high, or the free one it would take."""
    mask = np.uint64(len(table) - 1)
    key = (np.uint64(low) * np.uint64(0x9E3779B97F4A7C15)) ^ (
        np.uint64(high) * np.uint64(0xC2B2AE3D27D4EB4F)
    )
    key ^= key >> np.uint64(29)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(32)
    slot = key & mask
    while table[slot] >= 0:
        found = edge[table[slot]]
        if found.low == low and found.high == high:
            break
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot)


@njit(cache=True)
def _find_edge(edge: Any, table: Any, low: int, high: int) -> Any:
    """The edge between groups low < high, or -1."""
    return np.int64(table[_find_slot(edge, table, low, high)])


@njit(cache=True)
def _measure_mean(edge: Any, e: int) -> float:
    """Mean log-odds of the pairs behind edge e."""
    return edge[e].total / SCALE / edge[e].weight


@njit(cache=True)
def _build_heap(edge: Any, stop: float) -> Any:
    """Entries of the edges whose mean exceeds `stop`, and how many they are."""
    heap = np.empty(len(edge) + 16, _ENTRY)
    length = 0
    for e in range(len(edge)):
        mean = _measure_mean(edge, e)
        if mean > stop:
            _write(heap, length, mean, edge[e].low, edge[e].high)
            length += 1
    for place in range(length // 2 - 1, -1, -1):
        _sift_down(heap, length, place)
    return heap, length


@njit(cache=True)
def _is_better(mean: float, low: int, high: int, entry: Any) -> bool:
    """Whether (mean, low, high) goes before an entry: higher mean, then smaller names."""
    if mean != entry.mean:
        return mean > entry.mean
    if low != entry.low:
        return low < entry.low
    return high < entry.high


@njit(cache=True)
def _write(heap: Any, place: int, mean: float, low: int, high: int) -> None:
    heap[place].mean = mean
    heap[place].low = low
    heap[place].high = high


@njit(cache=True)
def _sift_down(heap: Any, length: int, place: int) -> None:
    mean, low, high = heap[place].mean, heap[place].low, heap[place].high
    while 2 * place + 1 < length:
        child = 2 * place + 1
        right = child + 1
        if right < length and _is_better(
            heap[right].mean, heap[right].low, heap[right].high, heap[child]
        ):
            child = right
        if _is_better(mean, low, high, heap[child]):
            break
        _write(heap, place, heap[child].mean, heap[child].low, heap[child].high)
        place = child
    _write(heap, place, mean, low, high)


@njit(cache=True)
def _push(heap: Any, length: int, mean: float, low: int, high: int) -> None:
    """Add an entry to the `length` ones of a heap that has room for it."""
    place = length
    while place > 0:
        parent = (place - 1) // 2
        if not _is_better(mean, low, high, heap[parent]):
            break
        _write(heap, place, heap[parent].mean, heap[parent].low, heap[parent].high)
        place = parent
    _write(heap, place, mean, low, high)


@njit(cache=True)
def _pop(heap: Any, length: int) -> Any:
    """Remove the best of `length` entries and return its (mean, low, high)."""
    mean, low, high = heap[0].mean, heap[0].low, heap[0].high
    last = length - 1
    _write(heap, 0, heap[last].mean, heap[last].low, heap[last].high)
    _sift_down(heap, last, 0)
    return mean, low, high


@njit(cache=True)
def _move_edge(graph: Any, cell: int, gone: int, keeper: int) -> Any:
    """Move an edge of group `gone` to `keeper`.

    Returns the edge that stands between `keeper` and the third group then, and whether it took a
    new slot: it is another one where that had joined the two already and absorbs the moved one.
    """
    e = cell >> 1
    edge = graph.edge[e]
    other = edge.high if edge.low == gone else edge.low
    low, high = min(keeper, other), max(keeper, other)
    slot = _find_slot(graph.edge, graph.table, low, high)
    kept = np.int64(graph.table[slot])
    if kept >= 0:
        graph.edge[kept].total += edge.total
        graph.edge[kept].weight += edge.weight
        edge.low = -1
        return kept, False
    edge.low, edge.high = low, high
    graph.table[slot] = e
    graph.next_cell[cell] = -1
    _append_cell(graph, keeper, cell)
    return e, True


@njit(cache=True)
def _join_groups(graph: Any, e: int, one: int, other: int) -> Any:
    """Join the two groups of edge e; returns the one that keeps its name, and the other."""
    graph.edge[e].low = -1
    if graph.group[one].size < graph.group[other].size:
        one, other = other, one
    graph.group[one].size += graph.group[other].size
    return one, other


@njit(cache=True)
def _agglomerate(edge: Any, count: int, stop: float, max_size: int) -> Any:
    """Merges and heights; `edge` describes the pairs and is overwritten."""
    graph = _build_graph(edge, np.empty(count, _GROUP))
    filled = _rehash(edge, graph.table)
    heap, length = _build_heap(edge, stop)
    merge = np.empty((max(count - 1, 0), 2), np.int64)
    height = np.empty(max(count - 1, 0), np.float64)
    merges = 0
    while length > 0:
        mean, one, other = _pop(heap, length)
        length -= 1
        e = _find_edge(edge, graph.table, one, other)
        if e < 0 or _measure_mean(edge, e) != mean:
            continue
        if graph.group[one].size + graph.group[other].size > max_size:
            continue
        merge[merges, 0], merge[merges, 1], height[merges] = one, other, mean
        merges += 1
        keeper, gone = _join_groups(graph, e, one, other)
        cell = graph.group[gone].first
        while cell >= 0:
            after = graph.next_cell[cell]
            if edge[cell >> 1].low >= 0:
                e, is_new = _move_edge(graph, cell, gone, keeper)
                mean = _measure_mean(edge, e)
                if mean > stop:
                    if length == len(heap):
                        heap = np.concatenate((heap, np.empty_like(heap)))
                    _push(heap, length, mean, edge[e].low, edge[e].high)
                    length += 1
                filled += is_new
                if filled * 10 > 7 * len(graph.table):
                    filled = _rehash(edge, graph.table)
            cell = after
    return merge[:merges], height[:merges]
