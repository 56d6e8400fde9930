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
How wide it must search differs from set to set, so efSearch is the least of `_WIDTHS` with which a
seeded sample of rows finds `_TARGET_RECALL` of its true neighbours before they are refined.

How the exact search is fast: cos(x, y) <= <x', y'> + |x - x'| |y - y'|, where x' is x projected
on the strongest principal axes. A small matrix product over few axes, the residual lengths as one
axis more, bounds all pairs; only pairs whose bound reaches a row's k-th best are compared in full.
Neighbours found among rows near the same pivots give that k-th best a high start. (Ours; the bound
is Cauchy-Schwarz. Where it would not pay, all axes are taken and it is a plain blocked search.)
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numba import njit
from threadpoolctl import threadpool_limits

from cdp.errors import BackendError, ConfigError, DataError
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
_BLOCK = 1024
_LOST_ENERGY = 0.03
_SPARE = 5
_WIDTHS = (30, 40, 50, 60, 70, 85, 100, 120, 140, 170, 200, 300, 450)
_TARGET_RECALL = 0.986
_SAMPLE = 512
_FAVOURITES, _LISTS = 8, 96
_UNIT_SLACK = 2e-6
_BOUND_SLACK = 1e-5
_FEW_ROWS = 2048
_GEMM_SECONDS = 2 / 70e9
_COMPARE_SECONDS = 0.3e-9


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
    settings : what it was built with.
    """

    backend: str
    count: int
    dimension: int
    k: int
    unit: bool
    candidate: np.ndarray
    axes: np.ndarray
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
            np.savez(stream, header=text, candidate=self.candidate, axes=self.axes)


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
            candidate, axes = stored["candidate"], stored["axes"]
        index = KnnIndex(
            backend=header["backend"],
            count=len(candidate),
            dimension=header["dimension"],
            k=header["k"],
            unit=header["unit"],
            candidate=candidate,
            axes=axes,
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
    for start in range(0, len(chosen), _BLOCK):
        part = chosen[start : start + _BLOCK]
        similarity = np.empty((len(part), len(unit)), np.float32)
        for low in range(0, len(unit), 16 * _BLOCK):
            similarity[:, low : low + 16 * _BLOCK] = unit[part] @ unit[low : low + 16 * _BLOCK].T
        similarity[np.arange(len(part)), part] = -np.inf
        kth = np.partition(similarity, len(unit) - wanted, axis=1)[:, len(unit) - wanted]
        held = graph.neighbour[part, :wanted]
        near = np.take_along_axis(similarity, np.maximum(held, 0), axis=1)
        found += int(((near >= kth[:, None] - 1e-6) & (held != UNLABELLED)).sum())
    return found / (len(chosen) * wanted)


# --- checks --------------------------------------------------------------------------------------


def count_threads(threads: int | None) -> int:
    if threads is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else (os.cpu_count() or 1)
        )
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    return threads


_BLAS: dict[str, Any] = {"users": 0, "limits": None}
_BLAS_LOCK = threading.Lock()


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Keep BLAS to one thread: its sums then have one order, and the blocks have the cores.

    The limit is the process's, so the last of several concurrent searches lifts it, not the first.
    """
    with _BLAS_LOCK:
        if _BLAS["users"] == 0:
            _BLAS["limits"] = threadpool_limits(1)
        _BLAS["users"] += 1
    try:
        yield
    finally:
        with _BLAS_LOCK:
            _BLAS["users"] -= 1
            if _BLAS["users"] == 0:
                _BLAS["limits"].restore_original_limits()


def _check_shape(index: KnnIndex, vectors: np.ndarray) -> None:
    if np.shape(vectors) != (index.count, index.dimension):
        raise DataError(
            f"the kNN index was built on vectors of shape {(index.count, index.dimension)}, got "
            f"{np.shape(vectors)}; build it again"
        )


