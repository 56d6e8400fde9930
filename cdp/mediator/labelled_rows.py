"""The labelled rows a pair scorer is trained on: a bounded choice, one of each near-equal group.

The contract:
- Enters: labelled views and identities. Leaves: ascending rows of whole identities, at most
  `cdp.mediator.curriculum.LABELLED_ROWS`, and the near-equal rows that were found.
- Near-equal rows are looked for among the chosen rows first. Only where there are any all rows are
  searched, and the choice is made among the representatives.
- A near-equal group with rows of two identities counts for neither.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.knn.graph import build_knn_graph
from cdp.knn.near_equal import NearEqual, choose_distinct, find_near_equal
from cdp.mediator.curriculum import choose_labelled
from cdp.types import View, load_view

LISTED = 20
"""Neighbours of a row among which near-equal ones are looked for."""


def choose_distinct_labelled(
    views: Sequence[View], identity: np.ndarray, *, seed: int = 0, threads: int | None = None
) -> tuple[np.ndarray, NearEqual | None]:
    """The labelled rows to train on, and the near-equal rows among all, None without any.

    Parameters
    ----------
    views : (n, d_v) arrays or functions that load them, the base first.
    identity : (n,) integers.
    seed : of the choice of identities, and of the search.
    threads : at most so many; None: all cores. Never changes the result.

    Returns
    -------
    rows : (r,) int64, ascending. near : over all n rows.
    """
    rows = choose_labelled(identity, seed=seed)
    chosen = [make_unit(load_view(view)[rows])[0] for view in views]
    if not find_near_rows(chosen, seed, threads).collapsed:
        return rows, None
    near = find_near_rows(views, seed, threads)
    if not near.collapsed:
        return rows, None
    kept = choose_distinct(near, identity)
    return kept[choose_labelled(identity[kept], seed=seed)], near


def find_near_rows(views: Sequence[View], seed: int, threads: int | None) -> NearEqual:
    """The near-equal rows of some views, the base first; parameters as above."""
    graph = build_knn_graph(load_view(views[0]), LISTED, seed=seed, threads=threads)
    return find_near_equal(views, graph, seed=seed)
