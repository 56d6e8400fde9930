"""nmslib and faiss: candidate neighbours of each row. No other file imports the two."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import insert_neighbour
from cdp.arrays.threads import BLOCK, limit_blas, list_blocks
from cdp.errors import BackendError
from cdp.knn.pivots import PivotGroups, project_rows, propose_near_pivots
from cdp.knn.refine import exchange_candidates
from cdp.types import UNLABELLED

_LOST_ENERGY = 0.03
SPARE_CANDIDATES = 12
_WIDTHS = (25, 30, 35, 40, 50, 60, 70, 85, 100, 120, 140, 170, 200, 300, 450)
_TARGET_RECALL = 0.986
_SAMPLE = 512
NEAREST_PIVOTS = 32
_FIRST_SHARE = 20


def import_library(backend: str) -> Any:
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


def propose_nmslib(
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
                    exchange_candidates(unit, tried, beside, sample, places, pool)
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


def propose_faiss(
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
                insert_neighbour(nearest[i], best[i], first + j, similarity[i, j])
