"""Arrays that may be too large to hold.

The contract: up to `HELD_BYTES` an array lies in memory; a larger one is mapped from an unnamed
temporary file, so that the system may write it out when memory is needed. It vanishes with the last
reference to it, also when the process is killed.
"""

from __future__ import annotations

import math
import tempfile

import numpy as np

HELD_BYTES = 1 << 28


def allocate(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.ndarray:
    """An array of this shape, its content undefined; the folder is that of `tempfile`."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= HELD_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="cdp-") as file:
        return np.memmap(file, dtype, "w+", shape=shape)
