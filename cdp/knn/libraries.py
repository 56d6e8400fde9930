"""Approximate neighbour search by nmslib and faiss: candidates of each row.

The contract:
- No other file imports the two libraries, and they are imported only when asked for.
- Enters: unit float32 rows. Leaves: (n, width) int32 candidates, -1 padding, the row itself left
  out; the same bits for a given seed and any number of threads.
- Any failure of a library is a `BackendError` that names the alternatives.

Reproducibility of nmslib: its HNSW graph depends on the order of insertion and on a random state
kept per thread, so each index is built by one fresh thread.

Speed of nmslib: the index holds the rows projected on the principal axes that carry all but
`_LOST_ENERGY` of their squared length; the cosines that decide are taken in full afterwards. 5 % of
the rows are inserted in random order, the rest grouped by nearest pivot; queries run in that order,
so consecutive queries touch the same cache lines (twice as fast). The search width that a recall
needs differs from set to set: efSearch is the least of `_SEARCH_WIDTHS` with which a seeded sample
of rows finds `_TARGET_RECALL` of its true neighbours before refinement.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import insert_neighbour
from cdp.arrays.principal_axes import sample_rows
from cdp.arrays.threads import BLOCK, limit_blas, list_blocks
from cdp.errors import BackendError
from cdp.knn.pivots import PivotGroups, project_rows, propose_near_pivots
from cdp.knn.refine import exchange_candidates
from cdp.types import UNLABELLED

EXTRA_CANDIDATES = 12
"""Proposed beyond k, since refinement orders them anew by the cosine in full."""
PIVOTS_A_ROW = 32
"""Nearest pivots whose rows are candidates too, in addition to those of the index."""
_LOST_ENERGY = 0.03
"""Share of the rows' squared length that the projection for HNSW may lose."""
_SEARCH_WIDTHS = (25, 30, 35, 40, 50, 60, 70, 85, 100, 120, 140, 170, 200, 300, 450)
"""Values of efSearch that are tried."""
_TARGET_RECALL = 0.986
"""Recall of the sampled rows before refinement; after it the graph's is above .99."""
_SAMPLED_ROWS = 512
_RANDOM_SHARE = 20
"""One of so many rows is inserted first, in random order: entry points to all parts of the set."""
_POINTS_A_CENTROID = 48
_KMEANS_STEPS = 6
"""Rough centroids are enough for faiss: refinement corrects what its lists miss."""
_BATCH = 16 * BLOCK
"""Rows handed to a library at once."""


def import_library(backend: str) -> Any:
    """Import nmslib or faiss; BackendError with the command that installs it."""
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
    """Run in a new thread: nmslib draws its levels from a random state kept per thread."""
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


