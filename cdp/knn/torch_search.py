"""Exact k nearest neighbours by torch: blocks of all cosines on a GPU, or on the CPU.

The contract:
- Enters: unit float32 rows. Leaves: (n, c) int32 candidates that contain the k nearest of each row,
  ties by smaller row included; compared in full afterwards they give the bits of backend `exact`.
- Cosines are products in float32 (no TF32), which round in another order than `dot_rows`. So a few
  more than k are kept, and a row whose k-th neighbour is not clear of the last one kept by more
  than rounding, as among many equal vectors, is compared with all rows.
- One block of cosines is held on the device: `_ROWS` rows by `_COLUMNS` columns, 1 GiB.

The k largest of a row lie in the k groups of columns with the largest maxima, so that only the
maxima of the groups, and k groups, are sorted (ours).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cdp.arrays.cosine import as_readonly
from cdp.arrays.threads import list_blocks
from cdp.errors import BackendError
from cdp.knn.exact import BOUND_SLACK, scan_rows
from cdp.knn.refine import rank_candidates
from cdp.types import UNLABELLED

DEVICES = ("auto", "cpu", "cuda")
_EXTRA = 12
"""Kept beyond k, so that rounding rarely matters."""
_ROWS, _COLUMNS = 4096, 1 << 16
_GROUP = 32
"""Columns of a group, of which the maximum is sorted first."""


def propose_torch(unit: np.ndarray, width: int, device: str, workers: int) -> np.ndarray:
    """Candidates that contain the `width` nearest of each row, (n, width + 12 or fewer) int32.

    device : "auto" (a GPU if there is one), "cpu" or "cuda", maybe with a number: "cuda:1".
    """
    count = len(unit)
    kept = min(width + _EXTRA, count - 1)
    try:
        candidate, least = _search_blocks(unit, kept, device)
    except (ImportError, RuntimeError) as error:
        raise BackendError(
            f"backend torch failed on {count} vectors of {unit.shape[1]} dimensions with device "
            f"{device!r}: {error}; backend exact gives the same graph"
        ) from error
    if kept < count - 1:
        _settle_rows(unit, candidate, least, width, workers)
    return candidate


def _choose_device(torch: Any, device: str) -> Any:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _search_blocks(unit: np.ndarray, kept: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The `kept` largest cosines of each row: rows (n, kept) int32, and the least cosine (n,)."""
    import torch

    place = _choose_device(torch, device)
    rows = torch.tensor(unit, device=place)
    candidate = np.empty((len(unit), kept), np.int32)
    least = np.empty(len(unit), np.float32)
    with torch.no_grad(), _Precision(torch):
        for part in list_blocks(0, len(unit), _ROWS):
            value, near = _search_rows(torch, rows, part, kept)
            candidate[part] = near.int().cpu().numpy()
            least[part] = value[:, -1].cpu().numpy()
    return candidate, least


class _Precision:
    """Sets and restores torch's precision of float32 matrix products."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def __enter__(self) -> None:
        self.before = self.torch.get_float32_matmul_precision()
        self.torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        self.torch.set_float32_matmul_precision(self.before)


def _search_rows(torch: Any, rows: Any, part: slice, kept: int) -> tuple[Any, Any]:
    """The largest cosines of a block of rows with all others, and their columns."""
    best = near = None
    for columns in list_blocks(0, len(rows), _COLUMNS):
        cosine = rows[part] @ rows[columns].T
        first, last = max(part.start, columns.start), min(part.stop, columns.stop)
        if first < last:
            own = torch.arange(first, last, device=rows.device)
            cosine[own - part.start, own - columns.start] = -torch.inf
        value, place = _pick_largest(torch, cosine, min(kept, cosine.shape[1]))
        place += columns.start
        if best is not None:
            value, place = torch.cat([best, value], 1), torch.cat([near, place], 1)
            value, chosen = value.topk(min(kept, value.shape[1]), 1)
            place = place.gather(1, chosen)
        best, near = value, place
    return best, near


def _pick_largest(torch: Any, cosine: Any, kept: int) -> tuple[Any, Any]:
    """The `kept` largest values of each row and their columns."""
    height, span = cosine.shape
    groups = span // _GROUP
    if span % _GROUP or groups <= kept:
        return cosine.topk(kept, 1)
    grouped = cosine.view(height, groups, _GROUP)
    chosen = grouped.amax(2).topk(kept, 1).indices
    inside = grouped.gather(1, chosen[:, :, None].expand(-1, -1, _GROUP)).view(height, -1)
    value, place = inside.topk(kept, 1)
    column = chosen.gather(1, place // _GROUP) * _GROUP + place % _GROUP
    return value, column


def _settle_rows(
    unit: np.ndarray, candidate: np.ndarray, least: np.ndarray, width: int, workers: int
) -> None:
    """Search all rows for those whose `width` nearest might not be among the candidates."""
    vectors = as_readonly(unit)
    nearest = np.full((len(unit), width), UNLABELLED, np.int64)
    best = np.full((len(unit), width), -np.inf, np.float32)

    def rank(part: slice) -> None:
        rank_candidates(vectors, candidate, part.start, nearest[part], best[part])

    def scan(rows: np.ndarray) -> None:
        scan_rows(vectors, rows, nearest, best)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(rank, list_blocks(0, len(unit))))
        unclear = np.flatnonzero(best[:, -1] <= least + BOUND_SLACK)
        list(pool.map(scan, np.array_split(unclear, max(len(unclear) // 16, 1))))
    candidate[unclear] = UNLABELLED
    candidate[unclear, :width] = nearest[unclear]
