"""Threads: how many to use, BLAS limited to one of them, and rows in blocks to share out.

The contract:
- No result depends on the number of threads: blocks have a fixed size, and BLAS on one thread adds
  in one order.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from threadpoolctl import ThreadpoolController

from cdp.errors import ConfigError

BLOCK = 1024
"""Rows a thread takes at once."""


def count_threads(threads: int | None) -> int:
    """`threads`, or the cores this process may use; ConfigError below 1."""
    if threads is None:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else (os.cpu_count() or 1)
        )
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    return threads


def list_blocks(start: int, stop: int, size: int = BLOCK) -> list[slice]:
    """Rows start .. stop - 1 as slices of `size` rows, the last one shorter."""
    return [slice(low, min(low + size, stop)) for low in range(start, stop, size)]


class _BlasLimit:
    """The one-thread limit of this process, shared by its users: the last one to leave lifts it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limits: list[Any] = []
        self._found: ThreadpoolController | None = None
        self._modules = 0

    def enter(self) -> None:
        with self._lock:
            if self._users == 0:
                found = self._find_libraries()
                # A BLAS that runs on OpenMP takes the threads of the whole process with it: those
                # are noted first and restored last.
                self._limits = [
                    found.select(user_api=kind).limit(limits=limit)
                    for kind, limit in (("openmp", None), ("blas", 1))
                ]
            self._users += 1

    def _find_libraries(self) -> ThreadpoolController:
        """The BLAS libraries of this process, looked for again once a module was imported."""
        if self._found is None or self._modules != len(sys.modules):
            self._found, self._modules = ThreadpoolController(), len(sys.modules)
        return self._found

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for limits in reversed(self._limits):
                    limits.restore_original_limits()


_blas_limit = _BlasLimit()


@contextmanager
def limit_blas() -> Iterator[None]:
    """Limit BLAS to one thread: it then adds in one order, and the cores are left to the blocks.

    The limit holds for the process. It is lifted when the last of several concurrent users leaves.
    """
    _blas_limit.enter()
    try:
        yield
    finally:
        _blas_limit.leave()
