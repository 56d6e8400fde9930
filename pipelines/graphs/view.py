"""One member's view of one split: its vectors, ids and index in a folder, its graph in a table.

The contract:
- Rows are those images of the split that are searched, by ascending sample id.
- A graph names neighbours by sample id and is read by row; padding is -1 in both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.types import UNLABELLED, KnnGraph
from pipelines.stage import Work
from pipelines.tables import read_vectors, vector_column, write_table


@dataclass(frozen=True)
class View:
    """What one member sees of one split.

    place : folder of `vectors.npy`, `ids.npy` and `index.npz`. table : folder of the graph's parts.
    """

    split: str
    member: str
    place: Path
    table: Path

    @classmethod
    def of(cls, work: Work, split: str, member: str) -> View:
        """The view at its place in the working directory."""
        place = work.scratch / f"{split}-{member}"
        return cls(split, member, place, work.path("neighbours", f"{split}/{member}"))

    @property
    def name(self) -> str:
        return f"{self.split}/{self.member}"

    def move(self, suffix: str) -> View:
        """The view with another folder for its vectors, and the same table."""
        return replace(self, place=self.place.with_name(f"{self.place.name}-{suffix}"))

    def count_rows(self) -> int:
        return len(np.load(self.place / "ids.npy", mmap_mode="r"))

    def read_ids(self) -> np.ndarray:
        """(n,) int64 sample ids, ascending."""
        ids: np.ndarray = np.load(self.place / "ids.npy")
        return ids

    def map_vectors(self, kept: np.ndarray | None = None) -> np.ndarray:
        """(n, d) float32 unit vectors, mapped. kept : (n,) bool, rows to copy; None: all."""
        vectors: np.ndarray = np.load(self.place / "vectors.npy", mmap_mode="r")
        return vectors if kept is None or kept.all() else vectors[kept]

    def read_graph(self, kept: np.ndarray | None = None) -> KnnGraph:
        """The graph by row. kept : (n,) bool, rows to restrict it to; None: all."""
        named = read_vectors(self.table, "neighbour")
        rows = np.where(named == UNLABELLED, UNLABELLED, np.searchsorted(self.read_ids(), named))
        graph = KnnGraph(rows, read_vectors(self.table, "similarity"))
        if kept is None or kept.all():
            return graph
        from cdp.knn.graph import restrict_graph

        return restrict_graph(graph, kept)


def describe_neighbours(k: int) -> pa.Schema:
    """The table of one graph; k = 0 means any k."""
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("neighbour", pa.list_(pa.int64(), k)),
            ("similarity", pa.list_(pa.float32(), k)),
        ]
    )


def write_graph(target: Path, rows: np.ndarray, graph: KnnGraph, ids: np.ndarray, k: int) -> None:
    """Write lists of k, padded where there are fewer other images.

    rows : (m,) int64 sample ids of the lists. ids : (n,) int64, those of all rows a list may name.
    """
    lacking = ((0, 0), (0, k - graph.k))
    neighbour = np.pad(graph.neighbour, lacking, constant_values=UNLABELLED)
    columns = {
        "sample_id": rows,
        "neighbour": vector_column(np.where(neighbour == UNLABELLED, UNLABELLED, ids[neighbour])),
        "similarity": vector_column(np.pad(graph.similarity, lacking)),
    }
    write_table(target, columns, describe_neighbours(k))


def list_embedded(table: Path) -> np.ndarray:
    """(n,) int64 sample ids of one table of embeddings, ascending."""
    return np.sort(pq.read_table(table, columns=["sample_id"])["sample_id"].to_numpy())
