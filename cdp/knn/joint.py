"""Joint kNN graphs: labelled and unlabelled rows in one graph, from the graph of either set.

The contract:
- Enters: the unit rows of two sets and the kNN graph of each. Leaves: the kNN graph of both sets
  together, restricted to the labelled rows and the unlabelled rows that share a list with one of
  them in any view. No list changes elsewhere, so nothing else is searched.
- Every pair between the sets is compared: if both graphs are exact, so is the joint graph.
- Joint rows are the labelled rows, then the kept unlabelled rows, ascending. A list may name an
  unlabelled row that is not kept; such rows have numbers from the number of joint rows on.
- The same bits for any number of threads.

The k-th similarities of the two graphs are known, so that the upper bound of `cdp.knn.exact` rules
out nearly all pairs between the sets: one matrix product over few axes is most of the work.

Source: ours.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import as_readonly, dot_between, insert_neighbour, make_unit
from cdp.arrays.principal_axes import find_axes
from cdp.arrays.threads import count_threads, limit_blas, list_blocks
from cdp.errors import DataError
from cdp.knn.exact import BOUND_SLACK, bound_rows, choose_axis_count, reaches
from cdp.knn.graph import restrict_graph
from cdp.types import UNLABELLED, Graph, KnnGraph, View, load_graph, load_view, take_rows


@dataclass(frozen=True)
class JointLists:
    """The lists of one view that joining the sets changes.

    labelled : KnnGraph, the lists of all labelled rows. changed : (c,) int64, the unlabelled rows
    that list a labelled one. lists : KnnGraph, theirs. Rows of both are numbered labelled first,
    then all unlabelled ones. count : number of unlabelled rows.
    """

    labelled: KnnGraph
    changed: np.ndarray
    lists: KnnGraph
    count: int

    @property
    def near(self) -> np.ndarray:
        """(count,) bool, the unlabelled rows that share a list with a labelled row."""
        found = np.zeros(self.count, bool)
        found[self.changed] = True
        named = self.labelled.neighbour - len(self.labelled)
        found[named[named >= 0]] = True
        return found


def join_graphs(
    labelled: Sequence[View],
    labelled_graphs: Sequence[Graph],
    unlabelled: Sequence[View],
    unlabelled_graphs: Sequence[Graph],
    *,
    left_out: np.ndarray | None = None,
    threads: int | None = None,
) -> tuple[np.ndarray, list[KnnGraph]]:
    """The joint graph of every view.

    Parameters
    ----------
    labelled, unlabelled : one (n, d_v) array a model, or a function that loads it.
    labelled_graphs, unlabelled_graphs : their graphs, of one k.
    left_out : (u,) bool, unlabelled rows that are treated as if they were not there; None: none.
    threads : at most so many; None: all cores. Never changes the result.

    Returns
    -------
    kept : (r,) int64, the unlabelled rows kept, ascending.
    graphs : one KnnGraph a view over the labelled rows and the kept ones.

    Raises
    ------
    DataError
        Views of different dimensions or a bad vector, or graphs of different k.
    """
    rest = np.arange(len(load_graph(unlabelled_graphs[0])))
    if left_out is not None and left_out.any():
        rest = np.flatnonzero(~left_out)
        unlabelled = [partial(take_rows, view, rest) for view in unlabelled]
        unlabelled_graphs = [
            restrict_graph(load_graph(graph), ~left_out) for graph in unlabelled_graphs
        ]
    found = [
        find_joint_lists(*both, threads=threads)
        for both in zip(labelled, labelled_graphs, unlabelled, unlabelled_graphs, strict=True)
    ]
    kept = np.flatnonzero(np.any([each.near for each in found], axis=0))
    graphs = [
        restrict_lists(each, graph, kept)
        for each, graph in zip(found, unlabelled_graphs, strict=True)
    ]
    return rest[kept], graphs


def find_joint_lists(
    labelled: View,
    labelled_graph: Graph,
    unlabelled: View,
    unlabelled_graph: Graph,
    *,
    threads: int | None = None,
) -> JointLists:
    """Compare every labelled row with every unlabelled one; parameters as of `join_graphs`."""
    left, right = (make_unit(load_view(view))[0] for view in (labelled, unlabelled))
    if left.shape[1] != right.shape[1]:
        raise DataError(
            f"a view has {left.shape[1]} dimensions labelled and {right.shape[1]} unlabelled: "
            "they are not of one model"
        )
    one, other = load_graph(labelled_graph), load_graph(unlabelled_graph)
    if one.k != other.k:
        raise DataError(f"the graphs to join must have one k, got {one.k} and {other.k}")
    near_left, best_left = _copy_lists(one, 0)
    near_right, best_right = _copy_lists(other, len(left))
    if len(left) and len(right):
        sides = (left, near_left, best_left), (right, near_right, best_right)
        _compare_sets(*sides, count_threads(threads))
    changed = np.flatnonzero(((near_right >= 0) & (near_right < len(left))).any(axis=1))
    return JointLists(
        _make_graph(near_left, best_left),
        changed,
        _make_graph(near_right[changed], best_right[changed]),
        len(right),
    )


def restrict_lists(found: JointLists, unlabelled_graph: Graph, kept: np.ndarray) -> KnnGraph:
    """The joint graph of one view over the labelled rows and the `kept` unlabelled ones."""
    graph = take_lists(found, unlabelled_graph, kept)
    first = len(found.labelled)
    joint = first + len(kept)
    number = np.arange(joint, joint + found.count)
    number[kept] = np.arange(first, joint)
    outside = graph.neighbour >= first
    graph.neighbour[outside] = number[graph.neighbour[outside] - first]
    return graph


def take_lists(found: JointLists, unlabelled_graph: Graph, kept: np.ndarray) -> KnnGraph:
    """The same with neighbours numbered as in `JointLists`: labelled, then all unlabelled rows."""
    graph = load_graph(unlabelled_graph)
    first = len(found.labelled)
    neighbour = np.concatenate([found.labelled.neighbour, _copy_lists(graph, first, kept)[0]])
    similarity = np.concatenate([found.labelled.similarity, np.asarray(graph.similarity)[kept]])
    place = first + np.searchsorted(kept, found.changed)
    neighbour[place], similarity[place] = found.lists.neighbour, found.lists.similarity
    return KnnGraph(neighbour, similarity)


def _copy_lists(
    graph: KnnGraph, shift: int, rows: np.ndarray | slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Copies of the lists, rows numbered from `shift` on; -inf is the similarity of padding."""
    neighbour, similarity = np.array(graph.neighbour[rows]), np.array(graph.similarity[rows])
    padded = neighbour == UNLABELLED
    similarity[padded] = -np.inf
    neighbour[~padded] += shift
    return neighbour, similarity


