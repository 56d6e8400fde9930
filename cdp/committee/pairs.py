"""Candidate pairs: the edges of the k-NN graphs, how many lists contain each, and votes.

The contract:
- `graphs[0]` is the base's, the others are the N committee members', in one order everywhere.
- A graph may be given as a function that loads it; one graph is held at a time.
- "Edge" means: either row is among the other's k neighbours.

Source: paper section 3.3; pairs of all graphs are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import njit

from cdp.errors import ConfigError, DataError
from cdp.types import Graph, PairTable, load_graph

CANDIDATES = ("base", "all")


def choose_candidates(method: str) -> str:
    """The default `candidates` of a method: "all" with "extended" features, else "base" (paper)."""
    return "all" if method == "extended" else "base"


def check_candidates(candidates: str) -> None:
    """ConfigError unless it is one of `CANDIDATES`."""
    if candidates not in CANDIDATES:
        raise ConfigError(f"candidates must be one of {', '.join(CANDIDATES)}, got {candidates!r}")


def make_pairs(
    graphs: Sequence[Graph], *, candidates: str = "base", rows: slice | None = None
) -> PairTable:
    """List the candidate pairs: the edges of the base graph, or of all graphs.

    Parameters
    ----------
    graphs : one a view, the base first. A row outside, from n on, makes no pair.
    candidates : "base" (paper) or "all" (ours: finds pairs that the base alone misses).
    rows : only pairs whose source lies in this contiguous slice; the parts put together, in order,
        equal the whole.

    Returns
    -------
    PairTable
        Unordered, unique, no row with itself; `listings` counts the lists of all graphs.

    Raises
    ------
    ConfigError
        Unknown `candidates`.
    DataError
        No graph, or graphs over different numbers of rows.
    """
    check_candidates(candidates)
    if not graphs:
        raise DataError("make_pairs expects at least the base graph, got none")
    chosen = graphs[:1] if candidates == "base" else graphs
    offset = np.zeros(0, np.int64)
    target = np.zeros(0, np.int64)
    for number, graph in enumerate(chosen):
        neighbour = load_graph(graph).neighbour
        if number == 0:
            first, last, stride = (rows or slice(None)).indices(len(neighbour))
            if stride != 1:
                raise ConfigError(f"rows must be a contiguous slice, got {rows}")
            last = max(first, last)
            offset = np.zeros(last - first + 1, np.int64)
            count = len(neighbour)
        elif len(neighbour) != count:
            raise DataError(f"graph 0 has {count} rows, graph {number} has {len(neighbour)}")
        offset, target = _add_edges(neighbour, first, last, offset, target)
    source = np.repeat(np.arange(first, first + len(offset) - 1), np.diff(offset))
    listings = np.zeros(len(source), np.int32)
    for graph in graphs:
        _add_listings(load_graph(graph).neighbour, source, target, listings)
    return PairTable(source, target, listings)


def vote_pairs(graphs: Sequence[Graph], pairs: PairTable) -> np.ndarray:
    """Count the committee members whose graph has the pair as an edge; the base has no vote.

    Returns
    -------
    votes : (m,) int32 in 0 .. N.
    """
    votes = np.zeros(len(pairs), np.int32)
    for graph in graphs[1:]:
        _add_votes(load_graph(graph).neighbour, pairs.source, pairs.target, votes)
    return votes


@njit(cache=True, nogil=True)
def _add_edges(neighbour: Any, first: int, last: int, offset: Any, target: Any) -> Any:
    """Merge a graph's edges with source in first .. last - 1 into sorted lists of targets."""
    size = last - first
    fill = np.zeros(size + 1, np.int64)
    for row in range(len(neighbour)):
        for other in neighbour[row]:
            low = min(row, other)
            if 0 <= other < len(neighbour) and other != row and first <= low < last:
                fill[low - first + 1] += 1
    for i in range(size):
        fill[i + 1] += fill[i] + (offset[i + 1] - offset[i])
    start = fill.copy()
    merged = np.empty(fill[size], np.int64)
    for i in range(size):
        for position in range(offset[i], offset[i + 1]):
            merged[fill[i]] = target[position]
            fill[i] += 1
    for row in range(len(neighbour)):
        for other in neighbour[row]:
            low = min(row, other)
            if 0 <= other < len(neighbour) and other != row and first <= low < last:
                merged[fill[low - first]] = max(row, other)
                fill[low - first] += 1
    unique = np.zeros(size + 1, np.int64)
    kept = 0
    for i in range(size):
        part = merged[start[i] : start[i + 1]]
        part.sort()
        for position in range(len(part)):
            if position == 0 or part[position] != part[position - 1]:
                # kept never passes the position being read
                merged[kept] = part[position]
                kept += 1
        unique[i + 1] = kept
    return unique, merged[:kept].copy()


@njit(cache=True, nogil=True)
def _add_listings(neighbour: Any, source: Any, target: Any, listings: Any) -> None:
    for i in range(len(source)):
        one, other = source[i], target[i]
        for position in range(neighbour.shape[1]):
            listings[i] += neighbour[one, position] == other
            listings[i] += neighbour[other, position] == one


@njit(cache=True, nogil=True)
def _add_votes(neighbour: Any, source: Any, target: Any, votes: Any) -> None:
    for i in range(len(source)):
        one, other = source[i], target[i]
        for position in range(neighbour.shape[1]):
            if neighbour[one, position] == other or neighbour[other, position] == one:
                votes[i] += 1
                break
