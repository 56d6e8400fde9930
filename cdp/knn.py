"""The k nearest neighbours of every embedding by cosine: nmslib, faiss or exact, one function.

The contract:
- Enters: (n, d) vectors, n and d any, float16/32/64, any strides, memory-mapped or not. A zero
  vector, a NaN or an inf is refused by row number. Unit float32 C-ordered input is never copied.
- Leaves: `KnnGraph` whose similarities are recomputed from the vectors in a fixed order of
  additions, in float32, descending, ties by smaller neighbour; row i excludes i.
- The result has the same bits for any number of threads, for the whole or by parts in other
  processes, and for a given seed. `exact` takes no seed.
- An approximate library proposes candidates, rows near the same pivots add theirs; every candidate,
  its candidates and whoever proposes the row are then compared exactly. A row always has
  min(k, n - 1) neighbours.
- Up to `exact_limit` rows a backend gives the exact graph: for faiss up to 200,000, where comparing
  all pairs costs no more than an approximate index of recall .99; for nmslib 0, HNSW at any size.
- faiss and nmslib are imported here and nowhere else, and only when asked for.

How nmslib stays reproducible: its HNSW graph depends on the order of insertion and on a random
state kept per thread, so each index is built by one fresh thread. Several views are built at once
to use the other cores (`build_knn_graphs`).

How nmslib is kept fast: its index holds the rows projected on the principal axes that carry all
but `_LOST_ENERGY` of them, and proposes a few more than k; cosines that decide are taken in full.
A twentieth of the rows is inserted at random, the others beside their like (`cdp.pivots`), and all
are searched in that order, so that they find in the cache what the row before them read.
How wide it must search differs from set to set, so efSearch is the least of `_WIDTHS` with which a
seeded sample of rows finds `_TARGET_RECALL` of its true neighbours before they are refined.
The exact search has a room of its own, `cdp.exact`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numba import njit

from cdp.cosine import BLOCK, count_threads, dot_rows, insert, limit_blas, list_blocks, make_unit
from cdp.errors import BackendError, ConfigError, DataError
from cdp.exact import prepare_exact, scan_all, search_exact
from cdp.pivots import PivotGroups, find_axes, group_rows, project_rows, propose_near_pivots
from cdp.types import UNLABELLED, KnnGraph

BACKENDS = ("nmslib", "faiss", "exact")

EXACT_LIMIT = 200_000
"""Up to so many rows the exact search needs less time than an HNSW index of recall .99 (measured on
face-like 256-d embeddings: a third of it at 20,000 rows, about the same at 200,000)."""

# nmslib's own post-processing (post=2) costs more than the index and gains nothing here.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "nmslib": {
        "exact_limit": 0,
        "M": 10,
        "efConstruction": 40,
        "efSearch": 0,
        "post": 0,
    },
    "faiss": {"exact_limit": EXACT_LIMIT, "nlist": 0, "nprobe": 32},
    "exact": {},
}
_LOST_ENERGY = 0.03
_SPARE = 12
_WIDTHS = (25, 30, 35, 40, 50, 60, 70, 85, 100, 120, 140, 170, 200, 300, 450)
_TARGET_RECALL = 0.986
_SAMPLE = 512
_FAVOURITES = 32
_FIRST_SHARE = 20
_FEW_ROWS = 2048


@dataclass(frozen=True)
class KnnIndex:
    """Candidates of each row: all that a part of the graph needs besides the vectors.

    backend : "nmslib", "faiss" or "exact".
    count, dimension : shape of the vectors it was built on.
    k : the most neighbours a query may ask for.
    unit : the vectors were of unit length, float32 and C-ordered as they came.
    candidate : (n, c) int32, proposed neighbours, -1 padding; in an exact index they only tell a
        query how near the k-th neighbour is at least.
    axes : (d, p) float32, the principal axes an exact query bounds with; (d, 0) in other indexes.
    order : (n,) int32, the rows in an order that is kind to the cache; empty in an exact index.
    settings : what it was built with.
    """

    backend: str
    count: int
    dimension: int
    k: int
    unit: bool
    candidate: np.ndarray
    axes: np.ndarray
    order: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one `.npz` file at exactly `path`; the vectors are not in it."""
        header = {
            "backend": self.backend,
            "dimension": self.dimension,
            "k": self.k,
            "unit": self.unit,
            "settings": dict(self.settings),
        }
        text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), dtype=np.uint8)
        with open(path, "wb") as stream:
            np.savez(
                stream, header=text, candidate=self.candidate, axes=self.axes, order=self.order
            )


