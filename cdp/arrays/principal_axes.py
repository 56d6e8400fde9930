"""Principal axes of a set of rows, estimated on a sample of them.

The contract: callers limit BLAS to one thread, and the axes then have the same bits for the same
rows.
"""

from __future__ import annotations

import numpy as np

_SAMPLED_ROWS = 16384


def sample_rows(rows: np.ndarray) -> np.ndarray:
    """Some 16,384 to 32,768 rows, evenly spaced, or all where they are fewer."""
    return rows[:: max(len(rows) // _SAMPLED_ROWS, 1)]


def find_axes(rows: np.ndarray) -> np.ndarray:
    """All (d, d) float32 principal axes about the origin, strongest first, by a sample of the rows.

    rows : (n, d) float32. Sums over the sample are float32, the rest is float64.
    """
    sample = sample_rows(rows)
    moment = (sample.T @ sample).astype(np.float64)
    return np.ascontiguousarray(np.linalg.eigh(moment)[1][:, ::-1], np.float32)
