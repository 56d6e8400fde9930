"""Soft labels: diffusion of pseudo-labels over the consensus graph, as weights of several labels.

A hard label is one class at full confidence. Diffusion mixes into each image the labels of its
graph neighbours: an image between two clusters gets a share of both, one without a label gets those
of its neighbours.

The contract:
- Enters: labels, and the pairs with their probabilities. Leaves: (row, label, weight), sorted by
  row, then descending weight (ties: smaller label); the weights of a row sum to 1.
- A row that no label reaches has no entry. A cluster without edges to others keeps its label at
  weight 1.
- Labels that get less than `min_weight` at some step are dropped there, so that a row holds a few
  labels however large its component is. No randomness.

Source: paper section 3.3 (soft labels: depth 5, decay .6); walks are normalised by row (ours: with
raw probabilities an identity with more images would get more weight).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from cdp.arrays.threads import list_blocks
from cdp.errors import ConfigError
from cdp.propagation.scored_pairs import check_probability, take_pairs
from cdp.types import UNLABELLED, PairTable

DEPTH = 5
DECAY = 0.6
MIN_WEIGHT = 0.01


@dataclass(frozen=True)
class SoftLabels:
    """Sparse weights: row : (e,) int64. label : (e,) int64. weight : (e,) float32 in (0, 1]."""

    row: np.ndarray
    label: np.ndarray
    weight: np.ndarray


def diffuse_labels(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    *,
    threshold: float = 0.5,
    depth: int = DEPTH,
    decay: float = DECAY,
    min_weight: float = MIN_WEIGHT,
) -> SoftLabels:
    """Spread pseudo-labels along the consensus graph.

    A random walk leaves a row for a neighbour with a probability proportional to the pair's; the
    label it meets after t steps weighs decay ** t. With P the row-normalised graph and Y the labels
    one-hot, weights are the rows of sum over t <= depth of decay ** t P ** t Y, normalised.

    Parameters
    ----------
    label : (n,) int64, -1 none.
    pairs : the candidate pairs, rows in 0 .. n - 1.
    probability : (m,) float in [0, 1]; pairs above `threshold` are the graph's edges.
    depth : steps, at least 0; at 0 the labels themselves come back.
    decay : in [0, 1].
    min_weight : in [0, 1), share of a row below which a label is dropped.

    Raises
    ------
    ConfigError
        A setting out of range.
    DataError
        Lengths that differ, or a probability outside [0, 1].

    Examples
    --------
    The third image lies between two clusters, nearer to the first:

    >>> import numpy as np
    >>> pairs = PairTable(np.array([0, 1, 2]), np.array([1, 2, 3]))
    >>> found = diffuse_labels(np.array([0, 0, 0, 1]), pairs, np.array([0.9, 0.9, 0.6]), depth=1)
    >>> found.row[2:4], found.label[2:4], found.weight[2:4].round(2)
    (array([2, 2]), array([0, 1]), array([0.85, 0.15], dtype=float32))
    """
    if depth < 0 or not 0 <= decay <= 1 or not 0 <= min_weight < 1:
        raise ConfigError(
            f"soft labels: expected depth >= 0, decay in [0, 1] and min_weight in [0, 1), got "
            f"{depth}, {decay} and {min_weight}"
        )
    label, value = np.asarray(label), check_probability(probability, len(pairs))
    total = step = _encode_labels(label)
    graph = _normalise_graph(pairs, value, threshold, len(label))
    for _ in range(depth):
        step = _drop_small(decay * (graph @ step), min_weight)
        total = total + step
    return _list_shares(sparse.csr_array(total), min_weight)


def repeat_rows(soft: SoftLabels, group: np.ndarray) -> SoftLabels:
    """The soft labels of every row from those of groups of rows, each row with its group's.

    group : (n,) int64, the group of each row, numbered as the rows of `soft`.
    """
    count = np.bincount(soft.row, minlength=int(group.max(initial=-1)) + 1)
    start = np.cumsum(count) - count
    row = np.repeat(np.arange(len(group)), count[group])
    first = np.cumsum(count[group]) - count[group]
    entry = start[group[row]] + np.arange(len(row)) - first[row]
    return SoftLabels(row, soft.label[entry], soft.weight[entry])


def _encode_labels(label: np.ndarray) -> sparse.csr_array:
    """(n, clusters) one-hot labels; a row without label is empty."""
    known = np.flatnonzero(label != UNLABELLED)
    clusters = int(label.max(initial=UNLABELLED)) + 1
    return sparse.csr_array(
        (np.ones(len(known)), (known, label[known])), shape=(len(label), max(clusters, 1))
    )


def _normalise_graph(
    pairs: PairTable, value: np.ndarray, threshold: float, count: int
) -> sparse.csr_array:
    """(n, n) probabilities of the pairs above `threshold`, each row divided by its sum."""
    edge = value > threshold
    few, weight = take_pairs(PairTable(pairs.source, pairs.target), value, edge)
    graph = sparse.csr_array((weight, (few.source, few.target)), shape=(count, count))
    graph = sparse.csr_array(graph + graph.T)
    degree = np.asarray(graph.sum(axis=1)).ravel()
    scale, start = 1 / np.maximum(degree, 1e-12), graph.indptr
    for rows in list_blocks(0, count):
        entries = slice(start[rows.start], start[rows.stop])
        graph.data[entries] *= np.repeat(scale[rows], np.diff(start[rows.start : rows.stop + 1]))
    return graph


def _list_shares(total: sparse.csr_array, min_weight: float) -> SoftLabels:
    """Weights above `min_weight` as shares of their row, sorted and summing to 1."""
    count = total.shape[0]
    summed = np.asarray(total.sum(axis=1)).ravel()
    row = np.repeat(np.arange(count), np.diff(total.indptr))
    share = total.data / summed[row]
    kept = share >= min_weight
    row, found, share = row[kept], total.indices[kept].astype(np.int64), share[kept]
    order = np.lexsort((found, -share, row))
    row, found, share = row[order], found[order], share[order]
    share /= np.bincount(row, share, count)[row]
    return SoftLabels(row.astype(np.int64), found, share.astype(np.float32))


def _drop_small(step: sparse.csr_array, min_weight: float) -> sparse.csr_array:
    """Drop the entries below a share of their row's sum."""
    step = sparse.csr_array(step)
    summed = np.asarray(step.sum(axis=1)).ravel()
    row = np.repeat(np.arange(step.shape[0]), np.diff(step.indptr))
    step.data[step.data < min_weight * summed[row]] = 0
    step.eliminate_zeros()
    return step
