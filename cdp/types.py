"""The few values that travel between rooms.

The contract:
- Every value is frozen; its arrays are not copied and must not be written to.
- Sample positions are row numbers of the embeddings, 0-based int64. `UNLABELLED` marks "none".
"""

from __future__ import annotations

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
    listings : (m,) int32 >= 1, in how many neighbour lists each stands, of either row in every
        graph; None: once each.
    """

    source: np.ndarray
    target: np.ndarray
    listings: np.ndarray | None = None

    @property
    def weight(self) -> np.ndarray:
        """(m,) int64, how much each pair weighs where many are averaged: its listings, or 1."""
        if self.listings is None:
            return np.ones(len(self), np.int64)
        return self.listings.astype(np.int64)

    def take(self, kept: np.ndarray) -> PairTable:
        """Those of a bool mask, or at ascending positions."""
        listings = None if self.listings is None else self.listings[kept]
        return PairTable(self.source[kept], self.target[kept], listings)

    def __len__(self) -> int:
        return len(self.source)