def make_unit(vectors: np.ndarray) -> tuple[np.ndarray, bool]:
    """Check the vectors; give them as unit float32 rows, and whether they were so already."""
    array = np.asarray(vectors)
    if array.ndim != 2 or array.dtype.kind not in "fiu" or (len(array) and not array.shape[1]):
        raise DataError(
            f"expected vectors as an (n, d) array of numbers, got shape {array.shape} of "
            f"{array.dtype}"
        )
    is_unit = array.dtype == np.float32 and array.flags.c_contiguous
    norm = np.empty(len(array))
    for start in range(0, len(array), _BLOCK):
        part = array[start : start + _BLOCK].astype(np.float64)
        norm[start : start + _BLOCK] = np.sqrt(np.einsum("ij,ij->i", part, part))
    bad = ~(np.isfinite(norm) & (norm > 0))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        kind = "is all zeros" if norm[row] == 0 else "holds NaN, inf or overflows"
        raise DataError(
            f"vector {row} {kind} ({int(bad.sum())} such of {len(array)}); a cosine needs finite "
            "vectors that are not zero: embed these images again or leave them out"
        )
    if is_unit and (np.abs(norm - 1) <= _UNIT_SLACK).all():
        return array, True
    unit = np.empty(array.shape, np.float32)
    for start in range(0, len(array), _BLOCK):
        stop = start + _BLOCK
        unit[start:stop] = array[start:stop].astype(np.float64) / norm[start:stop, None]
    return unit, False


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


