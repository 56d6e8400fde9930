"""Threads: how many, BLAS kept to one of them, and rows in blocks for them.

The contract:
- No result depends on the number of threads: blocks have a fixed size and BLAS sums in one order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

from cdp.errors import ConfigError

BLOCK = 1024


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
def limit_blas() -> Iterator[None]:
    """Keep BLAS to one thread: its sums then have one order, and the blocks have the cores.

    The limit is the process's, so the last of several concurrent searches lifts it, not the first.
    """
    with _BLAS_LOCK:
        if _BLAS["users"] == 0:
            found = ThreadpoolController()
            # a BLAS of OpenMP takes its host's threads along: those are put back as they were
            _BLAS["limits"] = [
                found.select(user_api=kind).limit(limits=limit)
                for kind, limit in (("openmp", None), ("blas", 1))
            ]
        _BLAS["users"] += 1
    try:
        yield
    finally:
        with _BLAS_LOCK:
            _BLAS["users"] -= 1
            if _BLAS["users"] == 0:
                for limits in reversed(_BLAS["limits"]):
                    limits.restore_original_limits()


def list_blocks(start: int, stop: int, size: int = BLOCK) -> list[slice]:
    return [slice(low, min(low + size, stop)) for low in range(start, stop, size)]