def load_index(path: str | os.PathLike[str], vectors: np.ndarray) -> KnnIndex:
    """Read an index written by `KnnIndex.save`, in any process.

    Raises
    ------
    DataError
        The file is not such an index, or belongs to vectors of another shape.
    """
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes().decode())
            candidate, axes, order = (stored[name] for name in ("candidate", "axes", "order"))
        index = KnnIndex(
            backend=header["backend"],
            count=len(candidate),
            dimension=header["dimension"],
            k=header["k"],
            unit=header["unit"],
            candidate=candidate,
            axes=axes,
            order=order,
            settings=header["settings"],
        )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DataError(f"{path} is not a kNN index: {error}; build it again") from error
    _check_shape(index, vectors)
    return index


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
    backend : "nmslib" (HNSW), "faiss" (an inverted file above `exact_limit` rows) or "exact".
    seed : of the inverted file's centroids and of the sample that sets efSearch.
    threads : at most so many; None: all cores this process may use. Never changes the result.
    settings : nmslib: exact_limit, M, efConstruction, efSearch (0: found by a sample), post.
        faiss: exact_limit, nlist (0: 4 sqrt(n)), nprobe.

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
    index, unit = _build(vectors, backend, k, settings, seed, threads)
    return _query(index, unit, slice(0, len(unit)), k, threads)


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

    A view may be a function that loads its array. Each graph equals `build_knn_graph` of its view.
    Parameters and errors as there.
    """
    workers = count_threads(threads)
    at_once = min(max(workers // 2, 1), len(views)) if backend == "nmslib" else 1
    limit = settings.get("exact_limit", _DEFAULTS.get(backend, {}).get("exact_limit", 0))
    if all(not callable(view) and len(view) <= limit for view in views):
        at_once = 1  # the exact search uses all threads by itself, and one view's memory

    def build(view: np.ndarray | Callable[[], np.ndarray]) -> KnnGraph:
        vectors = view() if callable(view) else view
        share = workers // at_once
        return build_knn_graph(vectors, k, backend=backend, seed=seed, threads=share, **settings)

    if at_once <= 1:
        return [build(view) for view in views]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(build, views))


def build_index(
    vectors: np.ndarray,
    backend: str = "nmslib",
    *,
    k: int = 20,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> KnnIndex:
    """Do the part of the search that needs all rows at once.

    Parameters and errors are those of `build_knn_graph`; `k` is the most neighbours that
    `query_index` will be asked for.
    """
    return _build(vectors, backend, k, dict(settings or {}), seed, threads)[0]


def query_index(
    index: KnnIndex,
    vectors: np.ndarray,
    rows: slice,
    k: int | None = None,
    *,
    threads: int | None = None,
) -> KnnGraph:
    """Find the neighbours of a part of the rows; parts put together equal `build_knn_graph`.

    Parameters
    ----------
    index : from `build_index` or `load_index`.
    vectors : the (n, d) vectors it was built on; only the rows needed are read.
    rows : contiguous slice of row numbers.
    k : at most `index.k`, the default.
    threads : as in `build_knn_graph`.

    Returns
    -------
    KnnGraph
        Of `rows` only; its neighbours are row numbers of the whole.
    """
    _check_shape(index, vectors)
    k = index.k if k is None else k
    start, stop, stride = rows.indices(index.count)
    if stride != 1:
        raise ConfigError(f"rows must be a contiguous slice, got {rows}")
    unit = np.asarray(vectors) if index.unit else make_unit(vectors)[0]
    return _query(index, unit, slice(start, max(start, stop)), k, threads)


def measure_recall(
    vectors: np.ndarray, graph: KnnGraph, *, sample: int = 1000, seed: int = 0
) -> float:
    """Share of the true k nearest neighbours that a graph holds, over a seeded sample of rows.

    A neighbour counts as true when its cosine reaches that of the exact k-th neighbour (to 1e-6),
    so that among equally near ones any choice is right. 1.0 where there is nothing to find.
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
    for start in range(0, len(chosen), BLOCK):
        part = chosen[start : start + BLOCK]
        similarity = np.empty((len(part), len(unit)), np.float32)
        for low in range(0, len(unit), 16 * BLOCK):
            similarity[:, low : low + 16 * BLOCK] = unit[part] @ unit[low : low + 16 * BLOCK].T
        similarity[np.arange(len(part)), part] = -np.inf
        kth = np.partition(similarity, len(unit) - wanted, axis=1)[:, len(unit) - wanted]
        held = graph.neighbour[part, :wanted]
        near = np.take_along_axis(similarity, np.maximum(held, 0), axis=1)
        found += int(((near >= kth[:, None] - 1e-6) & (held != UNLABELLED)).sum())
    return found / (len(chosen) * wanted)