def propose_nmslib(
    nmslib: Any,
    unit: np.ndarray,
    projected: np.ndarray,
    axes: np.ndarray,
    groups: PivotGroups,
    wide: int,
    width: int,
    settings: Mapping[str, Any],
    seed: int,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of an HNSW index, and those of the same pivots, found while it is built.

    Parameters
    ----------
    unit : (n, d) rows. axes : (d, d) their principal axes.
    projected, groups : as for `propose_near_pivots`.
    wide : candidates a row. width : neighbours whose recall sets efSearch, at most `wide`.
    settings : M, efConstruction, efSearch (0: found by a sample) and post, as nmslib names them.

    Returns
    -------
    (candidate, pivot_candidates) : (n, wide) int32 each.
    """
    count = len(unit)
    with ThreadPoolExecutor(workers) as pool:
        rows = _project_for_index(unit, axes, pool)
    shuffled = np.random.default_rng(seed).permutation(count).astype(np.int32)
    first = shuffled[: count // _RANDOM_SHARE]
    effort = int(settings["efSearch"])
    sample = shuffled[count - (0 if effort else min(_SAMPLED_ROWS, count)) :]
    candidate = np.full((count, wide), UNLABELLED, np.int32)
    try:
        with ThreadPoolExecutor(1) as aside, ThreadPoolExecutor(max(workers - 1, 1)) as pool:
            proposing = aside.submit(propose_near_pivots, groups, projected, wide, pool)
            finding = aside.submit(_find_sampled, unit, sample, width)
            index = _run_in_fresh_thread(
                lambda: _build_hnsw(nmslib, rows, first, groups.order, settings)
            )
            pivot_candidates, true = proposing.result(), finding.result()
        if effort:
            _set_effort(index, effort, wide)
        else:
            _choose_effort(index, unit, rows, pivot_candidates, sample, true, wide, workers)
        for part in list_blocks(0, count, _BATCH):
            queried = groups.order[part]
            _query_hnsw(index, rows, queried, queried, candidate, workers)
    except Exception as error:
        raise BackendError(
            f"nmslib failed on {unit.shape[0]} vectors of {unit.shape[1]} dimensions with "
            f"{dict(settings)}: {error}; backends faiss and exact do the same"
        ) from error
    return candidate, pivot_candidates


def _project_for_index(unit: np.ndarray, axes: np.ndarray, pool: ThreadPoolExecutor) -> np.ndarray:
    """The rows on as few principal axes as lose at most `_LOST_ENERGY`, in steps of 16."""
    sample = sample_rows(unit) @ axes
    energy = np.cumsum(np.einsum("ij,ij->j", sample, sample, dtype=np.float64))
    needed = int(np.searchsorted(energy, (1 - _LOST_ENERGY) * energy[-1])) + 1
    needed = -(-needed // 16) * 16
    if needed >= unit.shape[1]:
        return unit
    return project_rows(unit, axes[:, :needed], pool)


def _build_hnsw(
    nmslib: Any, rows: np.ndarray, first: np.ndarray, order: np.ndarray, settings: Mapping[str, Any]
) -> Any:
    """Insert the `first` row numbers, then the others in `order`."""
    late = np.ones(len(rows), bool)
    late[first] = False
    # On unit vectors the negative dot product orders as the cosine does, and costs less.
    index = nmslib.init(method="hnsw", space="negdotprod")
    for inserted in (first, order[late[order]]):
        for part in list_blocks(0, len(inserted), _BATCH):
            index.addDataPointBatch(rows[inserted[part]], inserted[part])
    index.createIndex(
        {
            "M": int(settings["M"]),
            "efConstruction": int(settings["efConstruction"]),
            "post": int(settings["post"]),
            "indexThreadQty": 1,
        }
    )
    return index


def _set_effort(index: Any, effort: int, wide: int) -> None:
    index.setQueryTimeParams({"efSearch": max(effort, wide + 1)})


def _choose_effort(
    index: Any,
    unit: np.ndarray,
    rows: np.ndarray,
    pivot_candidates: np.ndarray,
    sample: np.ndarray,
    true: np.ndarray,
    wide: int,
    workers: int,
) -> None:
    """Set the least efSearch with which the sampled rows reach the target recall."""
    places = np.arange(len(sample), dtype=np.int32)
    for effort in _SEARCH_WIDTHS:
        _set_effort(index, effort, wide)
        found = np.full((len(sample), wide), UNLABELLED, np.int32)
        _query_hnsw(index, rows, sample, places, found, workers)
        with ThreadPoolExecutor(workers) as pool:
            exchange_candidates(unit, found, pivot_candidates, sample, places, pool)
        if (found[:, :, None] == true[:, None, :]).any(axis=1).mean() >= _TARGET_RECALL:
            break


def _query_hnsw(
    index: Any,
    rows: np.ndarray,
    queried: np.ndarray,
    places: np.ndarray,
    candidate: np.ndarray,
    workers: int,
) -> None:
    """Write the neighbours of the queried row numbers into `candidate`, at `places`."""
    wanted = candidate.shape[1] + 1
    answers = index.knnQueryBatch(rows[queried], k=wanted, num_threads=workers)
    found = np.full((len(queried), wanted), UNLABELLED, np.int32)
    if all(len(answer) == wanted for answer, _ in answers):
        found[:] = [answer for answer, _ in answers]
    else:
        for place, (answer, _) in enumerate(answers):
            found[place, : len(answer)] = answer
    _drop_self(found, queried, places, candidate)


def _find_sampled(unit: np.ndarray, sample: np.ndarray, width: int) -> np.ndarray:
    """The exact `width` neighbours of a few rows, (sample, width) int64."""
    nearest = np.full((len(sample), width), UNLABELLED, np.int64)
    best = np.full((len(sample), width), -np.inf, np.float32)
    for part in list_blocks(0, len(unit), _BATCH):
        similarity = unit[sample] @ unit[part].T
        own = np.flatnonzero((sample >= part.start) & (sample < part.stop))
        similarity[own, sample[own] - part.start] = -np.inf
        _keep_best(similarity, part.start, nearest, best)
    return nearest


def propose_faiss(
    faiss: Any, unit: np.ndarray, width: int, settings: Mapping[str, Any], seed: int, workers: int
) -> np.ndarray:
    """Candidates of an inverted file; settings : nlist (0: 4 sqrt(n)) and nprobe."""
    count, dimension = unit.shape
    try:
        with limit_blas():
            faiss.omp_set_num_threads(1)
            lists = min(int(settings["nlist"]) or int(4 * np.sqrt(count)), count)
            quantizer = faiss.IndexFlatIP(dimension)
            index = faiss.IndexIVFFlat(quantizer, dimension, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.seed = int(seed) % 2**31
            index.cp.max_points_per_centroid = _POINTS_A_CENTROID
            index.cp.min_points_per_centroid = 1
            index.cp.niter = _KMEANS_STEPS
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


@njit(cache=True, nogil=True)
def _drop_self(near: Any, rows: Any, places: Any, out: Any) -> None:
    """Copy the neighbours of `rows` to `places` of `out`, without padding and the row itself."""
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
                insert_neighbour(nearest[i], best[i], first + j, similarity[i, j])
