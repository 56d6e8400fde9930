"""knn: views -> one k-nearest-neighbour graph a view, by cosine.

The contract:
- `joint` graphs search the labelled and the unlabelled images together, `separate` ones each split
  among itself. Either way a split's rows are its own table; in a joint graph a neighbour may be of
  the other split.
- An index is built once a view, saved, and queried in parts by the workers; the parts do not
  depend on how many workers there are.
- Each graph's recall is measured on a seeded sample against exact search and is in the manifest.
- Neighbours are named by `sample_id`, nearest first, the sample itself left out.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.errors import DataError
from cdp.types import KnnGraph
from pipelines.config import KnnSettings
from pipelines.stage import Stage, Work
from pipelines.stages.embed import SPLITS
from pipelines.store import read_vectors, vector_column, write_table

PART_SIZE = 4096


def describe_neighbours(k: int) -> pa.Schema:
    """The table of one graph; k 0 stands for any."""
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
    groups = list_groups(settings.graphs, counts)
    for splits in groups:
        count = sum(counts[split] for split in splits)
        if count <= settings.k:
            raise DataError(
                f"the {' and '.join(splits)} split has {count} images, and knn.k={settings.k} "
                f"needs at least {settings.k + 1}. Add images or lower knn.k"
            )
    build, queries, measure = [], [], []
    for splits in groups:
        for member in work.config.committee.all:
            tables = {split: work.path("neighbours", f"{split}/{member.name}") for split in splits}
            place = work.scratch / f"{'+'.join(splits)}-{member.name}"
            views = [work.locate("embed.embeddings", f"{split}/{member.name}") for split in splits]
            build.append((views, place, settings, work.seed))
            first = 0
            for split in splits:
                for number, row in enumerate(range(0, counts[split], PART_SIZE)):
                    rows = slice(first + row, first + min(row + PART_SIZE, counts[split]))
                    target = tables[split] / f"part-{number:05d}.parquet"
                    queries.append((place, settings.k, rows, target))
                first += counts[split]
            measure.append((place, list(tables.values()), settings.recall_sample, work.seed))
    for _ in work.engine.map(build_view, build, label="knn builds indexes"):
        pass
    for _ in work.engine.map(query_part, queries, label="knn searches"):
        pass
    recalls = list(work.engine.map(measure_view, measure, label="knn measures recall"))
    names = [place.name for _, place, _, _ in build]
    return {
        "k": settings.k,
        "backend": settings.backend,
        "graphs": len(recalls),
        "lowest_recall": round(min(recalls), 4),
        "groups": [list(splits) for splits in groups],
        "recall": {name: round(recall, 4) for name, recall in zip(names, recalls, strict=True)},
    }


def list_groups(graphs: str, counts: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The splits that are searched together; splits without an image are left out."""
    present = tuple(split for split in SPLITS if counts[split])
    return [present] if graphs == "joint" else [(split,) for split in present]


def build_view(embeddings: list[Path], place: Path, settings: KnnSettings, seed: int) -> None:
    """Save the vectors of one view, for mapping, and an index over them."""
    from cdp.knn import build_index

    if place.exists():
        return
    draft = place.with_name(f"{place.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    vectors = np.concatenate([read_vectors(path, "embedding") for path in embeddings])
    ids = [pq.read_table(path, columns=["sample_id"])["sample_id"] for path in embeddings]
    np.save(draft / "vectors.npy", vectors)
    np.save(draft / "ids.npy", np.concatenate([part.to_numpy() for part in ids]))
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
def _open_view(place: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    from cdp.knn import load_index

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    return load_index(place / "index.npz", vectors), vectors, np.load(place / "ids.npy")


def query_part(place: Path, k: int, rows: slice, target: Path) -> None:
    """Search the neighbours of one block of rows and write them."""
    from cdp.knn import query_index

    if target.exists():
        return
    index, vectors, ids = _open_view(place)
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


def measure_view(place: Path, tables: list[Path], sample: int, seed: int) -> float:
    """Recall of one published graph against exact search over the same vectors."""
    from cdp.knn import measure_recall

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    graph = read_graph(tables, np.load(place / "ids.npy"))
    return float(measure_recall(vectors, graph, sample=sample, seed=seed))


def read_graph(tables: list[Path], sample_id: np.ndarray) -> KnnGraph:
    """The tables of the splits searched together -> one graph over the ascending `sample_id`."""
    neighbour = np.concatenate([read_vectors(path, "neighbour") for path in tables])
    similarity = np.concatenate([read_vectors(path, "similarity") for path in tables])
    return KnnGraph(np.searchsorted(sample_id, neighbour).astype(np.int64), similarity)


STAGE = Stage(
    name="knn",
    version=1,
    inputs=("embed.embeddings",),
    outputs={"neighbours": describe_neighbours(0)},
    reads=("committee", "knn"),
    run=run,
)
