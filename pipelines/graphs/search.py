"""The search of a view: an index is built, saved, and queried in parts by the workers.

The contract:
- The parts do not depend on the number of workers.
- A part whose file is there is not searched again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdp.arrays.threads import list_blocks
from pipelines.config import KnnSettings
from pipelines.copies import find_trained_split
from pipelines.graphs.view import View, write_graph
from pipelines.stage import Work
from pipelines.tables import SPLITS, read_view

if TYPE_CHECKING:
    from cdp.knn.index import KnnIndex

PART_SIZE = 16384
"""Rows queried at once: each part reads the whole index of its view."""
_WHOLE = 100_000
"""Up to so many rows a search that compares all pairs has one part, and compares each pair once."""


def search_views(
    work: Work, views: Sequence[View], ids: Mapping[str, np.ndarray], *, adopted: bool = False
) -> None:
    """Search the neighbours of every image of some views.

    ids : split -> ascending sample ids to search; all where it is missing.
    adopted : whether images of the other split are among them.
    """
    settings = work.config.knn
    split_of = {SPLITS[0]: find_trained_split(work.input_facts("embed"))}
    build = [
        (
            [
                work.locate("embed.embeddings", f"{split_of.get(split, split)}/{view.member}")
                for split in (SPLITS if adopted else (view.split,))
            ],
            view.place,
            settings,
            work.seed,
            ids.get(view.split),
        )
        for view in views
    ]
    for _ in work.engine.map(build_view, build, label="knn builds indexes"):
        pass
    queries = [
        (view.place, settings.k, rows, view.table / f"part-{number:05d}.parquet")
        for view in views
        for number, rows in enumerate(list_parts(settings, view.count_rows()))
    ]
    for _ in work.engine.map(query_part, queries, label="knn searches"):
        pass


def list_parts(settings: KnnSettings, count: int) -> list[slice]:
    """The rows of each part that a view of so many rows is searched in."""
    from cdp.knn.index import compares_all

    whole = count <= _WHOLE and compares_all(settings.backend, settings.options, count)
    return list_blocks(0, count, max(count, 1) if whole else PART_SIZE)


def build_view(
    embeddings: list[Path],
    place: Path,
    settings: KnnSettings,
    seed: int,
    chosen: np.ndarray | None = None,
) -> None:
    """Save the vectors of one view, for mapping, and an index over them.

    embeddings : its table, one a split. chosen : ascending sample ids to keep; None: all.
    """
    from cdp.knn.index import build_index

    if place.exists():
        return
    draft = place.with_name(f"{place.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    ids, vectors = read_view(embeddings)
    if chosen is not None and len(chosen) < len(ids):
        rows = np.searchsorted(ids, chosen)
        ids, vectors = ids[rows], vectors[rows]
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


@lru_cache(maxsize=1)
def _open_view(place: Path) -> tuple[KnnIndex, np.ndarray, np.ndarray]:
    from cdp.knn.index import load_index

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    return load_index(place / "index.npz", vectors), vectors, np.load(place / "ids.npy")


def query_part(place: Path, k: int, rows: slice, target: Path) -> None:
    """Search the neighbours of some rows and write them."""
    from cdp.knn.index import query_index

    if target.exists():
        return
    index, vectors, ids = _open_view(place)
    graph = query_index(index, vectors, rows, min(k, index.k), threads=1)
    write_graph(target, ids[rows], graph, ids, k)


def measure_view(view: View, sample: int, seed: int) -> float:
    """Recall of one published graph against exact search over the same vectors."""
    from cdp.knn.graph import measure_recall

    graph = view.read_graph()
    return float(measure_recall(view.map_vectors(), graph, sample=sample, seed=seed))
