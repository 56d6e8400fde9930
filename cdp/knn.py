"""The k nearest neighbours of every embedding by cosine: nmslib, faiss or exact, one function.

The contract:
- Enters: (n, d) vectors, n and d any, float16/32/64, any strides, memory-mapped or not. A zero
  vector, a NaN or an inf is refused by row number. Unit float32 C-ordered input is never copied.
- Leaves: `KnnGraph` whose similarities are recomputed from the vectors in a fixed order of
  additions, in float32, descending, ties by smaller neighbour; row i excludes i.
- The result has the same bits for any number of threads, for the whole or by parts in other
  processes, and for a given seed. `exact` takes no seed.
- An approximate library proposes candidates; every candidate, its candidates and whoever proposes
  the row are then compared exactly. A row always has min(k, n - 1) neighbours.
- faiss and nmslib are imported here and nowhere else, and only when asked for.

How nmslib stays reproducible: its HNSW graph depends on the order of insertion and on a random
state kept per thread, so each index is built by one fresh thread. Several views are built at once
to use the other cores (`build_knn_graphs`).
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
from threadpoolctl import threadpool_limits

from cdp.errors import BackendError, ConfigError, DataError
from cdp.types import UNLABELLED, KnnGraph

BACKENDS = ("nmslib", "faiss", "exact")

_DEFAULTS: dict[str, dict[str, Any]] = {
    "nmslib": {"M": 12, "efConstruction": 60, "efSearch": 40, "post": 0},
    "faiss": {"exact_limit": 20_000, "nlist": 0, "nprobe": 32},
    "exact": {},
}
_BLOCK = 1024
_MARGIN = 8
_UNIT_SLACK = 2e-6
_EXPAND = 20


@dataclass(frozen=True)
class KnnIndex:
    """Candidates of each row: all that a part of the graph needs besides the vectors.

    backend : "nmslib", "faiss" or "exact".
    count, dimension : shape of the vectors it was built on.
    k : the most neighbours a query may ask for.
    unit : the vectors were of unit length, float32 and C-ordered as they came.
    candidate : (n, c) int32, proposed neighbours, -1 padding; c = 0 where queries compare all rows.
    settings : what it was built with.
    """

    backend: str
    count: int
    dimension: int
    k: int
    unit: bool
    candidate: np.ndarray
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
            np.savez(stream, header=text, candidate=self.candidate)


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
            candidate = stored["candidate"]
        index = KnnIndex(
            backend=header["backend"],
            count=len(candidate),
            dimension=header["dimension"],
            k=header["k"],
            unit=header["unit"],
            candidate=candidate,
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
    backend : "nmslib" (HNSW), "faiss" (exact search up to `exact_limit` rows, an inverted file
        above) or "exact" (all pairs, blocked BLAS).
    seed : of the inverted file's centroids.
    threads : at most so many; None: all cores this process may use. Never changes the result.
    settings : nmslib: M, efConstruction, efSearch, post. faiss: exact_limit, nlist, nprobe.

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
    """Build the graph of each view, as many views at once as there are threads for nmslib.

    A view may be a function that loads its array. Each graph equals `build_knn_graph` of its view.
    Parameters and errors as there.
    """
    workers = count_threads(threads)
    at_once = min(workers, len(views)) if backend == "nmslib" else 1

    def build(view: np.ndarray | Callable[[], np.ndarray]) -> KnnGraph:
        vectors = view() if callable(view) else view
        share = 1 if at_once > 1 else workers
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
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1
        )
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    return threads


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
    count = len(unit)
    width = min(k, count - 1)
    if backend == "exact" or count <= max(4 * k, 256):
        candidate = np.empty((count, 0), np.int32)
    elif backend == "nmslib":
        candidate = _propose_nmslib(library, unit, width, chosen, workers)
    else:
        candidate = _propose_faiss(library, unit, width, chosen, seed, workers)
    dimension = unit.shape[1] if unit.ndim == 2 else 0
    return KnnIndex(backend, count, dimension, int(k), as_is, candidate, chosen), unit


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
    nmslib: Any, unit: np.ndarray, width: int, settings: Mapping[str, Any], workers: int
) -> np.ndarray:
    def build() -> Any:
        # On unit vectors the negative dot product orders as the cosine does, and costs less.
        index = nmslib.init(method="hnsw", space="negdotprod")
        index.addDataPointBatch(unit)
        index.createIndex(
            {
                "M": int(settings["M"]),
                "efConstruction": int(settings["efConstruction"]),
                "post": int(settings["post"]),
                "indexThreadQty": 1,
            }
        )
        index.setQueryTimeParams({"efSearch": max(int(settings["efSearch"]), width + 1)})
        return index

    candidate = np.full((len(unit), width), UNLABELLED, np.int32)
    try:
        index = _run_in_fresh_thread(build)
        for start in range(0, len(unit), 16 * _BLOCK):
            part = unit[start : start + 16 * _BLOCK]
            answers = index.knnQueryBatch(part, k=width + 1, num_threads=workers)
            for row, (near, _) in enumerate(answers, start):
                others = near[near != row][:width]
                candidate[row, : len(others)] = others
    except Exception as error:
        raise BackendError(
            f"nmslib failed on {unit.shape[0]} vectors of {unit.shape[1]} dimensions with "
            f"{dict(settings)}: {error}; backends faiss and exact do the same"
        ) from error
    return candidate


def _propose_faiss(
    faiss: Any, unit: np.ndarray, width: int, settings: Mapping[str, Any], seed: int, workers: int
) -> np.ndarray:
    count, dimension = unit.shape
    try:
        with threadpool_limits(1):
            faiss.omp_set_num_threads(1)
            if count <= settings["exact_limit"]:
                index = faiss.IndexFlatIP(dimension)
            else:
                lists = int(settings["nlist"]) or int(4 * np.sqrt(count))
                quantizer = faiss.IndexFlatIP(dimension)
                index = faiss.IndexIVFFlat(
                    quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT
                )
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


def _query(
    index: KnnIndex, unit: np.ndarray, rows: slice, k: int, threads: int | None
) -> KnnGraph:
    if k > index.k or k < 1:
        raise ConfigError(f"the kNN index was built for k in 1 .. {index.k}, got {k}; build again")
    workers = count_threads(threads)
    size = rows.stop - rows.start
    neighbour = np.full((size, k), UNLABELLED, np.int64)
    similarity = np.zeros((size, k), np.float32)
    width = min(k, index.count - 1)
    if size == 0 or width < 1:
        return KnnGraph(neighbour, similarity)
    if index.candidate.shape[1]:
        start_of, member = _list_reverse(index.candidate)

        def refine(start: int) -> None:
            stop = min(start + _BLOCK, rows.stop)
            part = slice(start - rows.start, stop - rows.start)
            _refine(
                unit, index.candidate, start_of, member, start, stop, width,
                neighbour[part], similarity[part],
            )

        work = refine
    else:

        def compare(start: int) -> None:
            first, last = max(start, rows.start), min(start + _BLOCK, rows.stop)
            part = slice(first - rows.start, last - rows.start)
            candidate = _compare_all(unit, start, width)[first - start : last - start]
            _rank(unit, candidate, first, width, neighbour[part], similarity[part])

        work = compare
    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        # Blocks lie at fixed multiples, so that BLAS meets the same shapes for any slice.
        first = rows.start if index.candidate.shape[1] else rows.start // _BLOCK * _BLOCK
        list(pool.map(work, range(first, rows.stop, _BLOCK)))
    return KnnGraph(neighbour, similarity)


def _compare_all(unit: np.ndarray, start: int, width: int) -> np.ndarray:
    """Candidates of the rows of one block by BLAS, a few more than asked for, self left out."""
    count = len(unit)
    block = unit[start : start + _BLOCK]
    keep = min(width + _MARGIN, count - 1)
    nearest = np.full((len(block), keep), UNLABELLED, np.int32)
    best = np.full((len(block), keep), -np.inf, np.float32)
    if count <= 2 * _BLOCK:
        # Few rows: no BLAS, so that ties are by index to the last bit.
        _scan_all(unit, start, nearest, best)
        return nearest
    for low in range(0, count, 4 * _BLOCK):
        similarity = block @ unit[low : low + 4 * _BLOCK].T
        _keep_best(similarity, start, low, nearest, best)
    return nearest


def _list_reverse(candidate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that propose each row, as offsets (n + 1,) and members, ascending."""
    return _transpose(candidate)


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


