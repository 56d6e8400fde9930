"""Pair features: cosines, neighbour ranks and graph overlap of a pair in N + 1 views.

The contract:
- Views are (n, d_v) embeddings of the same n rows; d_v may differ. `graphs[0]` and `views[0]` are
  the base, the others the N committee members, in one order everywhere.
- A view or a graph may be given as a function that loads it. One view and one graph are held at a
  time, so peak memory is those of one view, and the features.
- Features are float32 and their order is that of `name_features`. Any part of the pairs, in any
  process, with any number of threads, gets the same bits.
- "Edge" means: either row is among the other's k neighbours.

Source: paper section 3.3 (`paper`), the authors' code (`released`), ours (`extended`: `paper`, the
overlap of the neighbour lists in every view, which separates a look-alike from a second image of
the identity, and the cosine after within-class covariance normalisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import make_unit, measure_pairs
from cdp.arrays.threads import count_threads
from cdp.errors import ConfigError, DataError
from cdp.types import Graph, PairTable, View, load_graph, load_view

VARIANTS = ("paper", "released", "extended")

_BLOCK = 1 << 16

_PER_MEMBER = {"relationship": ("relationship",)}
_PER_VIEW = {
    "affinity": ("affinity",),
    "distribution": ("mean_source", "variance_source", "mean_target", "variance_target"),
    "common": ("common_neighbours",),
    "overlap": ("neighbour_overlap",),
    "shares": ("common_share", "rank_share_in_source", "rank_share_in_target"),
}
_PER_PAIR = {"wccn": ("wccn_cosine",)}
_GROUPS = {
    "paper": ("relationship", "affinity", "distribution"),
    "released": ("relationship", "affinity", "common"),
    "extended": ("relationship", "affinity", "distribution", "overlap", "shares", "wccn"),
}


def name_features(member_count: int, variant: str = "paper") -> list[str]:
    """Name the columns of `describe_pairs`, in order; the number at the end is the view.

    Parameters
    ----------
    member_count : committee members N, the base not counted.
    variant : with M = N + 1 views
        - "paper", 6N + 5: `relationship` of members 1 .. N (1 where the pair is an edge of the
          member's graph); `affinity` of views 0 .. N (cosine); then for each view the mean and
          population variance of the cosines from the source to its neighbours, and of the target.
        - "released", 3N + 2: `relationship`, `affinity`, and `common_neighbours` of views 0 .. N
          (how many rows both lists hold; as there, a list holds the row itself too, which graphs
          here leave out: its lists of k = 15 are graphs of k = 14).
        - "extended", 10N + 10: all of "paper"; for each view `neighbour_overlap` (common over
          united neighbours, in [0, 1]); for each view, in shares of k, `common_share` (rows that
          are neighbours of both) and the rank of the target among the source's neighbours and of
          the source among the target's (0 nearest; 1 where absent), so that a mediator trained at
          one k serves at another (`cdp.mediator.curriculum`); and once `wccn_cosine`, the cosine
          over all views after whitening (`cdp.committee.wccn`).

    Raises
    ------
    ConfigError
        Unknown variant, or a negative number of members.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"feature variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if member_count < 0:
        raise ConfigError(f"the committee must have 0 or more members, got {member_count}")
    names: list[str] = []
    for group in _GROUPS[variant]:
        if group in _PER_PAIR:
            names += _PER_PAIR[group]
            continue
        columns = _PER_VIEW[group] if group in _PER_VIEW else _PER_MEMBER[group]
        for view in range(0 if group in _PER_VIEW else 1, member_count + 1):
            names += [f"{name}_{view}" for name in columns]
    return names


def count_features(member_count: int, variant: str = "paper") -> int:
    """Count the columns of `describe_pairs`: 6N + 5, 3N + 2 or 10N + 10. Errors as there."""
    return len(name_features(member_count, variant))


def describe_pairs(
    views: Sequence[View],
    graphs: Sequence[Graph],
    pairs: PairTable,
    *,
    variant: str = "paper",
    rows: slice | None = None,
    affinity: np.ndarray | None = None,
    wccn: np.ndarray | None = None,
    threads: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the features of pairs.

    Parameters
    ----------
    views : N + 1 embeddings (n, d_v), or functions that load them; unused when `affinity` is given.
    graphs : N + 1 kNN graphs over the same rows, or functions that load them. Lists may name rows
        outside, from n on: they count as neighbours.
    pairs : the pairs; their order does not matter, sorted by source is fastest.
    variant : see `name_features`.
    rows : describe only this contiguous slice of the pairs.
    affinity : (len(pairs), N + 1) float32 from `measure_affinity`, memory-mapped perhaps: with it
        the pairs can be described block by block without reading a view again.
    wccn : (len(pairs),) float32, the cosine of each pair after whitening, from `Wccn.measure` or
        `cdp.committee.wccn.measure_cosines`; "extended" needs it, the others have no such column.
    threads : at most so many; None: all cores. Never changes the result.
    out : (m, F) float32 array to fill and return.

    Returns
    -------
    features : (m, F) float32, m the pairs of `rows`.

    Raises
    ------
    ConfigError
        Unknown variant.
    DataError
        Views, graphs and pairs do not belong together, a view holds a bad vector, or `wccn` is
        missing or not wanted.
    """
    names = name_features(len(graphs) - 1, variant)
    if affinity is None and len(views) != len(graphs):
        raise DataError(f"expected one graph a view, got {len(views)} views, {len(graphs)} graphs")
    if affinity is not None and affinity.shape != (len(pairs), len(graphs)):
        raise DataError(
            f"affinity must have shape {(len(pairs), len(graphs))}, got {affinity.shape}"
        )
    _check_wccn(wccn, len(pairs), variant)
    part = rows or slice(None)
    source, target = pairs.source[part], pairs.target[part]
    shape = (len(source), len(names))
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise DataError(f"out must be float32 of shape {shape}, got {out.dtype} {out.shape}")
    column = {name: position for position, name in enumerate(names)}
    workers = count_threads(threads)
    for view, given in enumerate(graphs):
        graph = load_graph(given)
        if len(source) and max(source.max(), target.max()) >= len(graph):
            raise DataError(
                f"the pairs name row {max(source.max(), target.max())}, graph {view} has "
                f"{len(graph)} rows"
            )
        if affinity is None:
            unit = _load_view(views[view], len(graph), view)
            measure_pairs(unit, source, target, out[:, column[f"affinity_{view}"]], workers)
            del unit
        else:
            out[:, column[f"affinity_{view}"]] = affinity[part, view]
        places = np.array(
            [
                column.get(f"{name}_{view}", -1)
                for name in (
                    "relationship",
                    "mean_source",
                    "common_neighbours",
                    "neighbour_overlap",
                    "common_share",
                )
            ]
        )
        if (places >= 0).any():
            mean, variance = _summarise(graph.neighbour, graph.similarity)
            _describe(graph.neighbour, mean, variance, source, target, places, out, workers)
    if wccn is not None:
        out[:, column["wccn_cosine"]] = wccn[part]
    return out


def measure_affinity(
    view: View,
    pairs: PairTable,
    *,
    out: np.ndarray | None = None,
    threads: int | None = None,
) -> np.ndarray:
    """Measure the cosine of each pair in one view.

    Returns
    -------
    affinity : (m,) float32 in [-1, 1]; `out` if given (a column of a scratch array, say).

    Raises
    ------
    DataError
        A bad vector, or a pair names a row that the view does not have.
    """
    unit = _load_view(view, None, 0)
    if len(pairs) and max(pairs.source.max(), pairs.target.max()) >= len(unit):
        raise DataError(
            f"the pairs name row {max(pairs.source.max(), pairs.target.max())}, the view has "
            f"{len(unit)} rows"
        )
    result = np.empty(len(pairs), np.float32) if out is None else out
    return measure_pairs(unit, pairs.source, pairs.target, result, count_threads(threads))


def _check_wccn(wccn: np.ndarray | None, count: int, variant: str) -> None:
    wanted = "wccn" in _GROUPS[variant]
    if wanted and (wccn is None or wccn.shape != (count,)):
        raise DataError(
            f"the features {variant!r} contain the cosine after whitening: give wccn of shape "
            f"({count},), one a pair, got {None if wccn is None else wccn.shape}"
        )
    if wccn is not None and not wanted:
        raise DataError(f"the features {variant!r} have no column for wccn; leave it out")


def _load_view(view: View, count: int | None, number: int) -> np.ndarray:
    try:
        unit, _ = make_unit(load_view(view))
    except DataError as error:
        raise DataError(f"view {number}: {error}") from error
    if count is not None and len(unit) != count:
        raise DataError(f"view {number} has {len(unit)} rows, its graph {count}")
    return unit


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]


def _describe(
    neighbour: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    places: np.ndarray,
    out: np.ndarray,
    workers: int,
) -> None:
    reach = max(int(neighbour.max(initial=-1)) + 1, len(neighbour))

    def work(part: slice) -> None:
        _fill(neighbour, reach, mean, variance, source[part], target[part], places, out[part])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, _blocks(len(source))))


@njit(cache=True, nogil=True)
def _summarise(neighbour: Any, similarity: Any) -> Any:
    """Mean and population variance of each row's cosines; 0 and 0 for a row without neighbours."""
    count, width = neighbour.shape
    mean = np.zeros(count, np.float32)
    variance = np.zeros(count, np.float32)
    for row in range(count):
        total, size = 0.0, 0
        for position in range(width):
            if neighbour[row, position] >= 0:
                total += similarity[row, position]
                size += 1
        if size:
            centre = total / size
            spread = 0.0
            for position in range(width):
                if neighbour[row, position] >= 0:
                    spread += (similarity[row, position] - centre) ** 2
            mean[row] = centre
            variance[row] = spread / size
    return mean, variance


@njit(cache=True, nogil=True)
def _fill(
    neighbour: Any,
    reach: int,
    mean: Any,
    variance: Any,
    source: Any,
    target: Any,
    places: Any,
    out: Any,
) -> None:
    """Fill one view's columns that need only its graph; a place of -1 is not asked for.

    reach : above every row number in the lists.
    """
    width = neighbour.shape[1]
    relationship, distribution, common, overlap, shares = places
    owner = np.full(reach, -1, np.int64)
    position_of = np.empty(reach, np.int32)
    listed = -1
    listed_size = 0
    for i in range(len(source)):
        one, other = source[i], target[i]
        if one != listed:
            listed = one
            listed_size = 0
            for position in range(width):
                near = neighbour[one, position]
                if near >= 0:
                    owner[near] = one
                    position_of[near] = position
                    listed_size += 1
        shared, size, rank_in_target = 0, 0, width
        for position in range(width):
            near = neighbour[other, position]
            if near < 0:
                break
            size += 1
            if owner[near] == one:
                shared += 1
            if near == one:
                rank_in_target = position
        rank_in_source = position_of[other] if owner[other] == one else width
        if relationship >= 0:
            edge = rank_in_source < width or rank_in_target < width
            out[i, relationship] = 1.0 if edge else 0.0
        if distribution >= 0:
            out[i, distribution] = mean[one]
            out[i, distribution + 1] = variance[one]
            out[i, distribution + 2] = mean[other]
            out[i, distribution + 3] = variance[other]
        if common >= 0:
            # each list of the released code holds the row itself too
            out[i, common] = shared + (rank_in_source < width) + (rank_in_target < width)
        if overlap >= 0:
            union = listed_size + size - shared
            out[i, overlap] = shared / union if union else 0.0
        if shares >= 0:
            out[i, shares] = shared / width
            out[i, shares + 1] = rank_in_source / width
            out[i, shares + 2] = rank_in_target / width
