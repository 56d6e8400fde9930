"""kNN graphs in one call, for one view or several, and the recall of an approximate graph.

The contract: that of `cdp.knn.index`, whose index is built and queried here at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.arrays.threads import BLOCK, count_threads
from cdp.errors import DataError
from cdp.knn.index import compares_all, prepare_index, search_index
from cdp.types import UNLABELLED, KnnGraph

_COMPARED = 1 << 25
"""Cosines that measuring the recall holds at once."""


def build_knn_graph(
    vectors: np.ndarray,
    k: int = 20,
    *,
    backend: str = "nmslib",
    seed: int = 0,
    threads: int | None = None,
    **settings: Any,
) -> KnnGraph:
    """Find the k nearest neighbours of every row by cosine.

    Parameters
    ----------
    vectors : (n, d) float16, float32 or float64. Need not be of unit length.
    k : neighbours a row, at least 1. Where n - 1 < k the rest of a row is padding (-1).
    backend : "nmslib" (HNSW above `exact_limit` rows), "faiss" (an inverted file above them),
        "exact", or "torch" (exact, on a GPU if there is one).
    seed : of the inverted file's centroids and of the sample that sets efSearch.
    threads : at most so many; None: all cores this process may use. The result is the same.
    settings : nmslib: exact_limit, M, efConstruction, efSearch (0: found by a sample), post.
        faiss: exact_limit, nlist (0: 4 sqrt(n)), nprobe. torch: device ("auto", "cpu", "cuda").

    Returns
    -------
    KnnGraph

    Raises
    ------
    ConfigError
        Unknown backend or setting, or k < 1.
    DataError
        The vectors are not a finite 2-d array without zero rows.
    BackendError
        The library cannot be imported, or failed.
    """
    index, unit = prepare_index(vectors, backend, k, settings, seed, threads)
    return search_index(index, unit, slice(0, len(unit)), k, threads)


def build_knn_graphs(
    views: Sequence[np.ndarray | Callable[[], np.ndarray]],
    k: int = 20,
    *,
    backend: str = "nmslib",
    seed: int = 0,
    threads: int | None = None,
    **settings: Any,
) -> list[KnnGraph]:
    """Build the graph of each view; with nmslib, a view for every two threads at once.

    Parameters and errors are those of `build_knn_graph`, and each graph equals that of its view. A
    view may be a function that loads its array.
    """
    workers = count_threads(threads)
    at_once = min(max(workers // 2, 1), len(views)) if backend == "nmslib" else 1
    if all(not callable(view) and compares_all(backend, settings, len(view)) for view in views):
        at_once = 1  # the exact search uses all threads itself

    def build(view: np.ndarray | Callable[[], np.ndarray]) -> KnnGraph:
        vectors = view() if callable(view) else view
        share = workers // at_once
        return build_knn_graph(vectors, k, backend=backend, seed=seed, threads=share, **settings)

    if at_once <= 1:
        return [build(view) for view in views]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(build, views))


def measure_recall(
    vectors: np.ndarray, graph: KnnGraph, *, sample: int = 1000, seed: int = 0
) -> float:
    """Share of the true k nearest neighbours that a graph holds, over a seeded sample of rows.

    A neighbour counts as true when its cosine reaches that of the exact k-th neighbour (to 1e-6),
    so that any choice among equally near ones is right. 1.0 where no row has a neighbour.
    """
    unit, _ = make_unit(vectors)
    if len(graph) != len(unit):
        raise DataError(f"the graph has {len(graph)} rows, the vectors {len(unit)}")
    wanted = min(graph.k, len(unit) - 1)
    if wanted < 1:
        return 1.0
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(unit), min(sample, len(unit)), replace=False))
    found = 0
    at_once = min(max(_COMPARED // len(unit), 1), BLOCK)
    for start in range(0, len(chosen), at_once):
        part = chosen[start : start + at_once]
        similarity = np.empty((len(part), len(unit)), np.float32)
        for low in range(0, len(unit), 16 * BLOCK):
            similarity[:, low : low + 16 * BLOCK] = unit[part] @ unit[low : low + 16 * BLOCK].T
        similarity[np.arange(len(part)), part] = -np.inf
        kth = np.partition(similarity, len(unit) - wanted, axis=1)[:, len(unit) - wanted]
        held = graph.neighbour[part, :wanted]
        near = np.take_along_axis(similarity, np.maximum(held, 0), axis=1)
        found += int(((near >= kth[:, None] - 1e-6) & (held != UNLABELLED)).sum())
    return found / (len(chosen) * wanted)


def restrict_graph(graph: KnnGraph, kept: np.ndarray, k: int | None = None) -> KnnGraph:
    """The graph among the kept rows, renumbered; lists keep their order and are cut to k.

    kept : (n,) bool. Neighbours that are not kept leave padding at the end of a list.
    k : None: the graph's.
    """
    neighbour, similarity = np.asarray(graph.neighbour)[kept], np.asarray(graph.similarity)[kept]
    held = (neighbour != UNLABELLED) & kept[np.maximum(neighbour, 0)]
    order = np.argsort(~held, axis=1, kind="stable")[:, : k or graph.k]
    held = np.take_along_axis(held, order, 1)
    near = (np.cumsum(kept) - 1)[np.maximum(np.take_along_axis(neighbour, order, 1), 0)]
    return KnnGraph(
        np.where(held, near, UNLABELLED),
        np.where(held, np.take_along_axis(similarity, order, 1), 0).astype(np.float32),
    )
