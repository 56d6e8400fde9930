"""Do the models of a committee find the same neighbours? Else the rows of one are in another order.

The contract:
- Enters: the neighbour graphs of one set, one a model. Leaves: which models share no more
  neighbours with any other than by chance. Rows in another order, or noise, are the causes: every
  model of faces shares some.

Source: ours. Agreement above chance, of each model with the one it agrees with most: .44 to .61 on
LFW at 24 px, .12 to .51 at 12 and 16 px, .06 to .28 with surveillance at 16 px, .0 with rows
shifted by one, and of noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdp.types import UNLABELLED, Graph, load_graph

LEAST_AGREEMENT = 0.02
"""Share of common neighbours above chance, below which a model shares none."""
LEAST_ROWS = 100
"""Of fewer rows chance alone gives more."""
_ROWS = 2000
"""Most rows that are compared."""
_PART = 20
"""Lists are cut to at most one of so many rows, so that chance stays small."""


def measure_agreement(graphs: Sequence[Graph], *, seed: int = 0) -> np.ndarray:
    """Common neighbours above chance of each model and the one it shares most with, (models,).

    1 where lists are the same, about 0 where they have nothing to do with each other. All are 1
    where there is one model, or fewer than `LEAST_ROWS` rows.

    Parameters
    ----------
    graphs : one a model over the same rows, or functions that load them.
    seed : of the sample of rows.
    """
    count = len(load_graph(graphs[0]))
    if len(graphs) < 2 or count < LEAST_ROWS:
        return np.ones(len(graphs))
    rows = np.sort(np.random.default_rng(seed).permutation(count)[:_ROWS])
    k = load_graph(graphs[0]).k
    width = min(k, count // _PART)
    lists = [load_graph(graph).neighbour[rows, :width] for graph in graphs]
    chance = width / (count - 1)
    most = np.full(len(graphs), -np.inf)
    for one in range(len(graphs)):
        for other in range(one):
            equal = lists[one][:, :, None] == lists[other][:, None, :]
            common = (equal.any(axis=2) & (lists[one] != UNLABELLED)).mean()
            agreement = (common - chance) / (1 - chance)
            most[[one, other]] = np.maximum(most[[one, other]], agreement)
    return most


def describe_disagreement(agreement: np.ndarray, names: Sequence[str], rows: str) -> str:
    """Which models share no neighbours with the others, and what to do; "" where all share some.

    Parameters
    ----------
    agreement : from `measure_agreement`. names : of the models. rows : what the set is called.
    """
    odd = [name for name, value in zip(names, agreement, strict=True) if value < LEAST_AGREEMENT]
    if not odd:
        return ""
    return (
        f"among the {rows} the nearest neighbours of {', '.join(odd)} are no neighbours in any "
        "other model: its rows are in another order than those of the others, or its vectors are "
        "noise. Compare the order of its rows with the others', or leave it out"
    )


def describe_one_sided(unlabelled: np.ndarray, labelled: np.ndarray) -> str:
    """Why no quality is estimated where a model agrees with others in one set alone; or "".

    unlabelled, labelled : (models,) each, from `measure_agreement` of the two sets.
    """
    if np.array_equal(unlabelled < LEAST_AGREEMENT, labelled < LEAST_AGREEMENT):
        return ""
    return (
        "a model shares neighbours with the others among the labelled or the unlabelled images "
        "alone, so what was learned on the labelled ones does not hold"
    )
