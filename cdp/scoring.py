"""Pairs and a fitted mediator -> probabilities, block by block.

The contract: one view is looked at at a time and the features of a block of pairs are all that is
held of them, so peak memory is one view and the pairs. Scores are at the rate of true pairs that
the mediator was trained at; `cdp.prior` moves them to the set's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cdp.committee import describe_pairs, measure_affinity
from cdp.cosine import count_threads
from cdp.discriminant import measure_cosines
from cdp.mediator import Mediator
from cdp.scratch import allocate
from cdp.types import KnnGraph, PairTable

BLOCK = 1 << 18


def score_pairs(
    mediator: Mediator,
    views: Sequence[np.ndarray | Callable[[], np.ndarray]],
    graphs: Sequence[KnnGraph | Callable[[], KnnGraph]],
    pairs: PairTable,
    *,
    threads: int | None = None,
) -> np.ndarray:
    """Score pairs of rows by what the committee knows of them.

    Parameters
    ----------
    views, graphs : one each a model, the base first, or functions that load them.
    pairs : of their rows.

    Returns
    -------
    (m,) float32 in (0, 1).

    Raises
    ------
    DataError
        As `cdp.committee.describe_pairs` and `Mediator.score`.
    """
    workers = count_threads(threads)
    loaded = [graph if isinstance(graph, KnnGraph) else graph() for graph in graphs]
    affinity = allocate((len(views), len(pairs)))
    for number, view in enumerate(views):
        measure_affinity(view, pairs, out=affinity[number], threads=threads)
    found = mediator.discriminant
    if found is not None:
        rows = found.even_out(found.project(views, threads=threads), threads=threads)
        even = measure_cosines(rows, pairs)
        del rows
    scores = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), BLOCK):
        part = slice(start, min(start + BLOCK, len(pairs)))
        features = describe_pairs(
            (),
            loaded,
            pairs,
            variant=mediator.settings.variant,
            rows=part,
            affinity=affinity.T,
            threads=threads,
        )
        if found is not None:
            features = np.column_stack([features, even[part]])
        scores[part] = mediator.score(features, threads=workers)
    return scores