@njit(cache=True, nogil=True, inline="always")
def _insert(nearest: Any, best: Any, row: int, candidate: int, value: Any) -> None:
    """Insert by descending similarity, ties by smaller index; whatever the order of calls."""
    last = nearest.shape[1] - 1
    if value < best[row, last] or (value == best[row, last] and candidate > nearest[row, last]):
        return
    place = last
    while place > 0 and (
        best[row, place - 1] < value
        or (best[row, place - 1] == value and nearest[row, place - 1] > candidate)
    ):
        best[row, place] = best[row, place - 1]
        nearest[row, place] = nearest[row, place - 1]
        place -= 1
    best[row, place] = value
    nearest[row, place] = candidate


@njit(cache=True, nogil=True)
def _keep_best(similarity: Any, start: int, low: int, nearest: Any, best: Any) -> None:
    last = nearest.shape[1] - 1
    for i in range(similarity.shape[0]):
        least = best[i, last]
        for j in range(similarity.shape[1]):
            if similarity[i, j] >= least and low + j != start + i:
                _insert(nearest, best, i, low + j, similarity[i, j])
                least = best[i, last]


@njit(cache=True, nogil=True)
def _scan_all(vectors: Any, start: int, nearest: Any, best: Any) -> None:
    for i in range(len(nearest)):
        for other in range(len(vectors)):
            if other != start + i:
                _insert(nearest, best, i, other, dot_rows(vectors, start + i, other))


