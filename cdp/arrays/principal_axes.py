"""Principal axes of a set of rows.

The contract: callers limit BLAS to one thread, and the axes then have the same bits for the same
rows.
"""

from __future__ import annotations

import numpy as np


def find_axes(rows: np.ndarray) -> np.ndarray:
    """All (d, d) float32 principal axes of (n, d) float32 rows about the origin, strongest first.

    Sums over the rows are float32, as exact as some ten thousand rows need; the rest is float64.
    """
    moment = (rows.T @ rows).astype(np.float64)
    return np.ascontiguousarray(np.linalg.eigh(moment)[1][:, ::-1], np.float32)