# --- building ------------------------------------------------------------------------------------


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
    axes = np.empty((dimension, 0), np.float32)
    if width < 1 or count <= _FEW_ROWS:
        candidate = np.empty((count, 0), np.int32)
    elif backend == "exact" or count <= chosen["exact_limit"]:
        candidate, axes = _prepare_exact(unit, width, workers)
    else:
        wide = min(width + _SPARE, count - 1)
        with _one_blas_thread():
            principal = _find_axes(unit)
            if backend == "nmslib":
                candidate, beside = _propose_nmslib(
                    library, unit, principal, wide, width, chosen, seed, workers
                )
            else:
                candidate = _propose_faiss(library, unit, wide, chosen, seed, workers)
                beside = _propose_beside(unit, principal, wide, workers)
        _exchange(unit, candidate, beside, np.arange(count), workers)
    return KnnIndex(backend, count, dimension, int(k), as_is, candidate, axes, chosen), unit


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
    axes: np.ndarray,
    wide: int,
    width: int,
    settings: Mapping[str, Any],
    seed: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of the index, and those near the same pivots, found while it is built."""
    with ThreadPoolExecutor(workers) as pool:
        short = _shorten(unit, axes, pool)

    def build() -> Any:
        # On unit vectors the negative dot product orders as the cosine does, and costs less.
        index = nmslib.init(method="hnsw", space="negdotprod")
        index.addDataPointBatch(short)
        index.createIndex(
            {
                "M": int(settings["M"]),
                "efConstruction": int(settings["efConstruction"]),
                "post": int(settings["post"]),
                "indexThreadQty": 1,
            }
        )
        return index

    def search(rows: np.ndarray, candidate: np.ndarray) -> None:
        answers = index.knnQueryBatch(short[rows], k=wide + 1, num_threads=workers)
        for place, (near, _) in enumerate(answers):
            others = near[near != rows[place]][:wide]
            candidate[place, : len(others)] = others

    candidate = np.full((len(unit), wide), UNLABELLED, np.int32)
    effort = int(settings["efSearch"])
    sample = np.random.default_rng(seed).permutation(len(unit))[: 0 if effort else _SAMPLE]
    try:
        with ThreadPoolExecutor(1) as aside:
            coming = aside.submit(_propose_beside, unit, axes, wide, max(workers - 1, 1))
            sought = aside.submit(_find_sampled, unit, sample, width)
            index = _run_in_fresh_thread(build)
            beside, true = coming.result(), sought.result()
        if effort:
            index.setQueryTimeParams({"efSearch": max(effort, wide + 1)})
        else:
            for effort in _WIDTHS:
                index.setQueryTimeParams({"efSearch": max(effort, wide + 1)})
                tried = np.full((len(sample), wide), UNLABELLED, np.int32)
                search(sample, tried)
                _exchange(unit, tried, beside, sample, workers)
                found = (tried[:, :, None] == true[:, None, :]).any(axis=1).mean()
                if found >= _TARGET_RECALL:
                    break
        for part in _blocks(0, len(unit), 16 * _BLOCK):
            search(np.arange(part.start, part.stop), candidate[part])
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
    return np.ascontiguousarray(_project(unit, axes[:, :needed], pool)[:, :-1])


def _find_sampled(unit: np.ndarray, sample: np.ndarray, width: int) -> np.ndarray:
    """The exact neighbours of a few rows."""
    nearest = np.full((len(sample), width), UNLABELLED, np.int64)
    best = np.full((len(sample), width), -np.inf, np.float32)
    for part in _blocks(0, len(unit), 16 * _BLOCK):
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
        with _one_blas_thread():
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
                stop = min(start + _BLOCK, count)
                _, near = index.search(unit[start:stop], width + 1)
                _drop_self(near, start, candidate[start:stop])

            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(search, range(0, count, _BLOCK)))
    except Exception as error:
        raise BackendError(
            f"faiss failed on {count} vectors of {dimension} dimensions with {dict(settings)}: "
            f"{error}; backends nmslib and exact do the same"
        ) from error
    return candidate


# --- querying ------------------------------------------------------------------------------------


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
    with _one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        if index.axes.shape[1]:
            _search_exact(index, unit, rows, width, neighbour, similarity, pool)
            return KnnGraph(neighbour, similarity)
        start_of, member = _transpose(index.candidate)

        def work(start: int) -> None:
            stop = min(start + _BLOCK, rows.stop)
            part = slice(start - rows.start, stop - rows.start)
            near, best = neighbour[part, :width], similarity[part, :width]
            if index.candidate.shape[1]:
                _refine(unit, index.candidate, start_of, member, start, near, best)
            else:
                _scan_all(unit, start, near, best)

        list(pool.map(work, range(rows.start, rows.stop, _BLOCK)))
    return KnnGraph(neighbour, similarity)


# --- exact search --------------------------------------------------------------------------------


def _prepare_exact(unit: np.ndarray, width: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates that are mostly right, and the principal axes worth bounding with."""
    count, dimension = unit.shape
    with _one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        axes = _find_axes(unit)
        short = _project(unit, axes[:, : min(64, dimension)], pool)[:, :-1]
        candidate = _propose_near_pivots(short, width, 4, 12, pool)
        floor = np.empty(count, np.float32)

        def begin(part: slice) -> None:
            _find_floor(unit, candidate, part.start, floor[part])

        list(pool.map(begin, _blocks(0, count)))
    chosen = np.arange(0, count, max(count // 2048, 1))
    rows, columns = chosen[::4], chosen
    least = np.minimum(floor[rows][:, None], floor[columns][None]) - _BOUND_SLACK
    best_cost, best = np.inf, dimension
    for size in sorted({16, 32, 48, 64, 96, 128, 192, 256, 384, dimension}):
        if size > dimension:
            break
        one, other = (_bound(unit[part], axes[:, :size]) for part in (rows, columns))
        share = float((one @ other.T >= least).mean())
        cost = size * _GEMM_SECONDS + share * dimension * _COMPARE_SECONDS
        if cost < best_cost:
            best_cost, best = cost, size
    return candidate, np.ascontiguousarray(axes[:, :best])


def _find_axes(unit: np.ndarray) -> np.ndarray:
    """All (d, d) principal axes of a sample about the origin, strongest first."""
    sample = unit[:: max(len(unit) // 16384, 1)]
    moment = (sample.T @ sample).astype(np.float64)
    return np.ascontiguousarray(np.linalg.eigh(moment)[1][:, ::-1], np.float32)


def _propose_beside(unit: np.ndarray, axes: np.ndarray, wide: int, workers: int) -> np.ndarray:
    """Candidates among rows near the same pivots.

    A graph search stays within the groups it enters; rows that share a pivot are found whatever
    lies between them, so that the two miss different neighbours.
    """
    with ThreadPoolExecutor(workers) as pool:
        short = _project(unit, axes[:, :64], pool)[:, :-1]
        return _propose_near_pivots(short, wide, _FAVOURITES, _LISTS, pool)


def _exchange(
    unit: np.ndarray, candidate: np.ndarray, other: np.ndarray, rows: np.ndarray, workers: int
) -> None:
    """Exchange the candidates of `rows` for nearer ones among `other`, in place."""

    def unite(part: slice) -> None:
        _unite(unit, other, rows[part], candidate[part])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(unite, _blocks(0, len(rows))))


def _bound(unit: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Project, and append each row's residual length: products of these bound the cosines."""
    near = unit @ axes
    length = np.einsum("ij,ij->i", near, near)
    residual = np.sqrt(np.maximum(1 - length, 0) + 1e-6)
    return np.column_stack([near, residual.astype(np.float32)])


def _project(unit: np.ndarray, axes: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    out = np.empty((len(unit), axes.shape[1] + 1), np.float32)

    def work(part: slice) -> None:
        out[part] = _bound(unit[part], axes)

    list(pool.map(work, _blocks(0, len(unit))))
    return out


def _blocks(start: int, stop: int, size: int = _BLOCK) -> list[slice]:
    return [slice(low, min(low + size, stop)) for low in range(start, stop, size)]


def _propose_near_pivots(
    short: np.ndarray, width: int, favourites: int, lists: int, pool: ThreadPoolExecutor
) -> np.ndarray:
    """Compare each row with those whose nearest pivot is among its group's favourites.

    A row favours `favourites` pivots; the `lists` most favoured by a group are looked through.
    """
    count = len(short)
    pivots = np.ascontiguousarray(short[:: max(int(np.sqrt(count) / 2), 1)])
    pivots = pivots / np.maximum(np.linalg.norm(pivots, axis=1, keepdims=True), 1e-12)
    favourite = np.empty((count, min(favourites, len(pivots))), np.int32)

    def choose(part: slice) -> None:
        _pick_best(short[part] @ pivots.T, favourite[part])

    list(pool.map(choose, _blocks(0, count)))
    order = np.argsort(favourite[:, 0], kind="stable")
    start_of = np.searchsorted(favourite[order, 0], np.arange(len(pivots) + 1))
    candidate = np.full((count, width), UNLABELLED, np.int32)

    def join(pivot: int) -> None:
        group = order[start_of[pivot] : start_of[pivot + 1]]
        if not len(group):
            return
        wanted = np.bincount(favourite[group].ravel(), minlength=len(pivots))
        chosen = np.argsort(-wanted, kind="stable")[:lists]
        others = np.concatenate(
            [order[start_of[one] : start_of[one + 1]] for one in chosen if wanted[one]]
        )
        for low in range(0, len(group), _BLOCK):
            rows = group[low : low + _BLOCK]
            others = others[: 16 * _BLOCK]
            _keep_near(short[rows] @ short[others].T, rows, others, candidate)

    list(pool.map(join, range(len(pivots))))
    return candidate


def _search_exact(
    index: KnnIndex,
    unit: np.ndarray,
    rows: slice,
    width: int,
    neighbour: np.ndarray,
    similarity: np.ndarray,
    pool: ThreadPoolExecutor,
) -> None:
    """Exact neighbours of `rows`; where they are all rows, each block pair is looked at once."""
    count = index.count
    bound = _project(unit, index.axes, pool)
    whole = rows.start == 0 and rows.stop == count
    near = np.full((rows.stop - rows.start, width), UNLABELLED, np.int64)
    best = np.full(near.shape, -np.inf, np.float32)
    floor = np.full(len(near), -np.inf, np.float32)
    starts = _blocks(rows.start, rows.stop)

    def begin(part: slice) -> None:
        local = slice(part.start - rows.start, part.stop - rows.start)
        _find_floor(unit, index.candidate[:, :width], part.start, floor[local])

    list(pool.map(begin, starts))
    if whole:
        locks = [threading.Lock() for _ in starts]
        pairs = [
            (one, one + apart) for apart in range(len(starts)) for one in range(len(starts) - apart)
        ]

        def compare(pair: tuple[int, int]) -> None:
            one, other = pair
            left, right = starts[one], starts[other]
            ceiling = bound[left] @ bound[right].T
            with locks[one]:
                if one == other:
                    _compare(ceiling, unit, left.start, right.start, 0, near, best, floor, True)
                else:
                    with locks[other]:
                        _compare(ceiling, unit, left.start, right.start, 0, near, best, floor, True)

        list(pool.map(compare, pairs))
    else:

        def search(part: slice) -> None:
            for other in _blocks(0, count):
                ceiling = bound[part] @ bound[other].T
                _compare(
                    ceiling, unit, part.start, other.start, rows.start, near, best, floor, False
                )

        list(pool.map(search, starts))
    neighbour[:, :width] = near
    similarity[:, :width] = best


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
def _drop_self(near: Any, start: int, out: Any) -> None:
    for i in range(len(out)):
        kept = 0
        for j in range(near.shape[1]):
            if near[i, j] >= 0 and near[i, j] != start + i and kept < out.shape[1]:
                out[i, kept] = near[i, j]
                kept += 1


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def dot_rows(vectors: Any, one: int, other: int) -> Any:
    total = np.float32(0)
    for axis in range(vectors.shape[1]):
        total += vectors[one, axis] * vectors[other, axis]
    return min(max(total, np.float32(-1)), np.float32(1))


@njit(cache=True, nogil=True)
def _insert(nearest: Any, best: Any, candidate: int, value: Any) -> None:
    """Insert by descending similarity, ties by smaller index; whatever the order of calls."""
    place = len(best) - 1
    if value < best[place] or (value == best[place] and candidate > nearest[place]):
        return
    while place > 0 and (
        best[place - 1] < value or (best[place - 1] == value and nearest[place - 1] > candidate)
    ):
        best[place] = best[place - 1]
        nearest[place] = nearest[place - 1]
        place -= 1
    best[place] = value
    nearest[place] = candidate


@njit(cache=True, nogil=True)
def _scan_all(vectors: Any, start: int, nearest: Any, best: Any) -> None:
    best[:] = -np.inf
    for i in range(len(nearest)):
        for other in range(len(vectors)):
            if other != start + i:
                _insert(nearest[i], best[i], other, dot_rows(vectors, start + i, other))


@njit(cache=True, nogil=True)
def _pick_best(similarity: Any, out: Any) -> None:
    """Positions of the largest values of each row, descending."""
    best = np.empty(out.shape[1], np.float32)
    for i in range(len(similarity)):
        best[:] = -np.inf
        for j in range(similarity.shape[1]):
            if similarity[i, j] > best[-1]:
                _insert(out[i], best, j, similarity[i, j])


@njit(cache=True, nogil=True)
def _keep_best(similarity: Any, first: int, nearest: Any, best: Any) -> None:
    """Insert the columns, numbered from `first`, into each row's nearest."""
    for i in range(len(similarity)):
        for j in range(similarity.shape[1]):
            if similarity[i, j] > best[i, -1]:
                _insert(nearest[i], best[i], first + j, similarity[i, j])


@njit(cache=True, nogil=True)
def _keep_near(similarity: Any, rows: Any, others: Any, candidate: Any) -> None:
    best = np.empty(candidate.shape[1], np.float32)
    for i in range(len(rows)):
        best[:] = -np.inf
        for j in range(len(others)):
            if similarity[i, j] > best[-1] and others[j] != rows[i]:
                _insert(candidate[rows[i]], best, others[j], similarity[i, j])


@njit(cache=True, nogil=True)
def _find_floor(vectors: Any, candidate: Any, start: int, floor: Any) -> None:
    """Least similarity among each row's candidates: its k-th neighbour is no further."""
    for i in range(len(floor)):
        least = np.float32(np.inf)
        for other in candidate[start + i]:
            if other < 0:
                least = np.float32(-np.inf)
            else:
                least = min(least, dot_rows(vectors, start + i, other))
        floor[i] = least


@njit(cache=True, nogil=True)
def _unite(vectors: Any, other: Any, rows: Any, candidate: Any) -> None:
    """Keep the nearest of each row's candidates and `other` ones, each once."""
    width = candidate.shape[1]
    nearest = np.empty(width, np.int32)
    best = np.empty(width, np.float32)
    for i in range(len(candidate)):
        nearest[:] = -1
        best[:] = -np.inf
        for position in range(2 * width):
            row = candidate[i, position] if position < width else other[rows[i], position - width]
            if row < 0:
                continue
            value = dot_rows(vectors, rows[i], row)
            known = False
            for earlier in range(width):
                known |= nearest[earlier] == row
            if not known:
                _insert(nearest, best, row, value)
        candidate[i] = nearest


@njit(cache=True, nogil=True, fastmath=True)
def _reaches(ceiling: Any, level: Any, low: int, high: int, own: Any) -> Any:
    reach = np.float32(-4)
    for j in range(low, high):
        reach = max(reach, ceiling[j] - min(level[j], own))
    return reach >= 0


@njit(cache=True, nogil=True)
def _compare(
    ceiling: Any,
    vectors: Any,
    first: int,
    second: int,
    offset: int,
    nearest: Any,
    best: Any,
    floor: Any,
    both: bool,
) -> None:
    """Compare in full the pairs of two blocks whose bound reaches either row's k-th best.

    Row numbers start at `first` and `second`; results of row r lie at r - offset. With `both`
    each pair serves its two rows, and the diagonal block is read above the diagonal.
    """
    slack = np.float32(_BOUND_SLACK)
    height, span = ceiling.shape
    level = np.full(span, np.float32(4))
    if both:
        for j in range(span):
            at = second + j - offset
            level[j] = max(floor[at], best[at, -1]) - slack
    for i in range(height):
        row = first + i
        at = row - offset
        own = max(floor[at], best[at, -1]) - slack
        if own < -3:
            own = np.float32(-3)
        begin = i + 1 if both and first == second else 0
        for low in range(begin, span, 64):
            high = min(low + 64, span)
            if not _reaches(ceiling[i], level, low, high, own):
                continue
            for j in range(low, high):
                if ceiling[i, j] < min(level[j], own) or second + j == row:
                    continue
                value = dot_rows(vectors, row, second + j)
                if value >= own:
                    _insert(nearest[at], best[at], second + j, value)
                    own = max(floor[at], best[at, -1]) - slack
                if both and value >= level[j]:
                    other = second + j - offset
                    _insert(nearest[other], best[other], row, value)
                    level[j] = max(floor[other], best[other, -1]) - slack


@njit(cache=True, nogil=True)
def _refine(
    vectors: Any,
    candidate: Any,
    start_of: Any,
    member: Any,
    start: int,
    nearest: Any,
    best: Any,
) -> None:
    """Compare each row with its candidates, theirs, and the rows that propose it."""
    count, proposed = candidate.shape
    seen = np.full(count, -1, np.int32)
    listed = np.empty(count, np.int32)
    best[:] = -np.inf
    for i in range(len(nearest)):
        row = start + i
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
        if found < nearest.shape[1]:
            for other in range(count):
                if seen[other] != row:
                    listed[found] = other
                    found += 1
        for position in range(found):
            other = listed[position]
            _insert(nearest[i], best[i], other, dot_rows(vectors, row, other))
