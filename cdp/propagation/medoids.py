"""Medoids: of each cluster the image that stands for it, central and of good quality.

The contract:
- A cluster's medoid is one of its rows: of those nearly as central as the most central one the row
  of the best quality, or, where no quality is known, the most central one itself.
- Of equal rows the first. The result does not depend on the order of the pairs.
"""

from __future__ import annotations

import numpy as np

from cdp.types import UNLABELLED, PairTable

NEARLY = 0.8
"""Share of the largest summed probability of a cluster from which on a row is central."""


def choose_medoids(
    pairs: PairTable,
    probability: np.ndarray,
    label: np.ndarray,
    quality: np.ndarray | None = None,
) -> np.ndarray:
    """The medoid of each cluster.

    Source: ours.

    Parameters
    ----------
    pairs : candidate pairs of n rows; those inside a cluster count.
    probability : (m,) float, 0 or above.
    label : (n,) int64, clusters numbered from 0 without gaps, -1 for none.
    quality : (n,) float or None
        Any scale, more is better; NaN where it is not known, which is worse than any.

    Returns
    -------
    medoid : (clusters,) int64, rows.
    """
    inside = (label[pairs.source] == label[pairs.target]) & (label[pairs.source] != UNLABELLED)
    weight = probability[inside].astype(np.float64)
    summed = np.bincount(pairs.source[inside], weight, len(label))
    summed += np.bincount(pairs.target[inside], weight, len(label))
    members = np.flatnonzero(label != UNLABELLED)
    own = label[members]
    clusters = int(own.max(initial=UNLABELLED)) + 1
    value = summed[members]
    rank: tuple[np.ndarray, ...] = (-value,)
    if quality is not None:
        most = np.zeros(clusters)
        np.maximum.at(most, own, value)
        central = value >= NEARLY * most[own]
        worth = np.where(central, np.nan_to_num(quality[members], nan=-np.inf), -np.inf)
        rank = (-value, -worth, ~central)
    order = members[np.lexsort((members, *rank, own))]
    return np.asarray(order[np.searchsorted(label[order], np.arange(clusters))])