@njit(cache=True, nogil=True)
def _rank(
    vectors: Any, candidate: Any, start: int, width: int, neighbour: Any, similarity: Any
) -> None:
    """Compare each row with its candidates in float32, in a fixed order."""
    nearest = np.empty((1, width), np.int64)
    best = np.empty((1, width), np.float32)
    for i in range(len(candidate)):
        nearest[:] = -1
        best[:] = -np.inf
        for position in range(candidate.shape[1]):
            other = candidate[i, position]
            if other >= 0:
                _insert(nearest, best, 0, other, dot_rows(vectors, start + i, other))
        neighbour[i, :width] = nearest[0]
        similarity[i, :width] = best[0]


@njit(cache=True, nogil=True)
def _refine(
    vectors: Any,
    candidate: Any,
    start_of: Any,
    member: Any,
    start: int,
    stop: int,
    width: int,
    neighbour: Any,
    similarity: Any,
) -> None:
    """Compare each row with its candidates, theirs, and the rows that propose it."""
    count, proposed = candidate.shape
    seen = np.full(count, -1, np.int32)
    nearest = np.empty((1, width), np.int64)
    best = np.empty((1, width), np.float32)
    for row in range(start, stop):
        nearest[:] = -1
        best[:] = -np.inf
        seen[row] = row
        found = 0
        for position in range(proposed):
            via = candidate[row, position]
            if via < 0:
                continue
            if seen[via] != row:
                seen[via] = row
                found += 1
                _insert(nearest, best, 0, via, dot_rows(vectors, row, via))
            for inner in range(proposed):
                other = candidate[via, inner]
                if other >= 0 and seen[other] != row:
                    seen[other] = row
                    found += 1
                    _insert(nearest, best, 0, other, dot_rows(vectors, row, other))
        for position in range(start_of[row], start_of[row + 1]):
            other = member[position]
            if seen[other] != row:
                seen[other] = row
                found += 1
                _insert(nearest, best, 0, other, dot_rows(vectors, row, other))
        if found < width:
            for other in range(count):
                if seen[other] != row:
                    _insert(nearest, best, 0, other, dot_rows(vectors, row, other))
        neighbour[row - start, :width] = nearest[0]
        similarity[row - start, :width] = best[0]
