"""The nearest neighbours of an image in a review, from the graphs that the stage knn published.

The contract:
- Read once, when a session opens; large arrays lie on disk (`cdp.arrays.scratch`).
- An image is looked up in the base graph of its own split. Near-equal images have the neighbours
  of the image that stands for them, which then comes first.
- An image that is in no graph, such as a labelled one the mediator is not trained on, has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipelines.tables import SPLITS, read_vectors

if TYPE_CHECKING:
    from pipelines.results import RunResults

Graph = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(n,) ascending sample ids, (n, k) ids of their neighbours, (n, k) cosines."""


class NeighbourLists:
    """The base graph of each split of one run."""

    def __init__(self, run: RunResults) -> None:
        self._graphs: list[Graph] = []
        self._stands_for: dict[int, tuple[int, float]] = {}
        published = run.find("knn")
        if published is None:
            return
        base = published.manifest["ingredients"]["config"]["committee"]["base"]["name"]
        # Adopted unlabelled images are in the labelled graph too: their own split comes first.
        for split in reversed(SPLITS):
            table = f"neighbours/{split}/{base}"
            path = published.path(table)
            if path.exists():
                ids = published.read(table, ["sample_id"])["sample_id"].to_numpy()
                neighbour, cosine = (read_vectors(path, c) for c in ("neighbour", "similarity"))
                self._graphs.append((ids, neighbour, cosine))
        if published.path("near_equal").exists():
            near = published.read("near_equal").to_pandas()
            stands = zip(near.representative.tolist(), near.similarity.tolist(), strict=True)
            self._stands_for = dict(zip(near.sample_id.tolist(), stands, strict=True))

    def find(self, sample: int) -> list[tuple[int, float]]:
        """Neighbours of an image as (sample id, cosine), nearest first; empty for one not there."""
        found: list[tuple[int, float]] = []
        if sample in self._stands_for:
            sample, similarity = self._stands_for[sample]
            found.append((sample, similarity))
        for ids, neighbour, cosine in self._graphs:
            row = int(np.searchsorted(ids, sample))
            if row < len(ids) and ids[row] == sample:
                listed = zip(neighbour[row].tolist(), cosine[row].tolist(), strict=True)
                found += [(other, near) for other, near in listed if other >= 0]
                break
        return found
