"""Training curriculum of the mediator: resample the labelled identities to match an unlabelled set.

Unlabelled sets are long-tailed: a few identities have hundreds of images, most have one, and there
are more distractors. This changes the k-NN graphs and with them the pair features. Among k = 20
neighbours an identity of five images leaves sixteen places to other identities; of an identity of
five hundred images, two that match hardly ever list each other. A mediator trained on labelled
identities of ordinary size rejects such pairs (measured on LFW at 16 px: pairwise recall .17
instead of .94). It is therefore trained on several resampled versions of the labelled set:

- as it is;
- with a third of the neighbours, where an identity is three times as large relative to k;
- with half, and with four fifths, of the identities reduced to one image, whose best neighbour is
  of another identity;
- together with the unlabelled rows (`JointSet`) as distractors. Labelled and unlabelled images are
  assumed to share no identity, so every pair between them is negative.

The contract:
- Enters: the graphs of the labelled rows and their identities. Leaves: `CurriculumStep`s, the first
  being the rows as they are. No embedding is read and no graph is searched again: neighbours that a
  step leaves out are dropped from the lists, which are then cut to its k.
- Pair features that depend on k must be in shares of k ("paper" and "extended" are, "released" is
  not and is trained on the first step alone).
- The same seed gives the same steps.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cdp.knn.graph import restrict_graph
from cdp.types import Graph, KnnGraph, View, load_graph

CURRICULUM = ((1.0, 0.0), (1 / 3, 0.0), (1.0, 0.5), (1.0, 0.8))
"""Of each step: share of k, and share of the identities reduced to one image."""

LABELLED_ROWS = 3000
"""Labelled rows a pair scorer is trained on, however many there are: see docs/results.md."""


@dataclass(frozen=True)
class JointSet:
    """Labelled and unlabelled rows in one set of graphs (`cdp.knn.joint`).

    views : one (n, d_v) array a model over all rows, or a function that loads it. graphs : theirs;
        a list may name rows outside the set, numbered from n on.
    identity : (n,) int64, -1 for an unlabelled row.
    """

    views: Sequence[View]
    graphs: Sequence[Graph]
    identity: np.ndarray

    def number_rows(self) -> np.ndarray:
        """(n,) int64: the identity of a labelled row, and a unique number below 0 otherwise."""
        return np.where(self.identity < 0, -1 - np.arange(len(self.identity)), self.identity)


@dataclass(frozen=True)
class CurriculumStep:
    """One resampled version of the labelled set.

    rows : (r,) int64, the labelled rows kept. graphs : one a view, over 0 .. r - 1.
    identity : (r,) int64.
    """

    rows: np.ndarray
    graphs: list[KnnGraph]
    identity: np.ndarray


def choose_labelled(
    identity: np.ndarray, *, limit: int = LABELLED_ROWS, seed: int = 0
) -> np.ndarray:
    """The labelled rows to train on: all images of identities drawn at random, at most `limit`.

    Parameters
    ----------
    identity : (n,) integers.
    limit : rows; an identity with more than half of them is cut to that.

    Returns
    -------
    (r,) int64, ascending; all rows where they are no more than the limit.
    """
    if len(identity) <= limit:
        return np.arange(len(identity))
    random = np.random.default_rng([seed, 0x726F7773])
    _, number = np.unique(identity, return_inverse=True)
    order = random.permutation(len(number))
    order = order[np.argsort(number[order], kind="stable")]
    size = np.bincount(number)
    rank = np.arange(len(number)) - np.repeat(np.cumsum(size) - size, size)
    order = order[rank < max(limit // 2, 1)]
    turn = random.permutation(len(size))[number[order]]
    return np.sort(order[np.argsort(turn, kind="stable")][:limit])


def make_curriculum(
    graphs: Sequence[Graph],
    identity: np.ndarray,
    *,
    steps: Sequence[tuple[float, float]] = CURRICULUM,
    seed: int = 0,
) -> list[CurriculumStep]:
    """Resample the labelled set, once for each step.

    Parameters
    ----------
    graphs : one a view over all labelled rows, or a function that loads it.
    identity : (n,) int64.
    steps : of each, share of k in (0, 1], and share of the identities reduced to one image in
        [0, 1].
    """
    loaded = [load_graph(graph) for graph in graphs]
    found = []
    for number, (share, singletons) in enumerate(steps):
        kept = thin_identities(identity, singletons, seed + number)
        smaller = [restrict_graph(graph, kept, max(round(share * graph.k), 1)) for graph in loaded]
        found.append(CurriculumStep(np.flatnonzero(kept), smaller, identity[kept]))
    return found


def thin_identities(identity: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Reduce a share of the identities to one image each.

    Returns
    -------
    (n,) bool, the rows kept. At share 0 all of them.
    """
    random = np.random.default_rng([seed, 0x7468696E])
    _, number = np.unique(identity, return_inverse=True)
    count = int(number.max(initial=-1)) + 1
    chosen = random.permutation(count) < round(share * count)
    order = random.permutation(len(number))
    _, first = np.unique(number[order], return_index=True)
    kept = ~chosen[number]
    kept[order[first]] = True
    return kept
