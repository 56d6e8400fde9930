"""The values every package shares: neighbour graphs, pairs, and views that are loaded on demand.

The contract:
- Every value is frozen; its arrays are not copied and must not be written to.
- Sample positions are row numbers of the embeddings, 0-based int64. `UNLABELLED` marks "none".
- A view (the embeddings of one model) or a graph may be given as a function that loads it, so that
  a caller holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNLABELLED = -1
"""The pseudo-label of an image without one, and the padding of a short neighbour list."""


@dataclass(frozen=True)
class KnnGraph:
    """The k nearest neighbours of each row by cosine.

    neighbour : (n, k) int64, row numbers; row i excludes i; `UNLABELLED` pads a row that has
        fewer than k others, always at its end.
    similarity : (n, k) float32, cosine in [-1, 1], descending (ties by smaller neighbour first);
        0 where padded.
    """

    neighbour: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.neighbour)

    @property
    def k(self) -> int:
        return int(self.neighbour.shape[1])


@dataclass(frozen=True)
class PairTable:
    """Unordered pairs of rows.

    source, target : (m,) int64, source < target, unique, sorted by (source, target).
    listings : (m,) int32 >= 1, the number of k-NN lists (over all graphs, both directions) that
        contain the pair; None: 1 each.
    """

    source: np.ndarray
    target: np.ndarray
    listings: np.ndarray | None = None

    @property
    def weight(self) -> np.ndarray:
        """(m,) int64, the pair's weight in averages: its `listings`, or 1."""
        if self.listings is None:
            return np.ones(len(self), np.int64)
        return self.listings.astype(np.int64)

    def take(self, kept: np.ndarray | slice) -> PairTable:
        """The pairs of a bool mask, a slice, or ascending positions."""
        listings = None if self.listings is None else self.listings[kept]
        return PairTable(self.source[kept], self.target[kept], listings)

    def __len__(self) -> int:
        return len(self.source)


View = np.ndarray | Callable[[], np.ndarray]
"""(n, d) embeddings of one model, or a function that loads them."""
Graph = KnnGraph | Callable[[], KnnGraph]
"""A neighbour graph, or a function that loads it."""


def load_view(view: View) -> np.ndarray:
    """The array of a view."""
    return view() if callable(view) else view


def take_rows(view: View, rows: np.ndarray) -> np.ndarray:
    """Some rows of a view; all of them without a copy."""
    loaded = load_view(view)
    return loaded if len(rows) == len(loaded) else loaded[rows]


def load_graph(graph: Graph) -> KnnGraph:
    """The graph, loaded if it is given as a function."""
    return graph if isinstance(graph, KnnGraph) else graph()