def _make_graph(neighbour: np.ndarray, similarity: np.ndarray) -> KnnGraph:
    return KnnGraph(neighbour, np.where(neighbour == UNLABELLED, np.float32(0), similarity))


Side = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The unit rows of a set, and the neighbours and similarities of their lists, changed in place."""


def _compare_sets(left: Side, right: Side, workers: int) -> None:
    """Insert the pairs between two sets into the lists of both."""
    units = left[0], right[0]
    with limit_blas(), ThreadPoolExecutor(workers) as pool:
        axes = find_axes(units[1])
        floors = left[2][:, -1], right[2][:, -1]
        axes = np.ascontiguousarray(axes[:, : choose_axis_count(*units, axes, *floors)])
        blocks = list_blocks(0, len(units[0]))
        bounds = [bound_rows(units[0][block], axes) for block in blocks]
        locks = [threading.Lock() for _ in blocks]

        def compare(part: slice) -> None:
            own = bound_rows(units[1][part], axes)
            for block, bound, lock in zip(blocks, bounds, locks, strict=True):
                ceiling = own @ bound.T
                with lock:
                    _compare_blocks(
                        ceiling,
                        as_readonly(units[1]),
                        as_readonly(units[0]),
                        part.start,
                        block.start,
                        len(units[0]),
                        *right[1:],
                        *left[1:],
                    )

        list(pool.map(compare, list_blocks(0, len(units[1]))))


@njit(cache=True, nogil=True)
def _compare_blocks(
    ceiling: Any,
    rows: Any,
    columns: Any,
    first: int,
    second: int,
    shift: int,
    near_row: Any,
    best_row: Any,
    near_column: Any,
    best_column: Any,
) -> None:
    """Compare the pairs of two blocks whose bound reaches the k-th best of either row.

    Row `first + i` is numbered `shift + first + i` in the lists, column `second + j` as it is.
    """
    height, span = ceiling.shape
    level = best_column[second : second + span, -1] - BOUND_SLACK
    for i in range(height):
        row = first + i
        own = max(best_row[row, -1] - BOUND_SLACK, np.float32(-3))
        for low in range(0, span, 64):
            high = min(low + 64, span)
            if not reaches(ceiling[i], level, low, high, own):
                continue
            for j in range(low, high):
                if ceiling[i, j] < min(level[j], own):
                    continue
                column = second + j
                value = dot_between(rows, row, columns, column)
                if value >= own:
                    insert_neighbour(near_row[row], best_row[row], column, value)
                    own = max(best_row[row, -1] - BOUND_SLACK, np.float32(-3))
                if value >= level[j]:
                    insert_neighbour(near_column[column], best_column[column], shift + row, value)
                    level[j] = best_column[column, -1] - BOUND_SLACK