def _check_shape(index: KnnIndex, vectors: np.ndarray) -> None:
    if np.shape(vectors) != (index.count, index.dimension):
        raise DataError(
            f"the kNN index was built on vectors of shape {(index.count, index.dimension)}, got "
            f"{np.shape(vectors)}; build it again"
        )


def _read_settings(backend: str, k: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    if backend not in BACKENDS:
        raise ConfigError(f"kNN backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if k != int(k) or k < 1:
        raise ConfigError(f"k must be an integer of at least 1, got {k!r}")
    unknown = set(settings) - set(_DEFAULTS[backend])
    if unknown:
        raise ConfigError(
            f"kNN backend {backend} has no setting {', '.join(sorted(unknown))}; it has "
            f"{', '.join(_DEFAULTS[backend]) or 'none'}"
        )
    return {**_DEFAULTS[backend], **settings}


def _build(
    vectors: np.ndarray,
    backend: str,
    k: int,
    settings: Mapping[str, Any],
    seed: int,
    threads: int | None,
) -> tuple[KnnIndex, np.ndarray]:
    chosen = _read_settings(backend, k, settings)
    workers = count_threads(threads)
    library = None if backend == "exact" else _import_library(backend)
    unit, as_is = make_unit(vectors)
    count, dimension = unit.shape
    width = min(k, count - 1)
    axes, order = np.empty((dimension, 0), np.float32), np.empty(0, np.int32)
    if width < 1 or count <= _FEW_ROWS:
        candidate = np.empty((count, 0), np.int32)
    elif backend == "exact" or count <= chosen["exact_limit"]:
        candidate, axes = prepare_exact(unit, width, workers)
    else:
        wide = min(width + _SPARE, count - 1)
        with limit_blas(), ThreadPoolExecutor(workers) as pool:
            principal = find_axes(unit)
            near = project_rows(unit, principal[:, :64], pool)
            groups = group_rows(near, _FAVOURITES, pool)
            order = groups.order
            if backend == "nmslib":
                candidate, beside = _propose_nmslib(
                    library, unit, near, principal, groups, wide, width, chosen, seed, workers
                )
            else:
                candidate = _propose_faiss(library, unit, wide, chosen, seed, workers)
                beside = propose_near_pivots(groups, near, wide, pool)
            _exchange(unit, candidate, beside, order, order, pool)
    index = KnnIndex(backend, count, dimension, int(k), as_is, candidate, axes, order, chosen)
    return index, unit


def _import_library(backend: str) -> Any:
    try:
        if backend == "nmslib":
            import nmslib

            return nmslib
        import faiss

        return faiss
    except ImportError as error:
        package = "nmslib-metabrainz" if backend == "nmslib" else "faiss-cpu"
        other = "faiss" if backend == "nmslib" else "nmslib"
        raise BackendError(
            f"kNN backend {backend} needs the package {package}, which cannot be imported "
            f"({error}): pip install {package}, or choose backend {other} or exact, which give "
            "the same graph to within their recall"
        ) from error


def _run_in_fresh_thread(work: Callable[[], Any]) -> Any:
    """Run in a thread of its own: nmslib draws its levels from a state kept per thread."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _propose_nmslib(
    nmslib: Any,
    unit: np.ndarray,
    near: np.ndarray,
    axes: np.ndarray,
    groups: PivotGroups,
    wide: int,
    width: int,
    settings: Mapping[str, Any],
    seed: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of the index, and those near the same pivots, found while it is built."""
    count = len(unit)
    with ThreadPoolExecutor(workers) as pool:
        short = _shorten(unit, axes, pool)
    shuffled = np.random.default_rng(seed).permutation(count).astype(np.int32)
    first = shuffled[: count // _FIRST_SHARE]
    late = np.ones(count, bool)
    late[first] = False

    def build() -> Any:
        # On unit vectors the negative dot product orders as the cosine does, and costs less.
        index = nmslib.init(method="hnsw", space="negdotprod")
        for rows in (first, groups.order[late[groups.order]]):
            for part in list_blocks(0, len(rows), 16 * BLOCK):
                index.addDataPointBatch(short[rows[part]], rows[part])
        index.createIndex(
            {
                "M": int(settings["M"]),
                "efConstruction": int(settings["efConstruction"]),
                "post": int(settings["post"]),
                "indexThreadQty": 1,
            }
        )
        return index

    def search(rows: np.ndarray, places: np.ndarray, candidate: np.ndarray) -> None:
        answers = index.knnQueryBatch(short[rows], k=wide + 1, num_threads=workers)
        found = np.full((len(rows), wide + 1), UNLABELLED, np.int32)
        if all(len(answer) == wide + 1 for answer, _ in answers):
            found[:] = [answer for answer, _ in answers]
        else:
            for place, (answer, _) in enumerate(answers):
                found[place, : len(answer)] = answer
        _drop_self(found, rows, places, candidate)

    candidate = np.full((count, wide), UNLABELLED, np.int32)
    effort = int(settings["efSearch"])
    sample = shuffled[count - (0 if effort else min(_SAMPLE, count)) :]
    places = np.arange(len(sample), dtype=np.int32)
    try:
        with ThreadPoolExecutor(1) as aside, ThreadPoolExecutor(max(workers - 1, 1)) as pool:
            coming = aside.submit(propose_near_pivots, groups, near, wide, pool)
            sought = aside.submit(_find_sampled, unit, sample, width)
            index = _run_in_fresh_thread(build)
            beside, true = coming.result(), sought.result()
        if effort:
            index.setQueryTimeParams({"efSearch": max(effort, wide + 1)})
        else:
            for effort in _WIDTHS:
                index.setQueryTimeParams({"efSearch": max(effort, wide + 1)})
                tried = np.full((len(sample), wide), UNLABELLED, np.int32)
                search(sample, places, tried)
                with ThreadPoolExecutor(workers) as pool:
                    _exchange(unit, tried, beside, sample, places, pool)
                found = (tried[:, :, None] == true[:, None, :]).any(axis=1).mean()
                if found >= _TARGET_RECALL:
                    break
        for part in list_blocks(0, count, 16 * BLOCK):
            search(groups.order[part], groups.order[part], candidate)
    except Exception as error:
        raise BackendError(
            f"nmslib failed on {unit.shape[0]} vectors of {unit.shape[1]} dimensions with "
            f"{dict(settings)}: {error}; backends faiss and exact do the same"
        ) from error
    return candidate, beside


def _shorten(unit: np.ndarray, axes: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    """The rows on as few principal axes as carry nearly all of them, in steps of 16."""
    sample = unit[:: max(len(unit) // 16384, 1)] @ axes
    energy = np.cumsum(np.einsum("ij,ij->j", sample, sample, dtype=np.float64))
    needed = int(np.searchsorted(energy, (1 - _LOST_ENERGY) * energy[-1])) + 1
    needed = -(-needed // 16) * 16
    if needed >= unit.shape[1]:
        return unit
    return project_rows(unit, axes[:, :needed], pool)


def _find_sampled(unit: np.ndarray, sample: np.ndarray, width: int) -> np.ndarray:
    """The exact neighbours of a few rows."""
    nearest = np.full((len(sample), width), UNLABELLED, np.int64)
    best = np.full((len(sample), width), -np.inf, np.float32)
    for part in list_blocks(0, len(unit), 16 * BLOCK):
        similarity = unit[sample] @ unit[part].T
        own = np.flatnonzero((sample >= part.start) & (sample < part.stop))
        similarity[own, sample[own] - part.start] = -np.inf
        _keep_best(similarity, part.start, nearest, best)
    return nearest


def _propose_faiss(
    faiss: Any, unit: np.ndarray, width: int, settings: Mapping[str, Any], seed: int, workers: int
) -> np.ndarray:
    count, dimension = unit.shape
    try:
        with limit_blas():
            faiss.omp_set_num_threads(1)
            lists = min(int(settings["nlist"]) or int(4 * np.sqrt(count)), count)
            quantizer = faiss.IndexFlatIP(dimension)
            index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = int(seed) % 2**31
            index.cp.max_points_per_centroid = 48
            index.cp.min_points_per_centroid = 1
            index.cp.niter = 6
            index.nprobe = min(int(settings["nprobe"]), lists)
            index.train(unit)
            index.add(unit)

            candidate = np.full((count, width), UNLABELLED, np.int32)

            def search(start: int) -> None:
                faiss.omp_set_num_threads(1)
                stop = min(start + BLOCK, count)
                _, near = index.search(unit[start:stop], width + 1)
                rows = np.arange(start, stop, dtype=np.int32)
                _drop_self(near, rows, rows, candidate)

            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(search, range(0, count, BLOCK)))
    except Exception as error:
        raise BackendError(
            f"faiss failed on {count} vectors of {dimension} dimensions with {dict(settings)}: "
            f"{error}; backends nmslib and exact do the same"
        ) from error
    return candidate


def _query(index: KnnIndex, unit: np.ndarray, rows: slice, k: int, threads: int | None) -> KnnGraph:
    if k > index.k or k < 1:
        raise ConfigError(f"the kNN index was built for k in 1 .. {index.k}, got {k}; build again")
    workers = count_threads(threads)
    size = rows.stop - rows.start
    neighbour = np.full((size, k), UNLABELLED, np.int64)
    similarity = np.zeros((size, k), np.float32)
    width = min(k, index.count - 1)
    if size == 0 or width < 1:
        return KnnGraph(neighbour, similarity)
    with limit_blas(), ThreadPoolExecutor(workers) as pool:
        if index.axes.shape[1]:
            search_exact(
                unit, index.candidate, index.axes, rows, width, neighbour, similarity, pool
            )
            return KnnGraph(neighbour, similarity)
        near, best = neighbour[:, :width], similarity[:, :width]
        if not index.candidate.shape[1]:

            def scan(part: slice) -> None:
                own = slice(part.start - rows.start, part.stop - rows.start)
                scan_all(unit, part.start, near[own], best[own])

            list(pool.map(scan, list_blocks(rows.start, rows.stop)))
            return KnnGraph(neighbour, similarity)
        start_of, member = _transpose(index.candidate)
        order = index.order[(index.order >= rows.start) & (index.order < rows.stop)]

        def refine(part: slice) -> None:
            _refine(unit, index.candidate, start_of, member, order[part], rows.start, near, best)

        list(pool.map(refine, list_blocks(0, size, 4 * BLOCK)))
    return KnnGraph(neighbour, similarity)


def _exchange(
    unit: np.ndarray,
    candidate: np.ndarray,
    other: np.ndarray,
    rows: np.ndarray,
    places: np.ndarray,
    pool: ThreadPoolExecutor,
) -> None:
    """Exchange the candidates of `rows`, at `places`, for nearer ones among `other`, in place."""

    def unite(part: slice) -> None:
        _unite(unit, other, rows[part], places[part], candidate)

    list(pool.map(unite, list_blocks(0, len(rows))))


@njit(cache=True, nogil=True)
def _transpose(candidate: Any) -> Any:
    count, width = candidate.shape
    start_of = np.zeros(count + 1, np.int64)
    for row in range(count):
        for position in range(width):
            if candidate[row, position] >= 0:
                start_of[candidate[row, position] + 1] += 1
    for row in range(count):
        start_of[row + 1] += start_of[row]
    fill = start_of[:-1].copy()
    member = np.empty(start_of[count], np.int32)
    for row in range(count):
        for position in range(width):
            other = candidate[row, position]
            if other >= 0:
                member[fill[other]] = row
                fill[other] += 1
    return start_of, member


@njit(cache=True, nogil=True)
def _drop_self(near: Any, rows: Any, places: Any, out: Any) -> None:
    for i in range(len(rows)):
        kept = 0
        for j in range(near.shape[1]):
            if near[i, j] >= 0 and near[i, j] != rows[i] and kept < out.shape[1]:
                out[places[i], kept] = near[i, j]
                kept += 1


@njit(cache=True, nogil=True)
def _keep_best(similarity: Any, first: int, nearest: Any, best: Any) -> None:
    """Insert the columns, numbered from `first`, into each row's nearest."""
    for i in range(len(similarity)):
        for j in range(similarity.shape[1]):
            if similarity[i, j] > best[i, -1]:
                insert(nearest[i], best[i], first + j, similarity[i, j])


@njit(cache=True, nogil=True)
def _unite(vectors: Any, other: Any, rows: Any, places: Any, candidate: Any) -> None:
    """Keep the nearest of each row's candidates and `other` ones, each once."""
    width = candidate.shape[1]
    nearest = np.empty(width, np.int32)
    best = np.empty(width, np.float32)
    for i in range(len(rows)):
        place = places[i]
        nearest[:] = -1
        best[:] = -np.inf
        for position in range(2 * width):
            if position < width:
                row = candidate[place, position]
            else:
                row = other[rows[i], position - width]
            if row < 0:
                continue
            known = False
            for earlier in range(width):
                known |= nearest[earlier] == row
            if not known:
                insert(nearest, best, row, dot_rows(vectors, rows[i], row))
        candidate[place] = nearest


@njit(cache=True, nogil=True)
def _refine(
    vectors: Any,
    candidate: Any,
    start_of: Any,
    member: Any,
    rows: Any,
    start: int,
    nearest: Any,
    best: Any,
) -> None:
    """Compare each row with its candidates, theirs, and the rows that propose it."""
    count, proposed = candidate.shape
    seen = np.full(count, -1, np.int32)
    listed = np.empty(count, np.int32)
    for row in rows:
        at = row - start
        best[at] = -np.inf
        seen[row] = row
        found = 0
        for position in range(-1, proposed):
            via = row if position < 0 else candidate[row, position]
            if via < 0:
                continue
            for inner in range(proposed):
                other = candidate[via, inner]
                if other >= 0 and seen[other] != row:
                    seen[other] = row
                    listed[found] = other
                    found += 1
        for position in range(start_of[row], start_of[row + 1]):
            other = member[position]
            if seen[other] != row:
                seen[other] = row
                listed[found] = other
                found += 1
        if found < best.shape[1]:
            for other in range(count):
                if seen[other] != row:
                    listed[found] = other
                    found += 1
        for position in range(found):
            other = listed[position]
            insert(nearest[at], best[at], other, dot_rows(vectors, row, other))
