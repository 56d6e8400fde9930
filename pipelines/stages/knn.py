"""knn: views -> one k-nearest-neighbour graph a view and split, by cosine.

The contract:
- One index a view and split is built, saved, and queried in parts by the workers; the parts do not
  depend on the number of workers.
- The recall of each graph against exact search, on a seeded sample, is in the manifest.
- Neighbours are `sample_id`s, nearest first, without the sample itself.
- The split `joint` is the graph over labelled and unlabelled images together; `knn.joint: false`
  omits it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from cdp.types import KnnGraph
from pipelines.config import KnnSettings
from pipelines.stage import Stage, Work
from pipelines.tables import JOINT, SPLITS, read_vectors, read_view, vector_column, write_table

if TYPE_CHECKING:
    from cdp.knn.index import KnnIndex

PART_SIZE = 4096
"""Rows queried at once."""


def describe_neighbours(k: int) -> pa.Schema:
    """The table of one graph; k = 0 means any k."""
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("neighbour", pa.list_(pa.int64(), k)),
            ("similarity", pa.list_(pa.float32(), k)),
        ]
    )


def run(work: Work) -> Mapping[str, Any]:
    settings = work.config.knn
    counts = {split: int(work.input_facts("embed")[split]) for split in SPLITS}
    for split, count in counts.items():
        if 0 < count <= settings.k:
            raise DataError(
                f"the {split} split has {count} images to search (of the labelled ones, those kept "
                f"for the mediator), and knn.k={settings.k} needs at least {settings.k + 1}. Add "
                "images, raise train.mediator_share or lower knn.k"
            )
    parts: dict[str, tuple[str, ...]] = {split: (split,) for split in SPLITS}
    if settings.joint and counts["labelled"]:
        parts[JOINT] = SPLITS
        counts[JOINT] = sum(counts.values())
    views = [
        (split, member.name)
        for split in parts
        if counts[split]
        for member in work.config.committee.all
    ]
    places = {view: work.scratch / f"{view[0]}-{view[1]}" for view in views}
    build = [
        (
            [work.locate("embed.embeddings", f"{part}/{view[1]}") for part in parts[view[0]]],
            *(places[view], settings, work.seed),
        )
        for view in views
    ]
    for _ in work.engine.map(build_view, build, label="knn builds indexes"):
        pass
    queries = [
        (places[view], settings.k, row,
         work.path("neighbours", "/".join(view)) / f"part-{number:05d}.parquet")
        for view in views
        for number, row in enumerate(range(0, counts[view[0]], PART_SIZE))
    ]  # fmt: skip
    for _ in work.engine.map(query_part, queries, label="knn searches"):
        pass
    sample = [
        (places[view], work.path("neighbours", "/".join(view)), settings.recall_sample, work.seed)
        for view in views
    ]
    recalls = list(work.engine.map(measure_view, sample, label="knn measures recall"))
    return {
        "k": settings.k,
        "backend": settings.backend,
        "graphs": len(views),
        "joint": JOINT in parts,
        "lowest_recall": round(min(recalls), 4),
        "recall": {"/".join(v): round(recall, 4) for v, recall in zip(views, recalls, strict=True)},
    }


def build_view(embeddings: list[Path], place: Path, settings: KnnSettings, seed: int) -> None:
    """Save the vectors of one view, for mapping, and an index over them."""
    from cdp.knn.index import build_index

    if place.exists():
        return
    draft = place.with_name(f"{place.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    ids, vectors = read_view(embeddings)
    np.save(draft / "vectors.npy", vectors)
    np.save(draft / "ids.npy", ids)
    index = build_index(
        vectors,
        settings.backend,
        k=settings.k,
        settings=settings.options,
        seed=seed,
        threads=1,
    )
    index.save(draft / "index.npz")
    draft.rename(place)


@lru_cache(maxsize=2)
def _open_view(place: Path) -> tuple[KnnIndex, np.ndarray, np.ndarray]:
    from cdp.knn.index import load_index

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    return load_index(place / "index.npz", vectors), vectors, np.load(place / "ids.npy")


def query_part(place: Path, k: int, row: int, target: Path) -> None:
    """Search the neighbours of one block of rows and write them."""
    from cdp.knn.index import query_index

    if target.exists():
        return
    index, vectors, ids = _open_view(place)
    rows = slice(row, min(row + PART_SIZE, len(vectors)))
    graph = query_index(index, vectors, rows, k, threads=1)
    write_table(
        target,
        {
            "sample_id": ids[rows],
            "neighbour": vector_column(ids[graph.neighbour]),
            "similarity": vector_column(graph.similarity),
        },
        describe_neighbours(k),
    )


def measure_view(place: Path, neighbours: Path, sample: int, seed: int) -> float:
    """Recall of one published graph against exact search over the same vectors."""
    from cdp.knn.graph import measure_recall

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    neighbour = np.searchsorted(np.load(place / "ids.npy"), read_vectors(neighbours, "neighbour"))
    graph = KnnGraph(neighbour, read_vectors(neighbours, "similarity"))
    return float(measure_recall(vectors, graph, sample=sample, seed=seed))


STAGE = Stage(
    name="knn",
    version=7,
    inputs=("embed.embeddings",),
    outputs={"neighbours": describe_neighbours(0)},
    reads=("committee", "knn"),
    run=run,
)
