"""kNN index: built once from all rows, saved, and queried in parts by any process.

The contract:
- Enters: (n, d) vectors, n and d any, float16/32/64, any strides, memory-mapped or not. A zero
  vector, a NaN or an inf is refused by row number. Unit float32 C-ordered input is never copied.
- Leaves: `KnnGraph` whose similarities are recomputed from the vectors in a fixed order of
  additions, in float32, descending, ties by smaller neighbour; row i excludes i.
- The result has the same bits for any number of threads, for the whole or by parts in other
  processes, and for a given seed. `exact` takes no seed.
- An approximate library proposes candidates (`cdp.knn.libraries`), shared pivots propose more
  (`cdp.knn.pivots`); the candidates, theirs and the rows that have the row as a candidate are then
  compared in full (`cdp.knn.refine`). A row always has min(k, n - 1) neighbours.
- Up to `exact_limit` rows a backend gives the exact graph (`cdp.knn.exact`): for faiss up to
  200,000, where comparing all pairs costs no more than an approximate index of recall .99; for
  nmslib up to 100,000, where it takes no longer than HNSW and its refinement.
- `torch` gives the bits of `exact`, on a GPU if there is one (`cdp.knn.torch_search`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.arrays.principal_axes import find_axes
from cdp.arrays.threads import BLOCK, count_threads, limit_blas, list_blocks
from cdp.errors import ConfigError, DataError
from cdp.knn.exact import prepare_exact, scan_all, search_exact
from cdp.knn.libraries import (
    EXTRA_CANDIDATES,
    PIVOTS_A_ROW,
    import_library,
    propose_faiss,
    propose_nmslib,
)
from cdp.knn.pivots import (
    PIVOT_AXES,
    group_rows,
    project_rows,
    propose_near_pivots,
)
from cdp.knn.refine import (
    exchange_candidates,
    rank_candidates,
    refine_candidates,
    transpose_candidates,
)
from cdp.knn.torch_search import propose_torch
from cdp.types import UNLABELLED, KnnGraph

BACKENDS = ("nmslib", "faiss", "exact", "torch")

EXACT_LIMIT = 200_000
"""Up to so many rows the exact search takes no longer than an HNSW index of recall .99 (on
face-like 256-d embeddings: a third of its time at 20,000 rows, about the same at 200,000)."""

NMSLIB_EXACT_LIMIT = 100_000
"""Up to so many rows the exact search takes no longer than an HNSW index and its refinement (on
face-like 256-d embeddings three quarters of its time at 50,000 and at 100,000 rows, 1.2 times at
200,000)."""

# nmslib's own post-processing (post=2) costs more than the index and gains nothing here.
BACKEND_DEFAULTS: dict[str, dict[str, Any]] = {
    "nmslib": {
        "exact_limit": NMSLIB_EXACT_LIMIT,
        "M": 10,
        "efConstruction": 40,
        "efSearch": 0,
        "post": 0,
    },
    "faiss": {"exact_limit": EXACT_LIMIT, "nlist": 0, "nprobe": 32},
    "exact": {},
    "torch": {"device": "auto"},
}
_FEW_ROWS = 2048
"""Up to so many rows no index is built: a query compares every pair in full."""


@dataclass(frozen=True)
class KnnIndex:
    """Candidates of each row: with the vectors, all that a query of any part needs.

    backend : "nmslib", "faiss", "exact" or "torch".
    count, dimension : shape of the vectors it was built on.
    k : the most neighbours a query may ask for.
    unit : whether the vectors were unit float32 C-ordered rows as given.
    candidate : (n, c) int32, proposed neighbours, -1 padding; in an exact index they only bound the
        similarity of the k-th neighbour from below.
    axes : (d, p) float32, principal axes for the bound of an exact query; (d, 0) in other indexes.
    order : (n,) int32, rows grouped by nearest pivot, the order of queries; empty where exact.
    settings : of the backend, defaults filled in.
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

    @cached_property
    def reverse(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that have each row as a candidate, see `transpose_candidates`; found once."""
        start_of, member = transpose_candidates(self.candidate)
        return start_of, member

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


def build_index(
    vectors: np.ndarray,
    backend: str = "nmslib",
    *,
    k: int = 20,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> KnnIndex:
    """Build the index of all rows that `query_index` searches in parts.

    Parameters and errors are those of `build_knn_graph`; `k` is the most neighbours that
    `query_index` will be asked for.
    """
    return prepare_index(vectors, backend, k, dict(settings or {}), seed, threads)[0]


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
    return search_index(index, unit, slice(start, max(start, stop)), k, threads)


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
    unknown = set(settings) - set(BACKEND_DEFAULTS[backend])
    if unknown:
        raise ConfigError(
            f"kNN backend {backend} has no setting {', '.join(sorted(unknown))}; it has "
            f"{', '.join(BACKEND_DEFAULTS[backend]) or 'none'}"
        )
    return {**BACKEND_DEFAULTS[backend], **settings}


def compares_all(backend: str, settings: Mapping[str, Any], count: int) -> bool:
    """Whether an index of so many rows compares all pairs (`cdp.knn.exact`), parameters as given.

    A search of all its rows at once compares each pair once, a search in parts twice.
    """
    default = BACKEND_DEFAULTS.get(backend, {}).get("exact_limit", 0)
    return backend == "exact" or count <= settings.get("exact_limit", default)


def prepare_index(
    vectors: np.ndarray,
    backend: str,
    k: int,
    settings: Mapping[str, Any],
    seed: int,
    threads: int | None,
) -> tuple[KnnIndex, np.ndarray]:
    """Build an index; parameters as in `build_index`. Returns the unit rows with it."""
    chosen = _read_settings(backend, k, settings)
    workers = count_threads(threads)
    library = import_library(backend) if backend in ("nmslib", "faiss") else None
    unit, as_is = make_unit(vectors)
    count, dimension = unit.shape
    width = min(k, count - 1)
    axes, order = np.empty((dimension, 0), np.float32), np.empty(0, np.int32)
    if width < 1 or count <= _FEW_ROWS:
        candidate = np.empty((count, 0), np.int32)
    elif backend == "torch":
        candidate = propose_torch(unit, width, str(chosen["device"]), workers)
    elif compares_all(backend, settings, count):
        candidate, axes = prepare_exact(unit, width, workers)
    else:
        wide = min(width + EXTRA_CANDIDATES, count - 1)
        with limit_blas(), ThreadPoolExecutor(workers) as pool:
            principal = find_axes(unit)
            projected = project_rows(unit, principal[:, :PIVOT_AXES], pool)
            groups = group_rows(projected, PIVOTS_A_ROW, pool)
            order = groups.order
            if backend == "nmslib":
                candidate, pivot_candidates = propose_nmslib(
                    library, unit, projected, principal, groups, wide, width, chosen, seed, workers
                )
            else:
                candidate = propose_faiss(library, unit, wide, chosen, seed, workers)
                pivot_candidates = propose_near_pivots(groups, projected, wide, pool)
            exchange_candidates(unit, candidate, pivot_candidates, order, order, pool)
    index = KnnIndex(backend, count, dimension, int(k), as_is, candidate, axes, order, chosen)
    return index, unit


def search_index(
    index: KnnIndex, unit: np.ndarray, rows: slice, k: int, threads: int | None
) -> KnnGraph:
    """Query an index with the unit rows it was built on; parameters as in `query_index`."""
    if k > index.k or k < 1:
        raise ConfigError(f"the kNN index was built for k in 1 .. {index.k}, got {k}; build again")
    workers = count_threads(threads)
    size = rows.stop - rows.start
    neighbour = np.full((size, k), UNLABELLED, np.int64)
    similarity = np.zeros((size, k), np.float32)
    width = min(k, index.count - 1)
    if size == 0 or width < 1:
        return KnnGraph(neighbour, similarity)
    near, best = neighbour[:, :width], similarity[:, :width]
    with limit_blas(), ThreadPoolExecutor(workers) as pool:
        if index.axes.shape[1]:
            search_exact(unit, index.candidate, index.axes, rows, width, near, best, pool)
        elif not index.candidate.shape[1]:
            _fill_blocks(partial(scan_all, unit), rows, near, best, pool)
        elif index.backend == "torch":
            ranked = partial(rank_candidates, unit, index.candidate)
            _fill_blocks(ranked, rows, near, best, pool)
        else:
            _refine_rows(index, unit, rows, near, best, pool)
    return KnnGraph(neighbour, similarity)


def _fill_blocks(
    search: Callable[[int, np.ndarray, np.ndarray], None],
    rows: slice,
    near: np.ndarray,
    best: np.ndarray,
    pool: ThreadPoolExecutor,
) -> None:
    """Call `search(first row, neighbours, similarities)` for each block of the rows."""

    def work(part: slice) -> None:
        own = slice(part.start - rows.start, part.stop - rows.start)
        search(part.start, near[own], best[own])

    list(pool.map(work, list_blocks(rows.start, rows.stop)))


def _refine_rows(
    index: KnnIndex,
    unit: np.ndarray,
    rows: slice,
    near: np.ndarray,
    best: np.ndarray,
    pool: ThreadPoolExecutor,
) -> None:
    start_of, member = index.reverse
    order = index.order[(index.order >= rows.start) & (index.order < rows.stop)]

    def refine(part: slice) -> None:
        refine_candidates(
            unit, index.candidate, start_of, member, order[part], rows.start, near, best
        )

    list(pool.map(refine, list_blocks(0, len(order), 4 * BLOCK)))
