"""Lessons: labelled people rearranged to be as many and as alone as unlabelled ones may be.

What the neighbourhood of a pair looks like depends on how many images its person has. Among k = 20
neighbours, somebody with five images leaves room for sixteen strangers; of somebody with five
hundred, two images that show him rarely name each other at all. A mediator taught on labelled
people of ordinary size takes the latter for strangers (measured on LFW at 16 px: pairwise recall
.17 instead of .94). So it is taught several times over:

- as they are;
- with a third of the neighbours, where a person is three times as large beside k;
- with half, and with four fifths, of the people reduced to one image: their best neighbour is
  somebody else;
- together with the unlabelled rows (`JointSet`): the more distractors there are, the nearer the
  nearest. Who is unlabelled is nobody of the labelled, so every pair of the two is known to be
  false.

The contract:
- Enters: the graphs of the labelled rows and their identities. Leaves: `CurriculumStep`s, the first
  being the rows as they are. No embedding is looked at and no graph is searched again: neighbours
  that a step leaves out are dropped from the lists, which are then cut to its k.
- Pair features that depend on k must be in shares of k ("paper" and "extended" are, "released" is
  not and takes the first step alone).
- The same seed gives the same steps.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cdp.types import UNLABELLED, KnnGraph

CURRICULUM = ((1.0, 0.0), (1 / 3, 0.0), (1.0, 0.5), (1.0, 0.8))
"""Share of k, and share of the people reduced to one image."""


@dataclass(frozen=True)
class JointSet:
    """Labelled and unlabelled rows searched together.

    views : one (n, d_v) array a model over both, or a function that loads it. graphs : theirs.
    identity : (n,) int64, -1 for an unlabelled row.
    """

    views: Sequence[np.ndarray | Callable[[], np.ndarray]]
    graphs: Sequence[KnnGraph | Callable[[], KnnGraph]]
    identity: np.ndarray

    def name_rows(self) -> np.ndarray:
        """(n,) int64: identities, and for each unlabelled row one of its own below zero."""
        return np.where(self.identity < 0, -1 - np.arange(len(self.identity)), self.identity)


@dataclass(frozen=True)
class CurriculumStep:
    """rows : (r,) int64, the labelled rows that take part. graphs : one a view, over 0 .. r - 1.
    identity : (r,) int64."""

    rows: np.ndarray
    graphs: list[KnnGraph]
    identity: np.ndarray


def make_curriculum(
    graphs: Sequence[KnnGraph | Callable[[], KnnGraph]],
    identity: np.ndarray,
    *,
    steps: Sequence[tuple[float, float]] = CURRICULUM,
    seed: int = 0,
) -> list[CurriculumStep]:
    """Rearrange labelled people.

    Parameters
    ----------
    graphs : one a view over all labelled rows, or a function that loads it.
    identity : (n,) int64.
    steps : share of k in (0, 1], and share of the people reduced to one image in [0, 1], of each.
    """
    loaded = [graph if isinstance(graph, KnnGraph) else graph() for graph in graphs]
    found = []
    for number, (share, alone) in enumerate(steps):
        kept = thin_identities(identity, alone, seed + number)
        rearranged = [_keep_rows(graph, kept, max(round(share * graph.k), 1)) for graph in loaded]
        found.append(CurriculumStep(np.flatnonzero(kept), rearranged, identity[kept]))
    return found


def thin_identities(identity: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Reduce a share of the people to one image each.

    Returns
    -------
    (n,) bool, the rows kept. At share 0 all of them.
    """
    random = np.random.default_rng([seed, 0x7468696E])
    _, person = np.unique(identity, return_inverse=True)
    people = int(person.max(initial=-1)) + 1
    chosen = random.permutation(people) < round(share * people)
    order = random.permutation(len(person))
    _, first = np.unique(person[order], return_index=True)
    kept = ~chosen[person]
    kept[order[first]] = True
    return kept


def _keep_rows(graph: KnnGraph, kept: np.ndarray, k: int) -> KnnGraph:
    """The graph among the kept rows, renumbered; lists keep their order and are cut to k."""
    neighbour, similarity = np.asarray(graph.neighbour)[kept], np.asarray(graph.similarity)[kept]
    held = (neighbour != UNLABELLED) & kept[np.maximum(neighbour, 0)]
    order = np.argsort(~held, axis=1, kind="stable")[:, :k]
    held = np.take_along_axis(held, order, 1)
    near = (np.cumsum(kept) - 1)[np.maximum(np.take_along_axis(neighbour, order, 1), 0)]
    return KnnGraph(
        np.where(held, near, UNLABELLED),
        np.where(held, np.take_along_axis(similarity, order, 1), 0).astype(np.float32),
    )
