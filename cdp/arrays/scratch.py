"""Scratch arrays, on disk where they are too large for memory.

The contract: up to `HELD_BYTES` an array lies in memory; a larger one is mapped from an unnamed
temporary file, so that the system may write it out when memory is needed. The file vanishes with
the last reference to it, also when the process is killed. Its room on disk is reserved at once: a
full disk is an OSError here, not the death of the process at a later write.
"""

from __future__ import annotations

import math
import os
import tempfile

import numpy as np

HELD_BYTES = 1 << 26
"""64 MiB: eight million numbers of float64."""

BLOCK = 1 << 20
"""Numbers converted at once by `copy_as`."""


def copy_as(array: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
    """A 1-d array in this type: itself where it has it, else a copy, on disk where it is large."""
    if array.dtype == dtype:
        return array
    out = allocate(array.shape, dtype)
    for start in range(0, len(array), BLOCK):
        out[start : start + BLOCK] = array[start : start + BLOCK]
    return out


def allocate(shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.ndarray:
    """An array of this shape, its content undefined; the folder is that of `tempfile`."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= HELD_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="cdp-") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                place = f"{tempfile.gettempdir()} ({size >> 20} MiB wanted; or set TMPDIR)"
                raise OSError(error.errno, error.strerror, place) from error
        return np.memmap(file, dtype, "w+", shape=shape)
